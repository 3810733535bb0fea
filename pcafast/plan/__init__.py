"""Deciding what to do to a model, as plain data."""

from pcafast.plan.actions import LowRank, Prune
from pcafast.plan.budget import Budget
from pcafast.plan.low_rank import plan_low_rank
from pcafast.plan.plan import Plan, register_applier
from pcafast.plan.pruning import plan_pruning

__all__ = ["Budget", "LowRank", "Plan", "Prune", "plan_low_rank", "plan_pruning", "register_applier"]

"""Deciding what to do to a model, as plain data."""

from pcafast.plan.actions import LowRank
from pcafast.plan.budget import Budget
from pcafast.plan.low_rank import plan_low_rank
from pcafast.plan.plan import Plan, register_applier

__all__ = ["Budget", "LowRank", "Plan", "plan_low_rank", "register_applier"]

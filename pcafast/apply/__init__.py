"""Carrying out plans: low-rank factorisation, removal of channels, and re-estimation of batch norms afterwards."""

from pcafast.apply import low_rank, prune  # these register how their actions are carried out
from pcafast.apply.batch_norm import reestimate_batch_norm
from pcafast.apply.optimizer import rebind_optimizer
from pcafast.apply.random_factors import random_factors

__all__ = ["low_rank", "prune", "random_factors", "rebind_optimizer", "reestimate_batch_norm"]

"""Carrying out plans: low-rank factorisation, and re-estimation of batch norms afterwards."""

from pcafast.apply import low_rank  # registers how its actions are carried out
from pcafast.apply.batch_norm import reestimate_batch_norm

__all__ = ["low_rank", "reestimate_batch_norm"]

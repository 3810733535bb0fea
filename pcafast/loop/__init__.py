"""Calibrating, training, evaluating and measuring models, and the loop that makes them smaller."""

from pcafast.loop.calibrate import calibrate
from pcafast.loop.compress import Compressed, compress
from pcafast.loop.evaluate import Evaluation, evaluate
from pcafast.loop.factorisation import Directions
from pcafast.loop.hessians import projection_hessians
from pcafast.loop.measure import Costs, measure
from pcafast.loop.pruning import Criterion
from pcafast.loop.refit import refit
from pcafast.loop.sensitivity import rank_losses
from pcafast.loop.train import Trainer

__all__ = [
    "Compressed",
    "Costs",
    "Criterion",
    "Directions",
    "Evaluation",
    "Trainer",
    "calibrate",
    "compress",
    "evaluate",
    "measure",
    "projection_hessians",
    "rank_losses",
    "refit",
]

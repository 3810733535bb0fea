"""Calibrating, training, evaluating and measuring models."""

from pcafast.loop.calibrate import calibrate
from pcafast.loop.evaluate import Evaluation, evaluate
from pcafast.loop.measure import Costs, measure
from pcafast.loop.train import Trainer

__all__ = ["Costs", "Evaluation", "Trainer", "calibrate", "evaluate", "measure"]

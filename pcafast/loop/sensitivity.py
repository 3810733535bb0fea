"""How much the model's outputs suffer when one layer alone is given a lower rank."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcafast.bases import Basis
from pcafast.errors import ArgumentError, PcafastError
from pcafast.loop.batches import Batches, model_inputs, require_many_passes
from pcafast.modes import evaluating
from pcafast.plan import plan_low_rank
from pcafast.plan.candidates import find_candidates
from pcafast.progress import track
from pcafast.statistics import Statistic

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)


def rank_losses(
    model: nn.Module,
    statistics: Mapping[str, Statistic | Basis],
    batches: Batches,
    *,
    shares: Sequence[float] = SHARES,
) -> dict[str, dict[int, float]]:
    """Measure what each layer's rank costs: {layer: {rank: loss}}, for the ``losses`` of ``plan_low_rank``.

    The loss is the mean over images of KL(p, q), in nats, p and q being the class probabilities of the original and of
    the model with this one layer factorised.

    Args:
        model: a classifier; it stays as it is.
        statistics: as for ``plan_low_rank``.
        batches: inputs, or sequences that start with the inputs, which can be gone through many times, once for every
            rank of every layer: a few hundred images are enough.
        shares: of the largest rank that is cheaper than the layer; which ranks to try.

    Raises:
        ArgumentError: there is no batch, no share in (0, 1], or the statistics are of another model.
    """
    if not isinstance(shares, Sequence) or not shares or not all(0 < share <= 1 for share in shares):
        raise ArgumentError(f"shares: expected some in (0, 1], got {shares!r}.")
    require_many_passes(batches)
    candidates, _ = find_candidates(model, statistics, None, None)
    trials = [
        (candidate, rank)
        for candidate in candidates
        for rank in sorted({max(1, round(share * candidate.max_rank)) for share in shares})
    ]
    expected = list(_log_probabilities(model, batches))
    if not expected:
        raise ArgumentError("batches: expected at least one to measure losses on, got none.")
    losses: dict[str, dict[int, float]] = {}
    for candidate, rank in track(trials, "measuring ranks"):
        name = candidate.layer.name
        small = plan_low_rank(model, {name: candidate.basis}, ranks={name: rank}).apply(model)
        losses.setdefault(name, {})[rank] = _divergence(expected, _log_probabilities(small, batches))
    return losses


def _log_probabilities(model: nn.Module, batches: Batches) -> Iterable[Tensor]:
    with evaluating(model), torch.no_grad():
        for inputs in model_inputs(model, batches):
            scores = model(inputs.clone())  # since a forward may work in place
            if not isinstance(scores, Tensor) or scores.ndim < 2:
                found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ArgumentError(f"model: expected class scores of shape ({len(inputs)}, classes), got {found}.")
            yield F.log_softmax(scores.float(), dim=1)


def _divergence(expected: Sequence[Tensor], found: Iterable[Tensor]) -> float:
    pairs = list(zip(expected, found, strict=True))
    total = sum(float(F.kl_div(q, p, reduction="sum", log_target=True)) for p, q in pairs)
    images = sum(len(p) for p, _ in pairs)
    if not abs(total) < float("inf"):
        raise PcafastError("The model's outputs are not finite on these batches, so no loss can be measured on them.")
    return max(total / images, 0.0)

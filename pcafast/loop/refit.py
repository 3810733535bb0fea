"""Low-rank factors fitted front to back, each to what the layers before it have become."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcafast.collect.layers import channel_dim
from pcafast.cross_moments import as_maps, cross_moments
from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batches, model_inputs, require_many_passes
from pcafast.modes import evaluating
from pcafast.plan import LowRank, Plan
from pcafast.plan.layers import Factorisable, groups
from pcafast.progress import track
from pcafast.statistics import PatchCovariance

_RIDGE = 1e-6
"""Of the mean variance of a patch's entries: what is added to each, so that directions without any do no harm."""


def refit(model: nn.Module, plan: Plan, batches: Batches) -> Plan:
    """The same layers and ranks, with the factors that come closest to the original outputs of each layer.

    The layers are gone through in the order of the forward. Of each, the output y in the original network and the
    patches x that it takes in once the layers before it are factorised are streamed, and the factors are those of the
    least E|y - U V x - c|^2 in closed form: with M = C_yx C_xx^-1, U are the first eigenvectors of M C_xx M', and
    V = U' M (reduced-rank regression, Izenman 1975; the asymmetric reconstruction of Zhang et al., arXiv 1505.06798,
    without their non-linearity and with V free to replace the weights). So a layer makes up for errors of those before
    it. Batch norms fit as they are afterwards, and re-estimating them does harm.

    Args:
        model: the original, run in evaluation mode; it stays as it is.
        plan: of low-rank layers of this model, as ``plan_low_rank`` returns it.
        batches: inputs, or sequences that start with the inputs, which can be gone through many times, once for every
            layer. A few thousand images are enough for the networks of CIFAR-10.

    Returns:
        A plan with the same actions on side "both", and in ``kept`` the share of the variance of y that is explained.

    Raises:
        ArgumentError: the plan does more than factorise, or there are fewer patches than a patch has entries.
        PcafastError: the batches hold NaN or infinities.
    """
    if plan.tensors is None or not all(isinstance(action, LowRank) for action in plan.actions):
        raise ArgumentError(f"plan: expected one of low-rank layers, with its tensors, got {plan.asked or 'another'}.")
    actions = {action.layer: action for action in plan.actions if isinstance(action, LowRank)}
    require_many_passes(batches)
    tensors = dict(plan.tensors)
    small = model
    with evaluating(model):
        calls = _calls_in_order(model, actions, batches)
        for name in track(list(calls), "fitting layers front to back"):
            layer: Any = model.get_submodule(name)
            if PatchCovariance.fits(layer):
                seen = _Seen(layer, name)
                for inputs, outputs in _pairs(model, small, name, calls[name], batches):
                    seen.update(inputs, outputs)
                fitted, kept = _fitted(seen, actions[name].rank)
                actions[name] = replace(actions[name], side="both", kept=kept)
                tensors |= {f"{name}.{key}": tensor for key, tensor in fitted.items()}
            small = Plan([actions[name]], tensors=tensors).apply(small)
    done = [actions[action.layer] for action in plan.actions]
    return replace(plan, actions=done, asked={**plan.asked, "refit": True}, tensors=tensors)


def _calls_in_order(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, int]:
    """How often one forward calls each of these layers, in the order of their first calls."""
    calls: dict[str, int] = {}

    def called(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    first = next(model_inputs(model, batches), None)
    if first is None:
        raise ArgumentError("batches: expected at least one to fit the layers to, got none.")
    handles = [model.get_submodule(name).register_forward_hook(called(name)) for name in names]
    try:
        with torch.no_grad():
            model(first[:1])
    finally:
        for handle in handles:
            handle.remove()
    if unreached := [name for name in names if name not in calls]:
        raise ArgumentError(f"plan: the model's forward does not call layer {unreached[0]!r}, so nothing can fit it.")
    return calls


def _pairs(
    model: nn.Module, small: nn.Module, name: str, calls: int, batches: Batches
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer takes in within one model, and what it gives in the other, call by call."""
    for inputs in model_inputs(model, batches):
        original = _seen_at(model, name, calls, inputs)
        current = original if small is model else _seen_at(small, name, calls, inputs)
        for (x, _), (_, y) in zip(current, original, strict=True):
            yield x, y


class _SeenEnoughError(Exception):
    """Ends a forward of which the rest is of no interest."""


def _seen_at(model: nn.Module, name: str, calls: int, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the layer at each of its calls."""
    found: list[tuple[Tensor, Tensor]] = []

    def take(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # After the last call nothing more is done that could overwrite them.
        last = len(found) + 1 == calls
        found.append((args[0], output) if last else (args[0].clone(), output.clone()))
        if last:
            raise _SeenEnoughError

    handle = model.get_submodule(name).register_forward_hook(take)
    try:
        with evaluating(model), torch.no_grad(), suppress(_SeenEnoughError):
            model(inputs)
    finally:
        handle.remove()
    return found


class _Seen:
    """What is streamed for one layer: the covariance of patches x, and their products with the outputs y."""

    def __init__(self, layer: Factorisable, name: str) -> None:
        self.name, self.groups = name, groups(layer)
        self._channel_dim = channel_dim(layer, 1)
        settings = {**PatchCovariance.settings_for(layer), "channel_dim": self._channel_dim}
        self.patches = PatchCovariance(**settings, nonfinite="raise")
        self.patches.layer = name
        self.count = 0
        self.x_mean, self.y_mean, self.products, self.squares = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Merge one batch (Chan, Golub and LeVeque, 1979)."""
        self.patches.update(x)
        maps = as_maps("output", y, self._channel_dim)
        new = cross_moments(as_maps("input", x, self._channel_dim), maps, self.patches.cut, self.groups)
        share = new.positions / (self.count + new.positions)
        x_change, y_change = new.patch_mean - self.x_mean, new.pixel_mean - self.y_mean
        outer = x_change.view(self.groups, -1, 1) * y_change.view(self.groups, 1, -1)
        self.products = self.products + new.comoment + share * self.count * outer
        own = (maps - new.pixel_mean.to(maps.dtype).view(-1, 1, 1)).square().sum(dtype=torch.float64)
        self.squares = self.squares + own + share * self.count * y_change.square().sum()
        self.x_mean, self.y_mean = self.x_mean + share * x_change, self.y_mean + share * y_change
        self.count += new.positions


def _fitted(seen: _Seen, rank: int) -> tuple[dict[str, Tensor], float]:
    """The tensors of an action of the layer, and the share of the variance of its outputs that they explain."""
    entries = len(seen.x_mean) // seen.groups
    if seen.count <= entries:
        raise ArgumentError(
            f"batches: expected more than {entries} patches to fit layer {seen.name!r} to, as many as a patch has "
            f"entries, got {seen.count}. Give more images."
        )
    found = seen.patches.compute().covariance
    covariance = found.reshape(seen.groups, entries, entries)
    cross = seen.products / seen.count
    ridge = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(ridge > 0, ridge, 1)[:, None, None]
    predictor = torch.linalg.solve(covariance + ridge * torch.eye(entries).to(covariance), cross).mT
    values, directions = torch.linalg.eigh(predictor @ cross)
    kept = directions.flip(-1)[..., :rank]
    encoder = kept.mT @ predictor
    variance = float(seen.squares) / seen.count
    explained = float(values.flip(-1)[..., :rank].sum() + (ridge * encoder.square()).sum())
    share = explained / variance if variance > 0 else 1.0
    tensors = {"encoder": encoder, "decoder": kept, "mean": seen.x_mean, "offset": seen.y_mean}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, share

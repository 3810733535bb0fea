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
from pcafast.plan.layers import Factorisable, groups, is_factorisable
from pcafast.progress import track
from pcafast.regression import reduced_rank_regression
from pcafast.statistics import NonFiniteError, PatchCovariance


def refit(model: nn.Module, plan: Plan, batches: Batches) -> Plan:
    """The same layers and ranks, with the factors that come closest to the original outputs of each layer.

    The layers are gone through in the order of the forward. Of each, the output y in the original network and the
    patches x that it takes in once the layers before it are factorised are streamed, and the factors are those of the
    least E|y - U V x - c|^2 in closed form (``pcafast.regression``; the asymmetric reconstruction of Zhang et al.,
    arXiv 1505.06798, without their non-linearity, and with V free to replace the weights). So a layer makes up for
    errors of those before it, and the directions that the plan had are replaced: of it only layers and ranks stay.
    Where the second factor is fused into a following layer, it is the output of that layer that counts. Batch norms fit
    as they are afterwards, and re-estimating them does harm.

    Args:
        model: the original, run in evaluation mode; it stays as it is.
        plan: of low-rank layers of this model, as ``plan_low_rank`` returns it.
        batches: inputs, or sequences that start with the inputs, which can be gone through many times, once for every
            layer. A few thousand images are enough for the networks of CIFAR-10.

    Returns:
        A plan with the same actions on side "both", and in ``kept`` the share of the variance of y that is explained.
        Convolutions in three dimensions keep the factors that they had.

    Raises:
        ArgumentError: the plan does more than factorise, or is of another model; there are fewer patches than a patch
            has entries; the batches cannot be gone through again.
        NonFiniteError: a layer takes in or gives NaN or infinities.
    """
    if not isinstance(plan, Plan) or plan.tensors is None or not all(isinstance(one, LowRank) for one in plan.actions):
        raise ArgumentError(
            f"plan: expected one of low-rank layers, with its tensors, got {getattr(plan, 'asked', plan)}."
        )
    actions = {action.layer: action for action in plan.actions if isinstance(action, LowRank)}
    plan.apply_structure(model)  # which refuses a model that the plan is not of
    require_many_passes(batches)
    tensors = dict(plan.tensors)
    small = model
    with evaluating(model):
        calls = _calls_in_order(model, actions, batches)
        for name in track(list(calls), "fitting layers front to back"):
            action, layer = actions[name], model.get_submodule(name)
            if is_factorisable(layer) and PatchCovariance().fits(layer):
                seen = _Seen(layer, name, _metric(model, action, layer))
                for inputs, outputs in _pairs(model, small, name, calls[name], batches):
                    seen.update(inputs, outputs)
                fitted, kept = seen.fitted(action.rank)
                actions[name] = replace(action, side="both", kept=kept)
                tensors |= {f"{name}.{key}": tensor for key, tensor in fitted.items()}
            small = Plan([actions[name]], tensors=tensors).apply(small)
    done = [actions[action.layer] for action in plan.actions]
    return replace(plan, actions=done, asked={**plan.asked, "refit": True}, tensors=tensors)


def _metric(model: nn.Module, action: LowRank, layer: Factorisable) -> Tensor | None:
    """Weights of the layer that takes in the second factor, for each group of this one: its outputs are what counts."""
    if action.fuse_into is None:
        return None
    consumer = model.get_submodule(action.fuse_into)
    assert is_factorisable(consumer), "the plan has been applied"
    weight, g, h = consumer.weight.detach().double(), groups(layer), groups(consumer)
    blocks = weight.reshape(h, len(weight) // h, g // h, -1)
    return blocks.movedim(2, 1).reshape(g, len(weight) // h, -1)


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
            model(first.clone())
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

    def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = next(iter((*args, *kwargs.values())))
        # After the last call nothing more is done that could overwrite them.
        last = len(found) + 1 == calls
        found.append((x, output) if last else (x.clone(), output.clone()))
        if last:
            raise _SeenEnoughError

    handle = model.get_submodule(name).register_forward_hook(take, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad(), suppress(_SeenEnoughError):
            model(inputs.clone())  # since a forward may work in place
    finally:
        handle.remove()
    return found


class _Seen:
    """What is streamed for one layer: the covariance of patches x, and their products with the outputs y."""

    def __init__(self, layer: Factorisable, name: str, metric: Tensor | None) -> None:
        self._name, self._groups, self._metric = name, groups(layer), metric
        self._channel_dim = channel_dim(layer, 1)
        settings = {**PatchCovariance.settings_for(layer), "channel_dim": self._channel_dim}
        self._patches = PatchCovariance(**settings)
        self._patches.layer = name
        self._count = 0
        self._x_mean, self._y_mean, self._products, self._squares = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Merge one batch (Chan, Golub and LeVeque, 1979)."""
        if y.numel() == 0:
            return
        maps = as_maps("output", y, self._channel_dim)
        new = cross_moments(as_maps("input", x, self._channel_dim), maps, self._patches.cut, self._groups)
        if not new.comoment.isfinite().all():
            raise NonFiniteError(
                f"batches: expected finite numbers in and out of layer {self._name!r}, got NaN or infinities."
            )
        self._patches.update(x)
        share = new.positions / (self._count + new.positions)
        x_change, y_change = new.patch_mean - self._x_mean, new.pixel_mean - self._y_mean
        outer = x_change.view(self._groups, -1, 1) * y_change.view(self._groups, 1, -1)
        self._products = self._products + new.comoment + share * self._count * outer
        deviations = maps.movedim(1, -1).flatten(0, -2).double() - new.pixel_mean
        own = self._measured(deviations).square().sum()
        self._squares = self._squares + own + share * self._count * self._measured(y_change[None]).square().sum()
        self._x_mean, self._y_mean = self._x_mean + share * x_change, self._y_mean + share * y_change
        self._count += new.positions

    def fitted(self, rank: int) -> tuple[dict[str, Tensor], float]:
        """The tensors of an action of the layer, and the share of the variance of its outputs that they explain."""
        entries = self._x_mean.numel() // self._groups
        if self._count <= entries:
            raise ArgumentError(
                f"batches: expected more than {entries} patches to fit layer {self._name!r} to, as many as a patch has "
                f"entries, got {self._count}. Give more images."
            )
        covariance = self._patches.compute().covariance.reshape(self._groups, entries, entries)
        found = reduced_rank_regression(covariance, self._products / self._count, rank, self._metric)
        variance = float(self._squares) / self._count
        share = min(found.explained / variance, 1.0) if variance > 0 else 1.0
        tensors = {"encoder": found.encoder, "decoder": found.decoder, "mean": self._x_mean, "offset": self._y_mean}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, share

    def _measured(self, rows: Tensor) -> Tensor:
        """Rows of outputs (P, C), in the metric."""
        if self._metric is None:
            return rows
        return torch.einsum("gec,pgc->pge", self._metric, rows.unflatten(1, (self._groups, -1)))

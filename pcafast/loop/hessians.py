"""Projection-loss Hessians of a model's layers, in one pass over the data for all layers together."""

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from pcafast.collect.layers import LayerChoice, choose_layers
from pcafast.collect.projection import Site, perturbed, projected
from pcafast.errors import ArgumentError, PcafastWarning
from pcafast.loop.batches import Batches, model_inputs
from pcafast.loop.projection_losses import LOSSES, Loss, example_losses
from pcafast.memory import require_memory
from pcafast.modes import evaluating
from pcafast.progress import track
from pcafast.statistics import ProjectionHessian
from pcafast.statistics.projection_hessian import Fit
from pcafast.statistics.statistic import Side


def projection_hessians(
    model: nn.Module,
    batches: Batches,
    *,
    layers: LayerChoice | None = None,
    side: Side = "output",
    fit: Fit = "sampled",
    loss: str | Loss = "mse",
    ranked: bool = False,
    samples: int | None = None,
    mean_images: int = 1024,
    seed: int = 0,
) -> dict[str, ProjectionHessian]:
    """Symmetric forms v'Hv close to the loss of projecting the unit direction v out of a layer's activation.

    The model runs in evaluation mode; its modes, gradients and hooks are as before afterwards. A first pass over
    ``mean_images`` takes the means that projections keep. Then every image has a random direction (Gaussian, of unit
    length) for each layer, until there are enough samples: for ``sampled``, a forward pass for each layer and one more;
    for ``local``, one forward and one backward pass, and the product with the second derivative for each layer.

    Args:
        model: whose output is one tensor, an example to each row.
        batches: inputs, or sequences that start with the inputs; gone through again until there are enough samples. It
            may be infinite.
        layers: which, see ``pcafast.collect.layers.choose_layers``. By default all convolutions (for the input side
            of one or two dimensions) and linear layers that the forward calls once, those with groups left out.
        side: whether of the layers' outputs or inputs, see ``pcafast.ProjectionHessian``.
        fit: to losses ("sampled") or to second-order products ("local").
        loss: "mse", the mean squared error; "kl", the symmetric divergence KL(p, q) + KL(q, p) of the softmax over
            dimension 1; or a function of the original outputs and the outputs that returns a loss for each example,
            (N,). For the local fit it must be twice differentiable and have its minimum where the two are equal.
        ranked: fit the ranks of the losses instead (``sampled`` only).
        samples: of each layer; by default D^2 (sampled), D (local) for directions of D dimensions, which a noisy loss
            makes few: on trained networks thousands more are worth their time.
        mean_images: for the means.
        seed: of the directions, which do not depend on what other layers there are.

    Raises:
        ArgumentError: a layer has groups, is not called exactly once, or (input side) is of another type; the loss is
            not per example; the batches end early.
    """
    measure = LOSSES.get(loss) if isinstance(loss, str) else loss
    if measure is None:
        raise ArgumentError(f"loss: expected one of {', '.join(LOSSES)} or a function, got {loss!r}")
    for name, number in (("samples", samples), ("mean_images", mean_images)):
        if number is not None and (type(number) is not int or number < 1):
            raise ArgumentError(f"{name}: expected a whole number from 1 on, got {number!r}")
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    make = partial(ProjectionHessian, side=side, fit=fit, loss=name, ranked=ranked)
    make()  # which says what is wrong with the settings
    sites = _sites(model, layers, side)
    _warn_of_dropout(model)
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        tasks = [
            _Task.of(site, make(), mean, count, samples, seed)
            for site, (mean, count) in _means(model, batches, mean_images, sites, explicit=layers is not None)
        ]
        take = _take_losses if fit == "sampled" else _take_products
        inputs = model_inputs(model, _endless(batches))
        progress = track(range(sum(task.left for task in tasks)), "projections")
        while pending := [task for task in tasks if task.left]:
            batch = next(inputs)[: max(task.left for task in pending)]
            taken = take(model, batch, measure, pending)
            deque(islice(progress, taken), maxlen=0)  # moves the bar on
    return {task.site.name: task.finished() for task in tasks}


@dataclass
class _Task:
    """The samples of one layer.

    Attributes:
        mean: (D,) of the activation.
        left: how many samples are still to be taken.
    """

    site: Site
    statistic: ProjectionHessian
    mean: Tensor
    left: int
    generator: torch.Generator
    samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(
        cls, site: Site, statistic: ProjectionHessian, mean: Tensor, count: int, samples: int | None, seed: int
    ) -> "_Task":
        dimensions = len(mean)
        left = samples or (dimensions**2 if statistic.fit == "sampled" else dimensions)
        shapes = [(left, dimensions), (left, dimensions if statistic.fit == "local" else 1)]
        require_memory(f"{left:,} samples of layer {site.name!r}", shapes, torch.device("cpu"))
        statistic.layer = site.name
        statistic.update_mean(mean, count)
        return cls(site, statistic, mean, left, torch.Generator().manual_seed(seed))

    def directions(self, count: int) -> Tensor:
        """Random ones, (count, D), float64."""
        rows = torch.randn(count, len(self.mean), generator=self.generator, dtype=torch.float64)
        return F.normalize(rows).to(self.mean.device)

    def take(self, directions: Tensor, values: Tensor) -> int:
        """Keep as many samples as are still to be taken; how many."""
        kept = min(self.left, len(directions))
        self.samples.append((directions[:kept].cpu(), values[:kept].cpu().double()))
        self.left -= kept
        return kept

    def finished(self) -> ProjectionHessian:
        directions, values = zip(*self.samples, strict=True)
        self.statistic.update(torch.cat(directions), torch.cat(values))
        return self.statistic


def _take_losses(model: nn.Module, inputs: Tensor, measure: Loss, tasks: Sequence[_Task]) -> int:
    original, taken = _outputs(model, inputs), 0
    for task in tasks:
        directions = task.directions(len(inputs))
        with projected(task.site, directions, task.mean):
            outputs = _outputs(model, inputs)
        taken += task.take(directions, example_losses(measure, original, outputs))
    return taken


def _take_products(model: nn.Module, inputs: Tensor, measure: Loss, tasks: Sequence[_Task]) -> int:
    """The products h of ``ProjectionHessian``: all layers share the forward and the first backward pass."""
    # Attention's other kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), ExitStack() as hooks:
        opened = [hooks.enter_context(perturbed(task.site, task.directions(len(inputs)), task.mean)) for task in tasks]
        outputs = _outputs(model, inputs)
        losses = example_losses(measure, outputs.detach(), outputs)
        if not losses.requires_grad:
            raise ArgumentError('loss: expected one with a derivative by the outputs for fit="local", got one without')
        found = [made for (made,) in opened]
        epsilons = [made.epsilon for made in found]
        # Zero, but their derivatives are not.
        gradients = torch.autograd.grad(losses.sum(), epsilons, create_graph=True, materialize_grads=True)
        taken = 0
        for task, (epsilon, directions, change), gradient in zip(tasks, found, gradients, strict=True):
            (curved,) = torch.autograd.grad(
                gradient, epsilon, change.detach(), retain_graph=True, materialize_grads=True
            )
            (slope,) = torch.autograd.grad(change, directions, curved)
            directions, loss = directions.detach(), (change.detach() * curved).flatten(1).sum(1, keepdim=True) / 2
            taken += task.take(directions, slope / 2 - loss * directions)
    return taken


def _means(
    model: nn.Module, batches: Batches, images: int, sites: Sequence[Site], *, explicit: bool
) -> list[tuple[Site, tuple[Tensor, int]]]:
    """The mean of each site's activation over so many images and the number of positions; all sites in one pass.

    Sites that a forward does not pass once are an error if they were asked for, or else left out.
    """
    totals: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def add(site: Site, x: Tensor, y: Tensor) -> None:
        mean, count = site.mean(x, y)
        totals[site.name] = totals.get(site.name, 0) + mean * count
        counts[site.name] += count
        calls[site.name] += 1

    seen, once = 0, list(sites)
    for inputs in track(model_inputs(model, batches), "means"):
        calls.clear()
        with ExitStack() as hooks:
            for site in once:
                hooks.enter_context(site.replacing(partial(add, site)))
            _outputs(model, inputs[: images - seen])
        bad = [site for site in once if calls[site.name] != 1]
        if bad and explicit:
            name = bad[0].name
            raise ArgumentError(
                f"layers: expected layers that a forward calls once, and {name!r} is called {calls[name]} times"
            )
        once = [site for site in once if site not in bad]
        seen += len(inputs)
        if seen >= images:
            break
    if not seen:
        raise ArgumentError("batches: expected at least one batch with an example, got none")
    if not once:
        raise ArgumentError("layers: the model calls none of its convolutions and linear layers once in a forward")
    return [(site, (totals[site.name] / counts[site.name], counts[site.name])) for site in once]


def _sites(model: nn.Module, layers: LayerChoice | None, side: Side) -> list[Site]:
    sites = [Site(name, layer, side) for name, layer in choose_layers(model, layers).items()]
    possible = [site for site in sites if site.problem() is None]
    if layers is None and possible:
        return possible
    for site in sites:
        if problem := site.problem():
            raise ArgumentError(f"layers: directions cannot be projected out of layer {site.name!r}: {problem}")
    return sites


def _endless(batches: Batches) -> Iterator[Tensor | Sequence[Tensor]]:
    while True:
        ended = True
        for batch in batches:
            ended = False
            yield batch
        if ended:
            raise ArgumentError(
                "batches: ended before there were enough samples, and cannot be gone through again as a DataLoader or "
                "a list can"
            )


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs.clone())  # since a forward may work in place
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != inputs.shape[:1]:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ArgumentError(
            f"model: expected a tensor with a row for each of {len(inputs)} examples as output, got {found}"
        )
    return outputs


def _warn_of_dropout(model: nn.Module) -> None:
    if any(isinstance(module, _DropoutNd) and module.training and module.p > 0 for module in model.modules()):
        warnings.warn(
            "The model is in training mode and has dropout. It is run in evaluation mode here, since the noise of "
            "dropout would drown the loss of leaving out one direction.",
            PcafastWarning,
            stacklevel=3,
        )

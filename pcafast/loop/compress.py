"""The loop: evaluate, then step by step collect, decide, apply and retrain; it can be killed and gone on with."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pcafast.collect.layers import LayerChoice, choose_layers
from pcafast.errors import ArgumentError, PcafastError, PcafastWarning
from pcafast.loop import checkpoint
from pcafast.loop.batches import Batch
from pcafast.loop.checkpoint import Checkpoint
from pcafast.loop.environment import environment
from pcafast.loop.factorisation import Directions
from pcafast.loop.folder import claim, read_report
from pcafast.loop.method import Ratio, Target
from pcafast.loop.methods import find_method
from pcafast.loop.pruning import Criterion
from pcafast.loop.reporting import build_report
from pcafast.loop.run import Run
from pcafast.loop.seeding import random_states_kept, seed_stage
from pcafast.loop.stages import Stage, all_stages
from pcafast.loop.task import Evaluate, Task, Train, plain
from pcafast.loop.train import DivergenceError
from pcafast.modes import device_of
from pcafast.plan import Budget, Plan
from pcafast.plan.rank_rules import Losses
from pcafast.plan.removal import Rules, Scope
from pcafast.result import PLAN, load, save


class Compressed(NamedTuple):
    """The smaller model, the plan that leads to its structure from the original's, and the report."""

    model: nn.Module
    plan: Plan
    report: dict[str, Any]


def compress(
    model: nn.Module,
    method: str | Criterion | Directions = "pca",
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    test: Iterable[Batch] | Evaluate,
    out: str | Path,
    train: Iterable[Batch] | Train | None = None,
    calibration: Iterable[Batch] | None = None,
    layers: LayerChoice | None = None,
    scope: Scope = "global",
    min_width: int = 1,
    round_to: int = 1,
    compensate_means: bool = False,
    refit: bool = False,
    losses: Losses | None = None,
    steps: int = 1,
    retrain_epochs: int = 0,
    reestimate_batch_norm: bool = True,
    learning_rate: float = 0.02,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Compressed:
    """Make a smaller model, step by step, with retraining in between, and write it with a report into a folder.

    In each step statistics are collected, a plan is made and applied, batch norms are re-estimated and the model is
    retrained. After every epoch all that is needed to go on is written to the folder: killed at any moment, the same
    call goes on from there, and on the CPU ends with the same files, bit for bit, as if it had not been interrupted.

    All random numbers, torch's, numpy's and Python's, are drawn from states that follow from ``seed`` before every
    pass over batches, and so are the orders of a ``DataLoader``, if its workers are not persistent; batches of another
    type may have a method ``set_epoch``, called with a number before every pass. The caller's random states are as
    before afterwards.

    Args:
        model: a classifier; it is left as it is.
        method: ``"pca"`` makes low-rank layers from the covariance of their outputs, ``"pca-input"`` from that of the
            patches they take in; ``"uncentred"``, ``"fisher"``, ``"gradient"`` and ``"greedy"`` by other bases of
            ``pcafast.bases``, the last two the same with ``select`` "magnitude" and "signed", and gradients those of
            the cross-entropy with a label smoothing of 0.1; a ``Directions`` by those of your own. ``"taylor"``,
            ``"rank"`` and ``"l1"`` remove channels by their Taylor scores, the mean rank of their maps, or the L1 norm
            of their filters; a ``Criterion`` does so by scores of your own.
        budget: what the result may cost, as a share of the model. Over the steps the shares fall geometrically.
        ratio: in place of a budget, the share of its full rank that every low-rank layer keeps. Over the steps it falls
            geometrically; factors are fused with those of the step before, so that no layers are added.
        test: batches to evaluate on; or a function of a model, in evaluation mode, that returns a number, the higher
            the better, or an ``Evaluation``.
        out: the folder for plan.json, model.safetensors and report.json.
        train: batches to retrain on with the built-in trainer, a new one in every step; or a function of a model, in
            training mode, and the number of the epoch in the step, from 1 on, that trains the model in place for one
            epoch. What such a function keeps between epochs, such as an optimizer, is not there if the run is gone on
            with in another process.
        calibration: batches for statistics and batch norms, by default those of ``train``.
        layers: which layers to compress, as in ``pcafast.collect``.
        scope: of removal, "global" or "layer", as in ``pcafast.plan_pruning``.
        min_width: channels that every layer keeps at least when channels are removed.
        round_to: number of which widths that shrink become multiples when channels are removed.
        compensate_means: whether what removed channels added on average goes into what follows them.
        refit: whether low-rank factors are fitted front to back to the outputs of the model as each step finds it, see
            ``pcafast.refit``. The method then only chooses the ranks, and batch norms stay.
        losses: what each layer's rank costs, as ``pcafast.rank_losses`` measures it, to choose ranks by in one step.
        steps: how many times to go through it all.
        retrain_epochs: epochs of retraining in every step.
        reestimate_batch_norm: whether batch norms are moved to what they see in the smaller model.
        learning_rate: of the built-in trainer; the highest of a warm-up and a cosine schedule over each step's epochs.
        weight_decay: of the built-in trainer.
        label_smoothing: of the built-in trainer.
        seed: of everything that is random.
        name: of the model, for the report.
        data: what to say of the data in the report. A run is only gone on with if it is the same.
        command: the command that this is a run of, for the report.

    Raises:
        ArgumentError: an argument is wrong, the budget cannot be met, or the folder is of another run.
        PcafastError: the model does not take the batches, or the training diverged.
        FileError: the folder cannot be written, or its checkpoint is damaged.
    """
    folder = Path(out)
    task = Task(
        model=model,
        method=find_method(
            method,
            Rules(scope, min_width, round_to),
            compensate_means=compensate_means,
            refit=refit,
            by_ratio=ratio is not None,
            losses=losses,
        ),
        target=_target(model, budget, ratio),
        test=test,
        train=train,
        calibration=train if calibration is None else calibration,  # type: ignore[arg-type]  # which Task checks
        layers=None if layers is None else tuple(choose_layers(model, layers)),
        steps=steps,
        retrain_epochs=retrain_epochs,
        reestimate_batch_norm=reestimate_batch_norm,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        seed=seed,
    )
    identity = plain("data", {"name": name or type(model).__name__, "data": data, "asked": task.asked()})
    with random_states_kept(*task.loaders):
        found = claim(folder, identity)
        if isinstance(found, dict):
            _warn(f"{folder} holds the result of this very command, so nothing was done again.")
            return Compressed(load(model, folder), Plan.load(folder / PLAN), found)
        return _carried_out(task, folder, identity, command, found)


def _target(model: nn.Module, budget: Budget | None, ratio: float | None) -> Target:
    if (budget is None) == (ratio is None):
        raise ArgumentError(f"expected either a budget or a ratio, got {budget} and {ratio}.")
    if ratio is None:
        assert budget is not None
        return budget
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ArgumentError(f"ratio: expected a share in (0, 1], got {ratio!r}.")
    return Ratio(ratio, model)


def _carried_out(
    task: Task, folder: Path, identity: dict[str, Any], command: str | None, found: Checkpoint | None
) -> Compressed:
    stages = all_stages(task.steps, task.retrain_epochs, task.reestimates)
    here = {**environment(), "device": str(device_of(task.model))}
    seed_stage(task.seed, 0, *task.loaders)
    first = next(iter(task.calibration), None)
    if first is None:
        raise ArgumentError("calibration: expected at least one batch, got none.")
    run = Run(task, first[0][:1].to(device_of(task.model)), found)
    if found is None:
        _rehearse(run, first)
        checkpoint.write(folder, run.checkpoint(identity, here))
    else:
        done = len(run.progress.history)
        _warn(f"Going on with the run in {folder}, of which {done} of {len(stages)} stages are done.")
        with _noted(run.progress.warnings):
            _compare(found.environment, here)
    for number in range(len(run.progress.history), len(stages)):
        seed_stage(task.seed, number + 1, *task.loaders)
        with _noted(run.progress.warnings):
            _perform(run, stages[number], folder)
        checkpoint.write(folder, run.checkpoint(identity, here))
    return _finished(run, folder, {**identity, "command": command}, first)


def _rehearse(run: Run, batch: Batch) -> None:
    """Decide on one batch, for the whole way at once, so that what cannot be done is known before the work begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.decide([batch], run.task.target)


def _perform(run: Run, stage: Stage, folder: Path) -> None:
    try:
        run.perform(stage)
    except DivergenceError as error:
        raise PcafastError(
            f"{error} That is another command, so give it another folder; {folder} keeps the state before this epoch "
            f"({stage})."
        ) from error


def _finished(run: Run, folder: Path, head: dict[str, Any], first: Batch) -> Compressed:
    plan = run.progress.plan
    assert plan is not None, "every run has at least one step"
    save(run.model, plan, folder, {**head, **build_report(run, plan, first[0])})
    checkpoint.remove(folder)
    return Compressed(run.model, plan, read_report(folder) or {})


def _compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = [f"{key} was {then.get(key)} and is now {now[key]}" for key in now if then.get(key) != now[key]]
    if differences:
        _warn(f"The run goes on elsewhere than it began, so its last bits may differ: {'; '.join(differences)}.")


@contextmanager
def _noted(messages: list[str]) -> Iterator[None]:
    """Note each of pcafast's warnings once, whether or not the caller's filters show it."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PcafastWarning)
            yield
    finally:
        for one in caught:
            if issubclass(one.category, PcafastWarning) and str(one.message) not in messages:
                messages.append(str(one.message))
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _warn(message: str) -> None:
    warnings.warn(message, PcafastWarning, stacklevel=4)

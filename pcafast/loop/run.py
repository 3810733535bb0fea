"""A model on its way through the stages of a run."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pcafast.apply import reestimate_batch_norm
from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch
from pcafast.loop.checkpoint import Checkpoint, Progress, state_of
from pcafast.loop.evaluate import Evaluation, evaluate
from pcafast.loop.method import Decision, Ratio, Target
from pcafast.loop.stages import COMPRESSED, REESTIMATED, RETRAINED, Stage
from pcafast.loop.task import Task
from pcafast.loop.train import Trainer
from pcafast.modes import evaluating
from pcafast.plan import Budget
from pcafast.plan.trace import trace
from pcafast.progress import track


class Run:
    """The model as it is after the stages that are done.

    Args:
        task: what to do.
        example: one input, as a batch.
        found: the checkpoint to go on from.
    """

    def __init__(self, task: Task, example: Tensor, found: Checkpoint | None = None) -> None:
        self.task, self.example, self.model = task, example, task.model
        self.progress = Progress() if found is None else found.progress
        self._trainer: Trainer | None = None
        if found is not None and found.progress.plan is not None:
            self.model = found.progress.plan.apply_structure(task.model)
            self.model.load_state_dict(found.model)
            if found.trainer:
                self._trainer = task.new_trainer(self.model)
                self._trainer.load_state_dict(found.trainer)

    def checkpoint(self, identity: dict[str, Any], environment: dict[str, Any]) -> Checkpoint:
        """All that is needed to go on; of the original, which the caller has, nothing."""
        model = {} if self.progress.plan is None else state_of(self.model)
        trainer = {} if self._trainer is None else self._trainer.state_dict()
        return Checkpoint(identity, environment, self.progress, model, trainer)

    def perform(self, stage: Stage) -> None:
        """Do what the stage asks for, and note in the history how the model then does."""
        found: dict[str, Any] = {}
        if stage.kind == COMPRESSED:
            self._compress(stage.step)
        elif stage.kind == REESTIMATED:
            batches = track(self.task.calibration, "re-estimating batch norms")
            reestimate_batch_norm(self.model, batches, new_share=self.task.method.norm_share)
        elif stage.kind == RETRAINED:
            found = {"epoch": stage.epoch, **self._retrain(stage.epoch)}
        costs = {
            "params": sum(parameter.numel() for parameter in self.model.parameters()),
            "macs": trace(self.model, self.example).macs,
        }
        self.progress.history.append({"step": stage.step, "stage": stage.kind, **found, **self._judgement(), **costs})

    def decide(self, batches: Iterable[Batch], target: Target) -> Decision:
        """Collect statistics of the model as it is, and plan for a share of its cost."""
        chosen = None if self.task.layers is None else self._is_chosen
        return self.task.method.decide(self.model, batches, chosen, target, self.example)

    def _is_chosen(self, name: str, module: nn.Module) -> bool:
        """Whether the layer, or that of which it is a factor, was asked for."""
        names = {name, name.rpartition(".")[0]}
        return not any(module.children()) and not names.isdisjoint(self.task.layers or ())

    def _compress(self, step: int) -> None:
        progress = self.progress
        plan, figures = self.decide(self.task.calibration, self._target(step))
        plan = self.task.method.fitted(plan, self.model, self.task.calibration)
        self.model = plan.apply(self.model)
        if progress.plan is None:
            progress.plan, progress.figures = replace(plan, tensors=None), figures
        else:
            progress.plan = progress.plan.then(plan)
        progress.plan.asked |= self.task.asked_share  # of all steps together

    def _target(self, step: int) -> Target:
        """What the step may keep of the model as it is: the shares of the original fall geometrically."""
        target, plan, way = self.task.target, self.progress.plan, step / self.task.steps
        if isinstance(target, Ratio):
            return replace(target, share=target.share**way)
        now = Budget(**{target.quantity: target.share**way})
        if plan is None:
            return now
        reached = plan.reached[target.quantity]
        return Budget(**{target.quantity: min(1.0, now.allowance(reached["before"]) / reached["after"])})

    def _retrain(self, epoch: int) -> dict[str, float]:
        train = self.task.train
        if callable(train):
            with evaluating(self.model):  # for the modes afterwards
                self.model.train()
                train(self.model, epoch)
            return {}
        self._trainer = self._trainer or self.task.new_trainer(self.model)
        loss = self._trainer.epoch(track(train or (), f"retraining, epoch {epoch}"))
        if epoch == self.task.retrain_epochs:
            self._trainer = None
        return {"training_loss": loss}

    def _judgement(self) -> dict[str, float]:
        test = self.task.test
        if callable(test):
            with evaluating(self.model):
                found = test(self.model)
        else:
            found = evaluate(self.model, track(test, "evaluating"))
        if isinstance(found, Evaluation):
            return {"accuracy": found.accuracy, **found._asdict()}
        try:
            return {"score": float(found)}
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"test: expected a function that returns a number, got {found!r} from it.") from error

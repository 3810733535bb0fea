"""What a run consists of: stages, after each of which it can be stopped and gone on with."""

from typing import NamedTuple

ORIGINAL, COMPRESSED, REESTIMATED, RETRAINED = "original", "compressed", "batch norm re-estimated", "retrained"


class Stage(NamedTuple):
    """One stage; the epoch is that in the step, from 1 on, and 0 where there is none."""

    step: int
    kind: str
    epoch: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.kind}" + (f", epoch {self.epoch}" if self.epoch else "")


def all_stages(steps: int, retrain_epochs: int, reestimate: bool) -> list[Stage]:
    """The stages of a run, in their order."""
    stages = [Stage(0, ORIGINAL)]
    for step in range(1, steps + 1):
        stages.append(Stage(step, COMPRESSED))
        stages += [Stage(step, REESTIMATED)] * reestimate
        stages += [Stage(step, RETRAINED, epoch) for epoch in range(1, retrain_epochs + 1)]
    return stages

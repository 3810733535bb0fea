"""Where the time of a forward goes, layer by layer."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcafast.collect.layers import LayerChoice, choose_layers
from pcafast.errors import ArgumentError
from pcafast.loop.measure import LONG_ENOUGH, WARM_UP
from pcafast.modes import device_of, evaluating
from pcafast.progress import track


class LayerTime(NamedTuple):
    """Of one layer: its type, the seconds of its calls in a forward, their share of the whole, and its parameters."""

    layer: str
    type: str
    seconds: float
    share: float
    params: int


def time_layers(
    model: nn.Module, batch: Tensor, *, layers: LayerChoice | None = None, repeats: int = 30
) -> list[LayerTime]:
    """Time the layers of a model inside its forward, in evaluation mode.

    Args:
        model: its modes and hooks are as before afterwards.
        batch: inputs (N, ...).
        layers: as for ``pcafast.collect``; None takes all convolutions and linear layers.
        repeats: seconds are the median, and shares the mean, of as many forwards after a few to warm up, or of fewer
            where a forward takes long.

    Returns:
        In the order in which the forward calls them first; at the end, with no seconds, those that it does not call.

    Raises:
        ArgumentError: no layer is chosen, or there are no repeats.
    """
    if repeats < 1:
        raise ArgumentError(f"repeats: expected at least one forward to time, got {repeats}.")
    chosen, device = choose_layers(model, layers), device_of(model)
    batch = batch.to(device)
    stopwatch = _Stopwatch(device)
    forwards: list[tuple[float, dict[str, float]]] = []
    begin = time.perf_counter()
    with evaluating(model), torch.inference_mode(), stopwatch.on(chosen):
        for count in track(range(WARM_UP + repeats), "timing layers"):
            if count > 2 * WARM_UP and time.perf_counter() - begin > LONG_ENOUGH:
                break
            forwards.append(stopwatch.forward(model, batch))
    measured = forwards[WARM_UP:]
    return [
        LayerTime(
            name,
            type(chosen[name]).__name__,
            statistics.median(seconds.get(name, 0.0) for _, seconds in measured),
            statistics.mean(seconds.get(name, 0.0) / whole for whole, seconds in measured),
            sum(parameter.numel() for parameter in chosen[name].parameters()),
        )
        for name in dict.fromkeys([*measured[0][1], *chosen])
    ]


class _Stopwatch:
    """Marks the beginning and the end of every call, and takes the times only when the forward is over.

    On CUDA the marks are events, so that the forward runs as it always does, without waiting at every layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[Any]] = {}  # of a layer that is called twice: begin, end, begin, end

    @contextmanager
    def on(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on the layers inside the block."""
        handles = []

        def mark(name: str, *_: Any) -> None:
            self._marks.setdefault(name, []).append(self._now())

        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(partial(mark, name)))
                handles.append(layer.register_forward_hook(partial(mark, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, model: nn.Module, batch: Tensor) -> tuple[float, dict[str, float]]:
        """Seconds of one whole forward, and of every layer in it, in the order of their first calls."""
        self._marks.clear()
        whole = [self._now()]
        model(batch)
        whole.append(self._now())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return _seconds(whole), {name: _seconds(marks) for name, marks in self._marks.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(marks: Sequence[Any]) -> float:
    """Between begin and end, of all calls."""
    return sum(_between(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True))


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1000
    return float(end - begin)

"""What a run found, as plain data: the content of report.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pcafast.loop.checkpoint import Progress
from pcafast.loop.environment import environment
from pcafast.loop.measure import measure
from pcafast.loop.method import Method
from pcafast.loop.run import Run
from pcafast.plan import Plan, Prune
from pcafast.plan.layers import channels, is_factorisable
from pcafast.plan.trace import Trace, trace
from pcafast.result import serialised

LATENCY_BATCH = 64
"""Images in the batch whose latency is measured, if the calibration batches have as many."""


def build_report(run: Run, plan: Plan, batch: Tensor) -> dict[str, Any]:
    """What is to be said of a run that has done all its stages; latencies are measured now."""
    task, progress = run.task, run.progress
    spectral = task.method.figures == "spectra"
    layers = _layers(task.model, run.model, run.example, "rank" if spectral else "channels")
    names = {layer["layer"] for layer in layers}
    before, after = _before_and_after(run, batch[:LATENCY_BATCH])
    report = {
        "environment": environment(),
        "reached": plan.reached,
        "before": before,
        "after": after,
        "history": progress.history,
        "layers": layers,
        task.method.figures: _spectra(progress, layers) if spectral else _scores(task.method, progress, plan),
        "skipped": {name: reason for name, reason in plan.skipped.items() if name in names},
        "warnings": progress.warnings,
    }
    return dict(finite(report))


def _before_and_after(run: Run, batch: Tensor) -> list[dict[str, float]]:
    models, history = (run.task.model, run.model), run.progress.history
    return [
        {key: entry[key] for key in ("score", "accuracy", "correct", "images", "loss") if key in entry}
        | {
            "params": costs.params,
            "macs": costs.macs,
            "latency_seconds": costs.seconds,
            "latency_batch_size": costs.batch_size,
            "file_bytes": len(serialised(model)),
        }
        for model, entry, costs in zip(models, (history[0], history[-1]), measure(*models, batch=batch), strict=True)
    ]


def _layers(original: nn.Module, small: nn.Module, example: Tensor, unit: str) -> list[dict[str, Any]]:
    """The original's linear and convolution layers in the order of the forward, each with what has become of it."""
    traces = [(model, trace(model, example)) for model in (original, small)]
    rows = []
    for name in traces[0][1].positions:
        old, new = (_costs(model, name, traced) for model, traced in traces)
        params, macs = ({"before": old[key], "after": new[key]} for key in ("params", "macs"))
        kind = type(original.get_submodule(name)).__name__
        head = {"layer": name, "type": kind, "unit": unit, "before": old["width"], "after": new["width"]}
        rows.append({**head, "params": params, "macs": macs})
    return rows


def _costs(model: nn.Module, name: str, traced: Trace) -> dict[str, int]:
    """Of a layer, or of the factors that stand in its place; the width is that of the first."""
    inside = {f"{name}.{child}".rstrip("."): part for child, part in model.get_submodule(name).named_modules()}
    parts = {path: part for path, part in inside.items() if is_factorisable(part)}
    return {
        "width": channels(next(iter(parts.values())), "output"),
        "params": sum(parameter.numel() for part in parts.values() for parameter in part.parameters()),
        "macs": sum(part.weight.numel() * traced.positions.get(path, 0) for path, part in parts.items()),
    }


def _spectra(progress: Progress, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Eigenvalues of the original's covariances, each with the rank that the layer has in the end."""
    ranks = {row["layer"]: row["after"] for row in layers}
    return [
        {"layer": layer, "eigenvalues": values, "rank": ranks[layer]}
        for layer, values in progress.figures.items()
        if layer in ranks
    ]


def _scores(method: Method, progress: Progress, plan: Plan) -> list[dict[str, Any]]:
    """Scores of the original's channels, each layer with the channels that are left in the end."""
    return [
        {"layer": layer, "criterion": method.settings["method"], "values": values, "kept": _kept(layer, values, plan)}
        for layer, values in progress.figures.items()
    ]


def _kept(layer: str, values: Sequence[float], plan: Plan) -> list[int]:
    kept = list(range(len(values)))
    for action in plan.actions:
        if isinstance(action, Prune) and action.layer == layer and action.outputs is not None:
            kept = [kept[index] for index in action.outputs]
    return kept


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""How much memory each side needs to take in a batch, beside the batch, in a process of its own.

A side is first used on a small batch, so that the libraries it calls are there; then its state and the batch are made,
and what one update adds to the resident memory is measured.

    python benchmarks/memory.py
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import covariance_case
import patch_covariance_case
import results
import torch
from cases import Side

from pcafast.progress import track

SHAPES = [(4, 64, 224, 224), (1, 64, 224, 224), (32, 128, 28, 28), (32, 512, 7, 7)]
SMALL = (2, 16, 8, 8)
SIDES: dict[str, Callable[[tuple[int, ...]], dict[str, Callable[[], Side]]]] = {
    "covariance": lambda shape: covariance_case.sides(
        covariance_case.outputs(shape, "float32", "channels first"), covariance_case.RECIPES
    ),
    "patch covariance": lambda shape: patch_covariance_case.sides(
        patch_covariance_case.inputs(shape, "float32", "channels first"), 1
    ),
}
"""By operator and shape of the batch: what makes each side."""


def measured(operator: str, shape: tuple[int, ...], side: str, threads: int) -> dict[str, int]:
    """Bytes of the state, and of what an update needs besides, in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps([operator, shape, side, threads])]
    # So that what is freed is given back at once, and not taken again unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_update(operator: str, shape: tuple[int, ...], side: str, threads: int) -> dict[str, int]:
    """In the fresh process."""
    torch.set_num_threads(threads)
    SIDES[operator](SMALL)[side]().update()
    made = SIDES[operator](shape)[side]()
    for part in made.state:
        part.fill_(0)  # or it would be allocated as it is used
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    made.update()
    return {"state": sum(part.nbytes for part in made.state), "extra": resident("VmHWM") - before}


def resident(what: str) -> int:
    """VmRSS, bytes of memory now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def everything() -> dict[str, list[dict[str, Any]]]:
    """Every side on every shape with one thread, and pcafast with two."""
    missing = patch_covariance_case.absent()
    jobs = [(operator, shape) for operator in SIDES for shape in SHAPES]
    rows: dict[str, list[dict[str, Any]]] = {operator: [] for operator in SIDES}
    for operator, shape in track(jobs, "measuring memory"):
        chosen = [name for name in SIDES[operator](SMALL) if name not in missing]
        bytes_needed = {name: measured(operator, shape, name, 1) for name in chosen}
        bytes_needed["pcafast, 2 threads"] = measured(operator, shape, "pcafast", 2)
        rows[operator].append({"shape": shape, "bytes": bytes_needed})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args().one
    if given:
        operator, shape, side, threads = given
        print(json.dumps(one_update(operator, tuple(shape), side, threads)))
    else:
        results.write("memory", everything())

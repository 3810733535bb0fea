"""Kills `pcafast compress` with -9 at random moments and compares what the resumed command leaves behind.

ResNet-20, all four methods in turn, two steps with two epochs of retraining each, on a part of CIFAR-10. The files must
be those of the command that ran through, bit for bit; of report.json, all but measured times.
PCAFAST_DATA names a folder with cifar10-{train,test}.npz and resnet20-12fca82f.th.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import results

from pcafast.progress import track

DATA = Path(os.environ["PCAFAST_DATA"])
METHODS = ("pca", "taylor", "rank", "l1")
IMAGES = {"train": 768, "test": 512}
SHARES = (0.3, 0.95)
"""The earliest and the latest kill, as shares of the time that the whole command takes; it begins with imports."""


def start(work: Path, method: str, folder: Path) -> subprocess.Popen[bytes]:
    """The command, running."""
    arguments = [
        *("compress", "resnet20", "--weights", DATA / "resnet20-12fca82f.th", "--data", work / "{split}.npz"),
        *("--method", method, "--budget", "macs=0.5", "--steps", 2, "--retrain-epochs", 2, "--images", 256),
        *("--batch-size", 64, "--out", folder),
    ]
    command = [sys.executable, "-c", "from pcafast.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the command failed: {errors.decode()}")


def content(folder: Path) -> dict[str, Any]:
    """SHA-256 of the files, and the report without measured times and without the folder's name."""
    report = json.loads((folder / "report.json").read_text())
    for side in ("before", "after"):
        del report[side]["latency_seconds"]
    del report["command"]
    files = [path for path in folder.iterdir() if path.name not in ("report.json", "report.html")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {"report": report}


def killed(process: subprocess.Popen[bytes], moment: float) -> bool:
    """Kill the command after so many seconds; whether it was still running then."""
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def kills(number: int, work: Path) -> dict[str, Any]:
    """Every kill, and whether the result was the same."""
    for split, images in IMAGES.items():
        with np.load(DATA / f"cifar10-{split}.npz") as whole:
            chosen = np.random.default_rng(0).permutation(len(whole["labels"]))[:images]
            np.savez(work / f"{split}.npz", images=whole["images"][chosen], labels=whole["labels"][chosen])
    expected, seconds = {}, {}
    for method in track(METHODS[:number], "commands that run through"):
        begin = time.perf_counter()
        finish(start(work, method, work / method))
        seconds[method] = time.perf_counter() - begin
        expected[method] = content(work / method)
    moments, rows = random.Random(0), []
    for kill in track(range(number), "killed and resumed"):
        method, folder = METHODS[kill % len(METHODS)], work / f"killed {kill}"
        moment = moments.uniform(*SHARES) * seconds[method]
        while not killed(start(work, method, folder), moment):
            # It was done before, since the machine has got faster.
            shutil.rmtree(folder)
            moment *= 0.7
        left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        finish(start(work, method, folder))
        rows.append(
            {
                "method": method,
                "killed_after_seconds": moment,
                "left_in_the_folder": left,
                "identical": content(folder) == expected[method],
            }
        )
    identical = sum(row["identical"] for row in rows)
    return {"kills": number, "identical": identical, "seconds_of_a_whole_run": seconds, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    count = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        found = kills(count, Path(folder))
    results.write("kills", found)
    print(f"{found['identical']} of {count} results are identical")
    sys.exit(found["identical"] != count)

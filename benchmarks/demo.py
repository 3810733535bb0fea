"""What `pcafast demo` reaches, and how long the whole command takes, for several seeds."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

from pcafast.cli.demo import METHODS

SEEDS = range(5)


def run(seed: int) -> dict[str, Any]:
    """Accuracy and share of MACs of every method, and seconds from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.argv[1:] = ['demo', '--seed', '{seed}', '--out', {folder!r}]"
        start = time.perf_counter()
        command = [sys.executable, "-c", f"{code}; from pcafast.cli import main; main()"]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        reports = {method: json.loads((Path(folder) / method / "report.json").read_text()) for method in METHODS}
    return {
        "trained": reports["pca"]["before"]["accuracy"],
        **{method: report["after"]["accuracy"] for method, report in reports.items()},
        "largest_share_of_macs": max(report["reached"]["macs"]["share"] for report in reports.values()),
        "seconds": seconds,
    }


if __name__ == "__main__":
    results.write("demo", {str(seed): run(seed) for seed in SEEDS})

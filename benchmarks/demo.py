"""What `pcafast demo` reaches, and how long the whole command takes, for several seeds."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results

SEEDS = range(5)


def run(seed: int) -> dict[str, float]:
    """Accuracies of the three rows, shares of MACs, and seconds from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.argv[1:] = ['demo', '--seed', '{seed}', '--out', {folder!r}]"
        start = time.perf_counter()
        command = [sys.executable, "-c", f"{code}; from pcafast.cli import main; main()"]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        report = json.loads((Path(folder) / "report.json").read_text())
    rows = {name: row["accuracy"] for name, row in report.items() if isinstance(row, dict) and "accuracy" in row}
    return {**rows, "share_of_macs": report["retrained"]["macs"] / report["trained"]["macs"], "seconds": seconds}


if __name__ == "__main__":
    results.write("demo", {str(seed): run(seed) for seed in SEEDS})

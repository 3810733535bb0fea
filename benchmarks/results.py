"""Result files: what was measured, where, by which command."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pcafast.loop.environment import write_results

FOLDER = Path(__file__).parent / "results"


def write(name: str, results: dict[str, Any], path: Path | None = None) -> None:
    """Write benchmarks/results/NAME.json, or another file."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    target = path or FOLDER / f"{name}.json"
    write_results(target, command, results)
    print(f"written to {target}")


def read(name: str) -> dict[str, Any]:
    """The results of benchmarks/results/NAME.json."""
    results: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())["results"]
    return results

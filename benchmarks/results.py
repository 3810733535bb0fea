"""Result files: what was measured, where, by which command."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pcafast.loop.environment import environment

FOLDER = Path(__file__).parent / "results"


def write(name: str, results: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json."""
    FOLDER.mkdir(exist_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content = {"command": command, "environment": environment(), "results": results}
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {path}")


def read(name: str) -> dict[str, Any]:
    """The results of benchmarks/results/NAME.json."""
    results: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())["results"]
    return results

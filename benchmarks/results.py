"""Result files: what was measured, where, by which command."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pcafast.files import write_atomically
from pcafast.loop.environment import environment

FOLDER = Path(__file__).parent / "results"


def write(name: str, results: dict[str, Any], path: Path | None = None) -> None:
    """Write benchmarks/results/NAME.json, or another file."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = json.dumps({"command": command, "environment": environment(), "results": results}, indent=2) + "\n"
    target = path or FOLDER / f"{name}.json"
    write_atomically({target: lambda file: file.write_text(text)})
    print(f"written to {target}")


def read(name: str) -> dict[str, Any]:
    """The results of benchmarks/results/NAME.json."""
    results: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())["results"]
    return results

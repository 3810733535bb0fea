"""What a run was made with, and the files of results that say it."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pcafast import native
from pcafast.files import write_atomically


def environment() -> dict[str, Any]:
    """Versions and devices, as reports record them."""
    return {
        "pcafast": metadata.version("pcafast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": native.MISSING is None,
    }


def write_results(path: Path, command: str, results: dict[str, Any]) -> None:
    """Write what was measured, by which command and with what, as JSON.

    Raises:
        FileError: the file cannot be written.
    """
    text = json.dumps({"command": command, "environment": environment(), "results": results}, indent=2) + "\n"
    write_atomically({path: lambda file: file.write_text(text)})


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor()

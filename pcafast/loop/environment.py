"""What a run was made with."""

import platform
import sys
from importlib import metadata
from typing import Any

import torch

from pcafast import native


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


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor()

"""The native library: loading it, and what stands in for it where there is none.

``operators`` is the way to every operator: ``torch.ops.pcafast`` if the library is loaded, else the module
``pcafast.reference``, whose functions have the same signatures.
"""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcafast import reference
from pcafast.errors import PcafastWarning

OPERATORS = (
    "covariance_update_",
    "patch_covariance_update_",
    "taylor_update_",
    "channel_moments_update_",
    "feature_map_rank",
)
REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir PATH_OR_NAME_OF_PCAFAST"


def build_description() -> dict[str, Any] | None:
    """What the library was built against (torch, cuda, cuda_reason, cuda_architectures), or None if not built."""
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return None
    description: dict[str, Any] = json.loads(path.read_text())
    return description


def _load() -> str | None:
    """Load the library and return None, or the reason why there is none."""
    built = build_description()
    if built is None:
        return f"it was not built when pcafast was installed. To build it: {REBUILD}"
    # The C++ interface of torch changes with its minor version; a mismatch may crash instead of failing to load.
    if built["torch"] != torch.__version__:
        return (
            f"it was built against torch {built['torch']} and this is torch {torch.__version__}. "
            f"To build it anew: {REBUILD}"
        )
    try:
        importlib.import_module("pcafast._C")
    except ImportError as error:
        return f"it does not load ({error}). To build it anew: {REBUILD}"
    return None


def _fake_feature_map_rank(x: Tensor, rtol: float, atol: float) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _lend_reference_to_cuda() -> None:
    """Operators without a CUDA kernel of their own run the reference there."""
    for name in OPERATORS:
        if not has_kernel(name, "CUDA"):
            torch.library.register_kernel(f"pcafast::{name}", "cuda", getattr(reference, name))


def has_kernel(name: str, backend: str) -> bool:
    """Whether the library has a kernel of its own for an operator; ``backend`` is CPU or CUDA."""
    return MISSING is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"pcafast::{name}", backend)


MISSING = _load()
"""Why the native library is not in use, or None if it is."""

operators: Any = torch.ops.pcafast if MISSING is None else reference

if MISSING is None:
    OWN_CUDA_KERNELS = tuple(name for name in OPERATORS if has_kernel(name, "CUDA"))
    # The others return nothing and need none.
    torch.library.register_fake("pcafast::feature_map_rank", _fake_feature_map_rank)
    _lend_reference_to_cuda()
else:
    OWN_CUDA_KERNELS = ()
    warnings.warn(
        f"pcafast's native library is not in use; everything runs slowly in plain torch, because {MISSING}",
        PcafastWarning,
        stacklevel=2,
    )

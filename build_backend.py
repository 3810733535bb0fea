"""The setuptools build backend, building against the torch that is already installed, if one is.

pip builds in an isolated environment. Naming torch as a build requirement would download a second copy there,
perhaps of another version than the one pcafast is going to run with; so the installed one is made visible.
"""

import sys
import sysconfig
from importlib.machinery import PathFinder
from typing import Any

_INSTALLED = list(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
_REQUIRED = ["torch"]
if PathFinder.find_spec("torch", _INSTALLED):
    sys.path.extend(path for path in _INSTALLED if path not in sys.path)
    _REQUIRED = []

from setuptools.build_meta import *  # noqa: E402, F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """torch, unless it is installed; the rest stands in pyproject.toml."""
    return _REQUIRED


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel

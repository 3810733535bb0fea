"""pcafast on a machine that has torch, but not all else that the package depends on."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent


def import_pcafast() -> None:
    """Import the repository's package, or if that fails make those of its modules importable that need torch only."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        importlib.import_module("pcafast")
    except ModuleNotFoundError as error:
        print(f"{error}: only the operators can be used")
        for name in ("pcafast", "pcafast.loop"):
            package = ModuleType(name)
            package.__path__ = [str(REPOSITORY.joinpath(*name.split(".")))]
            sys.modules[name] = package

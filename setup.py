"""Builds the native operators. Everything else about the package stands in pyproject.toml.

PCAFAST_CUDA=auto (the default) builds the CUDA kernels when a CUDA compiler of torch's major version is found,
1 insists on it, 0 leaves them out. TORCH_CUDA_ARCH_LIST chooses the architectures; without it those of the
visible GPUs are built, or a short list with PTX for newer ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def pip_cuda() -> Path:
    """Where the pip packages that torch depends on keep CUDA's compiler, headers and libraries."""
    major = (torch.version.cuda or "0").split(".")[0]
    return Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{major}"


def find_nvcc() -> Path | None:
    """The CUDA compiler of CUDA_HOME, of the PATH, of the toolkit's usual place, or of the pip packages."""
    wished = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in wished]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found]
    candidates += [Path("/usr/local/cuda/bin/nvcc"), pip_cuda() / "bin" / "nvcc"]
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's folder; the nvcc on the PATH may be a script that calls the real one."""
    printed = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    here = re.search(r"_HERE_=(.+)", printed)
    return Path(here.group(1)).parent if here else nvcc.resolve().parent.parent


def why_no_cuda(nvcc: Path | None) -> str | None:
    """What keeps the CUDA kernels from being built, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if nvcc is None:
        return "no CUDA compiler was found; put nvcc on the PATH or set CUDA_HOME"
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", printed)
    wanted = torch.version.cuda.split(".")[0]
    if release is None or release.group(1) != wanted:
        return f"{nvcc} is not of CUDA {wanted}, which torch {torch.__version__} needs; install that toolkit"
    return None


def with_cuda(nvcc: Path | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason."""
    wish = os.environ.get("PCAFAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"PCAFAST_CUDA: expected auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return False, "left out by PCAFAST_CUDA=0"
    problem = why_no_cuda(nvcc)
    if problem and wish == "1":
        raise SystemExit(f"PCAFAST_CUDA=1, but {problem}.")
    return problem is None, problem or f"compiled by {nvcc}"


def native_extension(nvcc: Path | None, cuda: bool) -> cpp_extension.CppExtension:
    """The extension module pcafast._C."""
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    cxx = ["-O3", "-Wall", "-Wno-psabi", "-fvisibility=hidden", "-fno-math-errno"]
    if sys.platform == "linux":  # as torch itself is built there, whose at::parallel_for is made of macros
        cxx.append("-fopenmp")
    if not cuda:
        return cpp_extension.CppExtension("pcafast._C", sources, extra_compile_args={"cxx": cxx})

    cpp_extension.CUDA_HOME = str(toolkit_of(nvcc))
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
    return cpp_extension.CUDAExtension(
        "pcafast._C",
        sources + sorted(str(path) for path in Path("csrc/cuda").glob("*.cu")),
        define_macros=[("PCAFAST_WITH_CUDA", None)],
        # After the toolkit's own: a plain toolkit lacks some, and minor versions may differ.
        library_dirs=[str(pip_cuda() / "lib")],
        extra_compile_args={
            "cxx": [*cxx, f"-idirafter{pip_cuda() / 'include'}"],
            "nvcc": ["-O3"],
        },
    )


class BuildNative(cpp_extension.BuildExtension):
    """Also writes down what the library was built against, which must be known before it is loaded."""

    def run(self) -> None:
        """Build, then describe the build."""
        super().run()
        description = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if CUDA else None,
            "cuda_reason": REASON,
            "cuda_architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", "those of the visible GPUs") if CUDA else None,
        }
        Path("pcafast/_build.json").write_text(json.dumps(description, indent=2) + "\n")
        if not self.inplace:
            self.copy_file("pcafast/_build.json", str(Path(self.build_lib) / "pcafast" / "_build.json"))


NVCC = find_nvcc()
CUDA, REASON = with_cuda(NVCC)
print(f"pcafast: CUDA kernels {'on' if CUDA else 'off'}: {REASON}")
setup(ext_modules=[native_extension(NVCC, CUDA)], cmdclass={"build_ext": BuildNative})

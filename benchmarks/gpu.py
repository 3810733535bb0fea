"""Everything that needs a GPU, in one run of at most eight minutes: build, roofline, timings, tests on the device.

Needs python3 with torch 2.11 or newer, and nvcc; for the tests pytest and hypothesis, for the section hrank all that
pcafast depends on. Every section is a process of its own, so that none takes the others with it, and the results are
written after each.

    python benchmarks/gpu.py [--out FILE] [--sections NAME ...]
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bare

MEASURED = (
    *("kernels", "roofline", "graphs", "covariance", "patch_covariance"),
    *("rank", "taylor", "moments", "hrank"),
)
SECONDS, LONGEST = 480, 180
"""Of the whole run; and of one section, so that one that hangs leaves time for the others."""


def command(section: str, arguments: argparse.Namespace, result: Path) -> list[str]:
    """Of one section, to be run in the repository's folder."""
    if section == "build":
        # With the metadata that pcafast finds its version in.
        return [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"]
    if section == "tests":
        patterns = ("test_operators.py", "test_functional.py", "test_rank*.py", "test_cuda_*.py")
        tests = [str(path) for pattern in patterns for path in sorted(bare.REPOSITORY.glob(f"tests/{pattern}"))]
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "cuda and not cpu"]
    options = ["--device", arguments.device, "--out", str(result), *(["--tiny"] if arguments.tiny else [])]
    return [sys.executable, __file__, "--only", section, *options]


def run(section: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a section found, or the end of what it said; and how long it took."""
    begin = time.perf_counter()
    limit = max(min(seconds, LONGEST), 1)
    environment = {**os.environ, "PCAFAST_CUDA": "1", "PYTHONPATH": str(bare.REPOSITORY)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        result = Path(folder) / "result.json"
        try:
            process = subprocess.run(
                command(section, arguments, result),
                cwd=bare.REPOSITORY,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} seconds"
        said.seek(0)
        tail = said.read().replace(str(bare.REPOSITORY), ".").splitlines()[-25:]
        kept = tail[-1:] if status == 0 else tail
        done: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - begin, "said": kept}
        if result.exists():
            done["found"] = json.loads(result.read_text())
    print(f"== {section}: status {status}, {done['seconds']:.0f} s", *tail, sep="\n", flush=True)
    return done


def main(arguments: argparse.Namespace) -> None:
    """Run the sections in turn, and write what they found after each."""
    end = time.monotonic() + SECONDS
    done: dict[str, Any] = {}
    for section in arguments.sections:
        done[section] = run(section, arguments, end - time.monotonic())
        if section == arguments.sections[0]:
            bare.import_pcafast()  # as the build, which comes first, has left it
        results = importlib.import_module("results")
        results.write("gpu", done, arguments.out)
    sys.exit(any(one["status"] != 0 for one in done.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="instead of results/gpu.json")
    parser.add_argument("--sections", nargs="+", default=["build", *MEASURED, "tests"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small inputs, only to see that everything runs")
    parser.add_argument("--only", help="this section, in this process")
    given = parser.parse_args()
    if given.only:
        bare.import_pcafast()
        sections = importlib.import_module("gpu_sections").SECTIONS
        given.out.write_text(json.dumps(sections[given.only](given.device, given.tiny)))
    else:
        main(given)

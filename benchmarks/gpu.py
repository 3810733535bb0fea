"""Everything that needs a GPU: build, ceilings, timings, the tests on the device, compute-sanitizer.

Needs python3 with torch 2.11 or newer and nvcc; for the section training torchvision, for hrank all that pcafast
depends on but torch-pruning, for the tests pytest, hypothesis and what else they import. Every section is a process of
its own, so that none takes the others with it, and the results are written after each.

A run ends within ten minutes, most valuable sections first; all of them take a little longer. A second run writes the
rest into the same file, where sections that are not run again stay, if they are of the same kernels and GPU:

    python benchmarks/gpu.py [--out FILE]
    python benchmarks/gpu.py [--out FILE] --sections build tests memcheck racecheck initcheck synccheck
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bare

MEASURED = (
    *("kernels", "roofline", "graphs", "covariance", "patch_covariance"),
    *("rank", "taylor", "moments", "training", "hrank"),
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS, LONGEST = 570, 180
"""Of the whole run; and of one section, so that one that hangs leaves time for the others."""

WORKERS = 8  # of the tests: each file goes to one, since files compile what they test
SETTINGS = {
    "tests": {"OMP_NUM_THREADS": "2"},
    # Every tensor in an allocation of its own, so that what is beside it is out of bounds.
    **{tool: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for tool in SANITIZERS},
}
"""Of the environment, by section."""


def kernels_digest(*tools: str) -> str:
    """SHA-256 of the CUDA sources, those that call them, and these files: it says what kernels results are of."""
    digest = hashlib.sha256()
    patterns = ("csrc/cuda/*", "csrc/*.h", "csrc/*.cpp", *tools)
    for path in sorted(path for pattern in patterns for path in bare.REPOSITORY.glob(pattern)):
        digest.update(f"{path.relative_to(bare.REPOSITORY).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def command(section: str, arguments: argparse.Namespace, result: Path) -> list[str]:
    """Of one section, to be run in the repository's folder."""
    if section == "build":
        # With the metadata that pcafast finds its version in.
        return [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"]
    if section == "tests":
        return tests(arguments.device)
    if section in SANITIZERS:
        script = [sys.executable, "benchmarks/gpu_launches.py", "--device", arguments.device]
        return script if arguments.device == "cpu" else [*sanitizer(section), *script]
    options = ["--device", arguments.device, "--out", str(result), *(["--tiny"] if arguments.tiny else [])]
    return [sys.executable, __file__, "--only", section, *options]


def tests(device: str) -> list[str]:
    """Of the whole suite those that run on the device; in parallel where pytest-xdist is there."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "tests"]
    parallel = ["-n", str(WORKERS), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    return [*pytest, *parallel, "-k", "cuda and not cpu" if device == "cuda" else "cpu and not cuda"]


def sanitizer(tool: str) -> list[str]:
    # What torch's kernels write is known to initcheck only if it watches them as well.
    chosen = [] if tool == "initcheck" else ["--kernel-name", "kns=pcafast"]
    watched = ["--target-processes", "application-only", *chosen]
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "10", *watched]


def run(section: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    """What a section found, or the end of what it said; and how long it took."""
    begin = time.perf_counter()
    path = os.pathsep.join([str(bare.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PCAFAST_CUDA": "1", "PYTHONPATH": path, **SETTINGS.get(section, {})}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        result = Path(folder) / "result.json"
        status = status_of(command(section, arguments, result), environment, said, limit)
        said.seek(0)
        tail = said.read().replace(str(bare.REPOSITORY), ".").splitlines()[-60:]
        kept = tail[-1:] if status == 0 else tail
        done: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - begin, "said": kept}
        if result.exists():
            done["found"] = json.loads(result.read_text())
    print(f"== {section}: status {status}, {done['seconds']:.0f} s", *tail[-25:], sep="\n", flush=True)
    return done


def status_of(command: list[str], environment: dict[str, str], said: Any, limit: float) -> int | str:
    """A process's exit status, or why it has none."""
    options: dict[str, Any] = {"cwd": bare.REPOSITORY, "env": environment, "stdout": said, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, start_new_session=True, **options)
    except FileNotFoundError:
        return f"not run: there is no {command[0]} on the PATH"
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.wait()
        return f"stopped after {limit:.0f} seconds"


def earlier(path: Path, digest: str) -> dict[str, Any]:
    """The sections in a file of results, if they are of these kernels and this GPU."""
    if not path.exists():
        return {}
    file = json.loads(path.read_text())
    made_on, here = file["environment"]["gpu"], importlib.import_module("pcafast.loop.environment").environment()["gpu"]
    same = (file["results"].get("kernels_digest"), made_on) == (digest, here)
    return file["results"] if same else {}


def main(arguments: argparse.Namespace) -> None:
    """Run the sections in turn, and write what they found after each."""
    end = time.monotonic() + SECONDS
    digest = kernels_digest()
    done: dict[str, Any] = {}
    for section in arguments.sections:
        left = end - time.monotonic()
        if left < 1:
            break
        done[section] = run(section, arguments, min(left, LONGEST))
        if len(done) == 1:
            bare.import_pcafast()  # as the build, which comes first, has left it
            results = importlib.import_module("results")
            kept = earlier(arguments.out or results.FOLDER / "gpu.json", digest)
        results.write("gpu", {**kept, "kernels_digest": digest, **done}, arguments.out)
    rest = [section for section in arguments.sections if section not in done]
    if rest:
        print("no time was left for", *rest)
    sys.exit(bool(rest) or any(one["status"] != 0 for one in done.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="instead of results/gpu.json")
    parser.add_argument("--sections", nargs="+", default=["build", *MEASURED, "tests", *SANITIZERS])
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

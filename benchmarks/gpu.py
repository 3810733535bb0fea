"""Everything that needs a GPU, in one run of a few minutes: build, tests on the device, roofline, timings.

Needs python3 with torch, and nvcc; runs the tests if pytest is installed. Writes results/gpu.json, or the file named
as the argument.

    python benchmarks/gpu.py [FILE]
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = ["test_operators.py", "test_functional.py", "test_laws.py", "test_collect.py", "test_cuda_kernels.py"]
# (N, C, H, W): the sizes that the Taylor kernel must be good at, all but the first larger than the L2 cache.
TAYLOR_SHAPES = [(1, 2048, 7, 7), (256, 2048, 7, 7), (256, 512, 28, 28), (64, 256, 56, 56), (256, 64, 112, 112)]


def run(*command: str, limit: float = 300) -> dict[str, Any]:
    """A command's status, seconds and the end of its output."""
    start = time.perf_counter()
    environment = {**os.environ, "PCAFAST_CUDA": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    tail = (done.stdout + done.stderr).splitlines()[-15:]
    print(*tail, sep="\n", flush=True)
    return {"status": done.returncode, "seconds": time.perf_counter() - start, "output": tail}


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a call on the GPU, by events."""
    import torch

    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def roofline() -> dict[str, float]:
    """What the device can do: copying, in bytes read and written per second, and float64 multiply-adds."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(4096, 4096, dtype=torch.float64, device="cuda")
    return {
        "copy_bytes_per_second": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3,
        "float64_matmul_flops": 2 * 4096**3 / milliseconds(lambda: square @ square, 10) * 1e3,
    }


def taylor(copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """The Taylor kernel against pytorch-pruning's expression, plain and compiled, each checked first."""
    import torch

    from pcafast import native, reference

    def expression(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (activation * gradient).mean(dim=(0, 2, 3))

    compiled = torch.compile(expression, dynamic=False)
    rows = []
    for shape in TAYLOR_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                a, g = (torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(2))
                state, exact = (_taylor_state(shape[1]) for _ in range(2))
                native.operators.taylor_update_(a, g, 1, 1.0, *state)
                reference.taylor_update_(a[:1], g[:1], 1, 1.0, *exact)
                reference.taylor_update_(a[1:], g[1:], 1, 1.0, *exact)
                torch.testing.assert_close(state[2], exact[2], rtol=1e-6, atol=1e-6 * float(exact[2].abs().max()))
                rows.append(
                    {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "layout": "channels last" if layout == torch.channels_last else "channels first",
                        "pcafast_ms": (
                            ours := milliseconds(
                                lambda a=a, g=g, state=state: native.operators.taylor_update_(a, g, 1, 1.0, *state)
                            )
                        ),
                        "expression_ms": milliseconds(lambda a=a, g=g: expression(a, g)),
                        "compiled_ms": milliseconds(lambda a=a, g=g: compiled(a, g)),
                        "share_of_copy_bandwidth": 2 * a.nbytes / ours * 1e3 / copy_bytes_per_second,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _taylor_state(channels: int) -> list[Any]:
    import torch

    shapes = [(), (), (4, channels)]
    sums = [torch.zeros(shape, dtype=torch.float64, device="cuda") for shape in shapes]
    return [*sums, torch.zeros((), dtype=torch.int64, device="cuda")]


def main() -> None:
    """Build, test, time, write."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "benchmarks" / "results" / "gpu.json"
    found: dict[str, Any] = {"build": run(sys.executable, "setup.py", "build_ext", "--inplace")}
    if found["build"]["status"] == 0:
        tests = [f"tests/{name}" for name in TESTS]
        if importlib.util.find_spec("pytest"):
            found["tests"] = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "cuda")
        sys.path.insert(0, str(REPOSITORY))
        import torch

        found["device"] = torch.cuda.get_device_name()
        found["environment"] = {"torch": torch.__version__, "python": platform.python_version()}
        found["roofline"] = roofline()
        found["taylor"] = taylor(found["roofline"]["copy_bytes_per_second"])
    target.write_text(json.dumps({"command": "python benchmarks/gpu.py", "results": found}, indent=2) + "\n")
    sys.exit(0 if found["build"]["status"] == 0 and found.get("tests", {"status": 0})["status"] == 0 else 1)


if __name__ == "__main__":
    main()

"""``pcafast bench``: the operators against what others do for the same, on this machine."""

import io
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pcafast.cli.doctor import command_line
from pcafast.cli.tables import console
from pcafast.errors import PcafastError
from pcafast.loop.environment import environment, write_results
from pcafast.progress import track

OPTIONS = [
    *("--capture=no", "-p", "no:cacheprovider", "--benchmark-quiet"),
    *("--benchmark-warmup=on", "--benchmark-warmup-iterations=1"),
    "--benchmark-min-rounds=3",
]

Rows = list[dict[str, Any]]

OWN = ("pcafast", "operator")
PEAK = "sgemm"
"""A product of large float32 matrices, which is timed with some operators to see what the processor can do."""


class Operator(str, Enum):
    """What there are benchmarks of."""

    covariance = "covariance"
    patch_covariance = "patch_covariance"
    rank = "rank"
    taylor = "taylor"
    moments = "moments"


def command(
    operator: Annotated[list[Operator] | None, typer.Option(help="May be repeated. Default: all.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch, for both sides.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The .json file to write the times to.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small inputs, only to see that everything runs.")] = False,
) -> None:
    """Time the operators on the CPU against their peers, in one process; results are checked before they are timed.

    Takes about ten minutes, and a clone of the repository, since the benchmarks are not installed.
    """
    folder = _benchmarks()
    files = [str(folder / f"test_{one.value}.py") for one in operator or Operator]
    run = _Run()
    size = ["--tiny", "--benchmark-max-time=0.01"] if tiny else ["--benchmark-max-time=0.5"]
    measured = run([*files, *OPTIONS, f"--threads={threads}", *size])
    results = {name: _rows(some) for name, some in _by(measured, "operator").items()}
    for name, rows in results.items():
        console.print(_table(name, rows))
    for note in dict.fromkeys(run.skipped):
        console.print(f"note: {note}", highlight=False, markup=False)
    made_with = environment()
    console.print(
        f"{made_with['processor']}, threads: {made_with['threads']}, torch {made_with['torch']}", highlight=False
    )
    if out:
        write_results(out, command_line(), results)
        console.print(f"written to {out}", soft_wrap=True)


def _benchmarks() -> Path:
    """The repository's folder of benchmarks."""
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise PcafastError(
            f"bench needs {' and '.join(missing)}, which this Python does not have: pip install pytest pytest-benchmark"
        )
    for repository in (Path.cwd(), Path(__file__).parents[2]):
        if all((repository / "benchmarks" / f"test_{one.value}.py").exists() for one in Operator):
            return repository / "benchmarks"
    raise PcafastError(
        "There are no benchmarks here: they are part of the repository and not of the installed package. Run "
        "`pcafast bench` in the top folder of a clone of it."
    )


class _Run:
    """Runs pytest in this process, as a plugin of it, and shows its progress."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self._failed: dict[str, str] = {}
        self._interrupted = False
        self._steps: Iterator[Any] = iter(())

    def __call__(self, arguments: list[str]) -> Rows:
        """Every benchmark that pytest-benchmark made, as in its own file."""
        import pytest

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as said:
            file = Path(folder) / "benchmarks.json"
            status = pytest.main([*arguments, f"--benchmark-json={file}"], plugins=[self])
            measured: Rows = json.loads(file.read_text())["benchmarks"] if status == pytest.ExitCode.OK else []
        if self._interrupted:
            raise KeyboardInterrupt
        if status != pytest.ExitCode.OK:
            Console(stderr=True).print(*self._failed.values() or [said.getvalue()], highlight=False, markup=False)
            raise PcafastError(
                f"The benchmarks cannot be run, or found a result that is not right, so nothing was written: "
                f"{', '.join(self._failed) or pytest.ExitCode(status).name}. What went wrong stands above."
            )
        return measured

    def pytest_collection_finish(self, session: Any) -> None:
        self._steps = track(session.items, "timing")

    def pytest_runtest_protocol(self) -> None:
        next(self._steps, None)

    def pytest_sessionfinish(self) -> None:
        for _ in self._steps:
            pass

    def pytest_keyboard_interrupt(self) -> None:
        self._interrupted = True

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed[report.nodeid] = report.longreprtext
        elif report.skipped:
            self.skipped.append(report.longrepr[2])


def _by(measured: Rows, key: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for one in measured:
        groups.setdefault(str(one["extra_info"][key]), []).append(one)
    return groups


def _rows(measured: Rows) -> Rows:
    """For each input, what it is, the median seconds of every peer, and which are absent."""
    rows = []
    for some in _by(measured, "inputs").values():
        infos = [one["extra_info"] for one in some]
        seconds = {info["peer"]: one["stats"]["median"] for info, one in zip(infos, some, strict=True)}
        optional = {
            "multiply_adds": {info["peer"]: info["multiply_adds"] for info in infos if "multiply_adds" in info},
            "absent": infos[0]["absent"],
        }
        row = {**infos[0]["inputs"], "seconds": seconds}
        rows.append({**row, **{key: value for key, value in optional.items() if value}})
    return rows


def _table(operator: str, rows: Rows) -> Table:
    """Times, behind those of the peers how many times pcafast's they are, and the share of the processor's peak."""
    table = Table(title=operator, title_justify="left", box=None, pad_edge=False, header_style="bold")
    inputs = [key for key in rows[0] if key not in ("seconds", "multiply_adds", "absent")]
    peers = dict.fromkeys(peer for row in rows for peer in (*row["seconds"], *row.get("absent", {})) if peer != PEAK)
    for title in inputs:
        table.add_column(title, no_wrap=True)
    for title in peers:
        table.add_column(title, justify="right", overflow="fold")
    peak = max((_rate(row, PEAK) for row in rows if PEAK in row["seconds"]), default=0.0)
    if peak:
        table.add_column(f"of {PEAK}", justify="right")
    for row in rows:
        shape, *others = (row[key] for key in inputs)
        share = [f"{_rate(row, 'pcafast') / peak:.0%}"] if peak else []
        table.add_row("x".join(map(str, shape)), *map(str, others), *(_cell(row, peer) for peer in peers), *share)
    fastest = [_fastest_peer(row) / row["seconds"]["pcafast"] for row in rows]
    table.caption = (
        f"the fastest of the others takes {statistics.geometric_mean(fastest):.2f} times as long (geometric mean), "
        f"at least {min(fastest):.2f} times"
    )
    table.caption_justify = "left"
    return table


def _fastest_peer(row: dict[str, Any]) -> float:
    return float(min(time for peer, time in row["seconds"].items() if peer not in (*OWN, PEAK)))


def _rate(row: dict[str, Any], side: str) -> float:
    """Necessary multiply-adds per second."""
    return float(row["multiply_adds"][side] / row["seconds"][side])


def _cell(row: dict[str, Any], peer: str) -> str:
    seconds = row["seconds"]
    if peer not in seconds:
        return str(row.get("absent", {}).get(peer, ""))
    time = seconds[peer]
    shown = f"{time * 1e6:.0f} us" if time < 1e-3 else f"{time * 1e3:.1f} ms"
    return shown if peer == "pcafast" else f"{shown} {time / seconds['pcafast']:5.1f}x"

"""That the benchmarks run, check what they time, and write what they find."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torchvision import models

import pcafast
from pcafast.cli import bench, main
from pcafast.loop.environment import environment
from pcafast.models import build

REPOSITORY = Path(__file__).parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
OPERATORS = ("covariance", "patch_covariance", "rank", "taylor", "moments")
SECTIONS = (
    *("kernels", "roofline", "graphs", "covariance", "patch_covariance"),
    *("rank", "taylor", "moments", "training", "hrank"),
)


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(*arguments, cwd=REPOSITORY):
    """In a process of its own, since it runs pytest itself."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "150"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def run_bench(*arguments, cwd=REPOSITORY):
    return run("-c", "from pcafast.cli import main; main()", "bench", *arguments, cwd=cwd)


def test_bench_times_all_operators_and_peers(tmp_path):
    done = run_bench("--tiny", "--threads", 2, "--out", tmp_path / "times.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "times.json").read_text())
    assert written["command"].startswith("pcafast bench --tiny")
    assert written["environment"]["threads"] == 2
    assert [operator.replace(" ", "_") for operator in written["results"]] == list(OPERATORS)
    packages = {"curvlinops", "kfac-pytorch"}
    peers = {
        operator: [peer for peer in rows[0]["seconds"] if peer not in packages]
        for operator, rows in written["results"].items()
    }
    assert peers == {
        "covariance": ["pcafast", "permute, matmul", "bmm, sum", "addmm per image", "einsum", "sgemm"],
        "patch covariance": ["pcafast", "unfold, matmul", "unfold, ssyrk", "sgemm"],
        "rank": ["pcafast", "batched", "one by one"],
        "taylor": ["pcafast", "operator", "expression", "torch.compile"],
        "moments": ["pcafast", "expression"],
    }
    row = written["results"]["rank"][0]
    assert row["shape"] == [2, 32, 8, 8]
    assert all(0 < seconds < 1 for seconds in row["seconds"].values())
    assert f"{row['seconds']['batched'] / row['seconds']['pcafast']:5.1f}x" in done.stdout
    assert torch.__version__ in done.stdout
    assert written["results"]["covariance"][0]["multiply_adds"] == {"pcafast": 24**2 / 2 * 2 * 7 * 7, "sgemm": 2048**3}
    row = written["results"]["patch covariance"][0]
    assert packages == {*row.get("absent", {}), *row["seconds"]} & packages


def test_the_table_says_what_is_absent_how_near_the_peak_and_how_far_the_others_are():
    row = {"shape": [2, 3], "network": "A", "multiply_adds": {"pcafast": 30.0, "sgemm": 100.0}}
    rows = [
        {**row, "seconds": {"pcafast": 1.0, "x": 4.0, "y": 3.0, "sgemm": 2.0}, "absent": {"z": "not installed"}},
        {**row, "seconds": {"pcafast": 2.0, "x": 24.0, "y": 25.0, "sgemm": 4.0}, "absent": {"z": "not installed"}},
    ]
    table = bench._table("covariance", rows)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["z"] == ["not installed"] * 2
    assert cells["of sgemm"] == ["60%", "30%"]
    assert "sgemm" not in cells
    assert "takes 6.00 times as long (geometric mean), at least 3.00 times" in table.caption


FAKE = """
from cases import Case

PEERS = ("pcafast", "expression", "torch.compile")
TINY = [(1,)]


def make(size):
    assert {right}
    return Case("{operator}", {{"shape": (size,)}}, {{peer: int for peer in PEERS[:2]}}, {{PEERS[2]: "no compiler"}})


def test(measure):
    measure()
"""


def fake_benchmarks(folder, wrong=None):
    """A clone whose benchmarks do nothing, and find one operator to be wrong."""
    (folder / "benchmarks").mkdir()
    for name in ("cases.py", "conftest.py"):
        shutil.copy(BENCHMARKS / name, folder / "benchmarks")
    for operator in OPERATORS:
        text = FAKE.format(operator=operator, right=operator != wrong)
        (folder / "benchmarks" / f"test_{operator}.py").write_text(text)


def test_a_peer_that_cannot_run_is_left_out_with_a_note(tmp_path):
    fake_benchmarks(tmp_path)
    done = run_bench("--tiny", "--operator", "taylor", "--out", "times.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: Skipped: torch.compile: no compiler" in done.stdout
    (row,) = json.loads((tmp_path / "times.json").read_text())["results"]["taylor"]
    assert list(row["seconds"]) == ["pcafast", "expression"]


def test_a_wrong_result_is_an_error_and_nothing_is_written(tmp_path):
    fake_benchmarks(tmp_path, wrong="moments")
    done = run_bench("--tiny", "--out", "times.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "assert False" in done.stderr
    assert "error: The benchmarks cannot be run, or found a result that is not right" in done.stderr
    assert "test_moments.py" in done.stderr.splitlines()[-1]
    assert "test_rank.py" not in done.stderr.splitlines()[-1]
    assert not (tmp_path / "times.json").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda name: None, "pip install pytest pytest-benchmark"),
        (lambda name: name, "part of the repository .* in the top folder of a clone"),
    ],
)
def test_what_bench_needs(spec, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "find_spec", spec)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "pcafast" / "cli" / "bench.py"))
    monkeypatch.setattr(sys, "argv", ["pcafast", "bench"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    (paragraph,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, paragraph)


def test_wrong_ranks_are_noticed(module):
    rank_case = module("rank_case")
    maps = rank_case.feature_maps(2, 16)
    ranks = pcafast.functional.feature_map_rank(maps)
    assert len(ranks.unique()) > 8
    rank_case.check(maps, ranks)
    ranks[1, 3] += 1
    with pytest.raises(AssertionError):
        rank_case.check(maps, ranks)


@pytest.mark.parametrize("row", range(4))
def test_wrong_taylor_sums_are_noticed(row, module):
    taylor_case, cases = module("taylor_case"), module("cases")
    a, g = (cases.activations((3, 8, 5, 5), "bfloat16", "channels last", seed=seed) for seed in (0, 1))
    state = taylor_case.empty_state(8, "cpu")
    torch.ops.pcafast.taylor_update_(a, g, 1, 1.0, *state)
    taylor_case.check(a, g, state)
    state[2][row, 3] *= 1.0001
    state[2][row, 3] += 0.01
    with pytest.raises(AssertionError):
        taylor_case.check(a, g, state)


def test_the_compiled_expression_is_left_out_only_for_want_of_a_compiler(module, monkeypatch):
    taylor_case, small = module("taylor_case"), ((2, 3, 4, 4), "float32", "channels first")

    def fail(error):
        def compiled(*_):
            raise InductorError(error, None)

        monkeypatch.setattr(taylor_case, "compiled", compiled)

    fail(InvalidCxxCompiler("c++"))
    case = taylor_case.taylor_case(*small)
    assert case.absent == {"torch.compile": "Compiler: c++ is not found."}
    assert list(case.calls) == ["pcafast", "operator", "expression"]
    fail(ValueError("another"))
    with pytest.raises(InductorError, match="another"):
        taylor_case.taylor_case(*small)


@pytest.mark.parametrize("which", range(6))
def test_wrong_moments_are_noticed(which, module):
    moments_case, cases = module("moments_case"), module("cases")
    x = cases.activations((3, 8, 5, 5), "float32", "channels first", seed=0).relu_()
    state = moments_case.empty_state(8, "cpu")
    torch.ops.pcafast.channel_moments_update_(x, 1, *state)
    moments_case.check(x, state)
    state[which] += 1
    with pytest.raises(AssertionError):
        moments_case.check(x, state)


def test_wrong_covariances_are_noticed(module):
    covariance_case, cases = module("covariance_case"), module("cases")
    x = covariance_case.outputs((3, 8, 5, 5), "float32", "channels last")
    sides = covariance_case.checked_sides(x, covariance_case.ON_GPU)
    exact = torch.cov(x.double().transpose(0, 1).flatten(1), correction=0)
    sides["pcafast"].state[2].mul_(1 + 2e-6)
    sides["einsum"].state[0].mul_(1.001)
    for name in ("pcafast", "einsum"):
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            cases.check_covariance(name, sides[name], exact, x.dtype)


@pytest.mark.parametrize("stride", [1, 2])
def test_wrong_patch_covariances_are_noticed(stride, module):
    patch_case, cases = module("patch_covariance_case"), module("cases")
    x = patch_case.inputs((3, 40, 7, 7), "float32", "channels first")
    makers = {name: make for name, make in patch_case.sides(x, stride).items() if name not in patch_case.absent()}
    sides = patch_case.checked_sides(x, stride, makers)
    patches = torch.nn.functional.unfold(x.double(), 3, padding=1, stride=stride).transpose(0, 1).flatten(1)
    exact = patch_case.exact_covariance(x, stride, centred=True)
    torch.testing.assert_close(exact, torch.cov(patches, correction=0))
    second = patches @ patches.T / patches.shape[1]
    torch.testing.assert_close(patch_case.exact_covariance(x, stride, centred=False), second)
    sides["pcafast"].state[4][0].mul_(1 + 1e-4)
    with pytest.raises(AssertionError, match="pcafast is off by"):
        cases.check_covariance("pcafast", sides["pcafast"], exact, x.dtype)


def test_multiply_adds_are_those_of_pairs_of_pixels(module):
    """For a 3x3 kernel of 25 offsets: each and its opposite once, and half of the offset 0."""
    patch_case = module("patch_covariance_case")
    pairs = sum((20 - abs(down)) * (10 - abs(right)) for down in range(-2, 3) for right in range(-2, 3)) / 2
    # What padding covers on one side alone belongs to no patch.
    found = patch_case.multiply_adds(torch.empty(3, 64, 20, 10), 1)
    assert found == 3 * 64**2 * pairs


def layers(network, side):
    """The distinct shapes of convolutions' outputs, or of 3x3 convolutions' inputs, by a pass without numbers."""
    model = build("resnet56") if network == "ResNet-56" else getattr(models, network.lower().replace("-", ""))()
    shapes = set()

    def see(module, inputs, output):
        if side == "output":
            shapes.add(tuple(output.shape[1:]))
        elif module.kernel_size == (3, 3):
            assert module.padding == (1, 1)
            shapes.add((*inputs[0].shape[1:], module.stride[0]))

    for convolution in (one for one in model.modules() if isinstance(one, torch.nn.Conv2d)):
        convolution.register_forward_hook(see)
    size = 32 if network == "ResNet-56" else 224
    model.eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return shapes


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_layers_timed_are_those_of_the_networks(side, module):
    networks = module("networks")
    for network, shapes in (networks.OUTPUTS if side == "output" else networks.INPUTS).items():
        assert len(shapes) == len(set(shapes))
        assert set(shapes) == layers(network, side)


def test_memory_of_patch_covariance_does_not_grow_with_the_batch(module):
    """A few MB beside the state, where unfolding takes more than the patches, 29 MB here."""
    measured, shape = module("memory").measured, (8, 32, 56, 56)
    ours, theirs = (measured("patch covariance", shape, side, 1) for side in ("pcafast", "unfold, matmul"))
    assert ours["state"] == pytest.approx(8 * 29 * 32**2, rel=0.1)
    assert 0 <= ours["extra"] < 8e6
    assert theirs["extra"] > 8 * 9 * 32 * 56 * 56 * 4


def test_disagreement_with_hrank_is_counted(module):
    hrank = module("hrank")
    torch.manual_seed(0)
    model = build("resnet20").eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))] * 2
    places = hrank.places(model)
    assert list(places) == list(hrank.one_pass(model, batches))
    layer = "layer2.1.conv2"
    scores, ranks = hrank.hrank(model, batches, places[layer])
    torch.testing.assert_close(scores.double(), hrank.one_pass(model, batches)[layer], rtol=1e-6, atol=0)
    ranks[1][0, 5] += 1
    ranks[1][1, 6] -= 1
    found = hrank.differences(model, batches, {layer: ranks})
    assert found == {"maps": 4 * 32, "differing": 2, "hrank_wrong": 2, "pcafast_wrong": 0}
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_of_the_gpu_run(section, module, monkeypatch):
    """On the CPU with tiny inputs, so that they have run before there is a GPU."""
    monkeypatch.setattr(module("gpu_timings"), "STEPS", 4)
    sections = module("gpu_sections").SECTIONS
    assert tuple(sections) == module("gpu").MEASURED == SECTIONS
    found = sections[section]("cpu", True)
    json.dumps(found)
    if section == "rank":
        assert [row["side"] for row in found] == [8, 16, 32, 56, 112, 224]
        assert all(row["pcafast"]["microseconds_per_map"] > 0 for row in found)
    if section in ("taylor", "moments", "covariance", "patch_covariance"):
        assert len({(row["dtype"], row["layout"]) for row in found}) == 4
    if section in ("covariance", "patch_covariance"):
        assert all(row["share_of_roofline"] > 0 for row in found)
        assert len(found[0]["milliseconds"]) == {"covariance": 6, "patch_covariance": 2}[section]
    if section == "training":
        assert list(found["times_plain"]) == ["plain", "taylor", "covariance", "both"]
        assert all(time > 0 for time in found["milliseconds"].values())
        assert all(hook["operator"] > 0 for hook in found["hook_microseconds"].values())
    if section == "hrank":
        first = found["first_batch"]
        assert (first["places"], first["images"], found["images"], first["pcafast_wrong"]) == (3, 2, 4, 0)


@pytest.mark.parametrize("statistic", [None, pcafast.Covariance, pcafast.Taylor])
def test_what_is_collected_in_training_is_checked(statistic, module, monkeypatch):
    training = module("gpu_training")
    case = training.Training(build("resnet20"), (2, 3, 32, 32), "cpu")
    if statistic is None:
        return training.check(case)
    update = statistic.update
    monkeypatch.setattr(statistic, "update", lambda self, x, *rest, **more: update(self, x * 1.01, *rest, **more))
    with pytest.raises(AssertionError):
        training.check(case)


def test_the_gpu_run_goes_on_after_a_failure_and_keeps_what_it_does_not_run(tmp_path, module):
    out, digest = tmp_path / "gpu.json", module("gpu").kernels_digest()
    before = {"kernels_digest": digest, "rank": {"status": 0}, "kernels": {"status": 1}}
    out.write_text(json.dumps({"environment": environment(), "results": before}))
    sections = ("absent", "kernels", "memcheck")
    done = run(BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--out", out, "--sections", *sections)
    assert done.returncode == 1
    written = json.loads(out.read_text())
    assert written["environment"]["torch"] == torch.__version__
    results = written["results"]
    assert list(results) == ["kernels_digest", "rank", "kernels", "absent", "memcheck"]
    assert (results["kernels_digest"], results["rank"]) == (digest, {"status": 0})
    assert results["absent"]["status"] == 1
    assert "KeyError: 'absent'" in results["absent"]["said"]
    assert results["kernels"]["status"] == 0
    assert results["kernels"]["found"]["own"]
    assert results["memcheck"]["said"][0].endswith("calls are right")


def test_results_of_other_kernels_or_another_gpu_are_not_kept(tmp_path, module):
    earlier, path = module("gpu").earlier, tmp_path / "gpu.json"
    assert earlier(path, "digest") == {}
    results = {"kernels_digest": "digest", "rank": {"status": 0}}
    path.write_text(json.dumps({"environment": environment(), "results": results}))
    assert earlier(path, "digest") == results
    assert earlier(path, "another") == {}
    path.write_text(json.dumps({"environment": {"gpu": "another"}, "results": results}))
    assert earlier(path, "digest") == {}


def test_the_digest_is_of_the_cuda_sources_and_of_what_calls_them(tmp_path, module, monkeypatch):
    gpu = module("gpu")
    monkeypatch.setattr(gpu.bare, "REPOSITORY", tmp_path)
    for folder in ("cuda", "cpu"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    digests = [gpu.kernels_digest()]
    for name, text in (("cuda/a.cu", ""), ("cuda/b.h", ""), ("cuda/b.h", "x"), ("ops.cpp", ""), ("cpu/c.cpp", "x")):
        (tmp_path / "csrc" / name).write_text(text)
        digests.append(gpu.kernels_digest())
    assert len(set(digests)) == 5
    assert digests[4] == digests[5]
    (tmp_path / "tool.py").touch()
    assert gpu.kernels_digest("tool.py") != digests[5]


def test_what_the_gpu_run_calls(module, monkeypatch):
    gpu = module("gpu")
    on_gpu = SimpleNamespace(device="cuda", tiny=False)
    tool, _, name, *options = gpu.command("racecheck", on_gpu, Path("result"))
    assert (tool, name) == ("compute-sanitizer", "racecheck")
    assert {"--error-exitcode", "kns=pcafast", "benchmarks/gpu_launches.py"} <= set(options)
    assert "kns=pcafast" not in gpu.command("initcheck", on_gpu, Path("result"))
    for there in (None, "xdist"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
        assert ("-n" in gpu.tests("cuda")) == bool(there)
    assert gpu.tests("cuda")[-1] == "cuda and not cpu"


def test_a_section_that_cannot_start_or_end(module, capsys, monkeypatch):
    gpu = module("gpu")
    given = SimpleNamespace(device="cpu", tiny=True)
    monkeypatch.setattr(gpu, "command", lambda section, *_: [section])
    assert gpu.run("compute-sanitiser", given, 9)["status"] == "not run: there is no compute-sanitiser on the PATH"
    endless = [sys.executable, "-c", "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '99'])"]
    monkeypatch.setattr(gpu, "command", lambda *_: endless)
    stopped = gpu.run("rank", given, 1)
    assert (stopped["status"], stopped["said"]) == ("stopped after 1 seconds", ["begun"])
    assert stopped["seconds"] < 5


def test_the_gpu_run_needs_only_torch(tmp_path):
    """But for the sections training and hrank."""
    without = "import sys; sys.modules.update(dict.fromkeys(['rich', 'safetensors', 'jinja2', 'typer'])); "
    start = (
        f"import runpy; sys.path.insert(0, {str(BENCHMARKS)!r}); runpy.run_path('benchmarks/gpu.py', None, '__main__')"
    )
    options = ("--only", "graphs", "--device", "cpu", "--tiny", "--out", tmp_path / "found.json")
    done = run("-c", without + start, *options)
    assert done.returncode == 0, done.stderr
    assert "only the operators can be used" in done.stdout
    assert len(json.loads((tmp_path / "found.json").read_text())) == 5

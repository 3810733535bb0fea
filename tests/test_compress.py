"""The loop on a small network: what it leaves in the folder, and that no interruption changes it."""

import json
import multiprocessing
import random
import signal
import time
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pcafast
from pcafast.loop import compress, evaluate
from pcafast.loop.seeding import random_states_kept, seed_stage
from pcafast.models import build

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["pca", "taylor", "rank", "l1"]
FINAL = {"plan.json", "model.safetensors", "report.json", "report.html"}


@pytest.fixture(scope="module")
def one_thread():
    """So small a network is slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model():
    torch.manual_seed(0)
    return build("digits_cnn")


def batches(seed=0, count=4, size=32, **options):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * size, 1, 8, 8, generator=generator)
    labels = (10 * images.mean((1, 2, 3)).mul(8).sigmoid()).long()
    return DataLoader(TensorDataset(images, labels), size, **options)


def arguments(**changes):
    common = {"budget": pcafast.Budget(macs=0.5), "train": batches(shuffle=True), "test": batches(1), "seed": 3}
    return {**common, "steps": 2, "retrain_epochs": 2, "learning_rate": 0.05, **changes}


def contents(folder):
    """Everything in the folder but measured times and the machine, and the page that shows them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"MACs" in files.pop("report.html")
    report = json.loads(files.pop("report.json"))
    del report["environment"]
    for side in ("before", "after"):
        assert report[side].pop("latency_seconds") > 0
    return files, report


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """The folders of runs that were not interrupted, by method."""
    folders = {}
    for method in METHODS:
        folders[method] = tmp_path_factory.mktemp(method) / "small"
        compress(model(), method, out=folders[method], **arguments())
    return folders


@pytest.mark.parametrize("method", METHODS)
def test_what_is_in_the_folder(method, whole):
    files, report = contents(whole[method])
    assert files.keys() | {"report.json", "report.html"} == FINAL
    original, small = model(), pcafast.load(model(), whole[method])
    found = evaluate(small, batches(1))
    after = report["after"]
    assert (after["correct"], after["images"], after["loss"]) == tuple(found)
    assert after["params"] == sum(parameter.numel() for parameter in small.parameters())
    assert 0.45 < after["macs"] / report["before"]["macs"] <= 0.5
    assert after["file_bytes"] == len(files["model.safetensors"])
    assert report["reached"]["macs"] == {
        "before": report["before"]["macs"],
        "after": after["macs"],
        "share": after["macs"] / report["before"]["macs"],
    }
    stages = [(entry["step"], entry["stage"], entry.get("epoch")) for entry in report["history"]]
    one_step = [("compressed", None), ("batch norm re-estimated", None), ("retrained", 1), ("retrained", 2)]
    assert stages == [(0, "original", None), *((step, *stage) for step in (1, 2) for stage in one_step)]
    assert report["history"][1]["macs"] <= 0.5**0.5 * report["before"]["macs"]
    assert report["history"][1]["macs"] > 0.65 * report["before"]["macs"]
    assert report["asked"]["budget"] == {"macs": 0.5}
    assert json.loads(files["plan.json"])["asked"]["macs"] == 0.5
    assert {layer["layer"] for layer in report["layers"]} == {"conv1", "conv2", "conv3", "linear"}
    assert sum(layer["macs"]["after"] for layer in report["layers"]) == after["macs"]
    norms = sum(parameter.numel() for name, parameter in small.named_parameters() if name.startswith("bn"))
    assert sum(layer["params"]["after"] for layer in report["layers"]) + norms == after["params"]
    assert original.conv1.weight.equal(model().conv1.weight)


def test_eigenvalues_and_ranks(whole):
    _, report = contents(whole["pca"])
    small = pcafast.load(model(), whole["pca"])
    names = [name for name, module in small.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert all(name.count(".") < 2 for name in names), "the second step has put factors inside factors"
    for spectrum in report["spectra"]:
        assert spectrum["eigenvalues"] == sorted(spectrum["eigenvalues"], reverse=True)
        layer = small.get_submodule(spectrum["layer"])
        assert spectrum["rank"] == len((layer[0] if isinstance(layer, nn.Sequential) else layer).weight)
    stats = pcafast.loop.calibrate(model(), batches(), covariance=pcafast.Covariance())["covariance"]
    trace = float(stats["conv2"].compute().covariance.trace())
    (conv2,) = (one for one in report["spectra"] if one["layer"] == "conv2")
    assert sum(conv2["eigenvalues"]) == pytest.approx(trace, rel=1e-6)


def test_scores_and_kept_channels(whole):
    _, report = contents(whole["l1"])
    small = pcafast.load(model(), whole["l1"])
    for scores in report["scores"]:
        layer = scores["layer"]
        norms = model().get_submodule(layer).weight.detach().abs().flatten(1).sum(1)
        assert scores["values"] == pytest.approx((norms / norms.norm()).tolist())
        assert len(scores["kept"]) == len(small.get_submodule(layer).weight)
        assert scores["criterion"] == "l1"
    actions = json.loads((whole["l1"] / "plan.json").read_text())["actions"]
    first = next(action for action in actions if action["outputs"])
    (scores,) = (one for one in report["scores"] if one["layer"] == first["layer"])
    assert set(scores["kept"]) <= set(first["outputs"])


def test_the_caller_and_the_model_are_left_as_they_were(tmp_path):
    network = model().train()
    network.bn1.eval()
    network.conv1.weight.grad = torch.ones_like(network.conv1.weight)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    train = batches(shuffle=True, generator=generator)
    drawn = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), generator.get_state().tolist()
    small = compress(network, out=tmp_path / "o", **arguments(train=train)).model
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (np.random.get_state()[1].tolist(), random.getstate(), generator.get_state().tolist()) == drawn[1:]
    assert all(tensor.equal(state[name]) for name, tensor in network.state_dict().items())
    assert network.conv1.weight.grad.equal(torch.ones_like(network.conv1.weight))
    for one in (network, small):
        assert (one.training, one.bn1.training, one.bn2.training) == (True, False, True)
    assert not network._forward_hooks


class CutOff:
    """A test function that is cut off at its second call, as by Ctrl-C, until it is let through."""

    def __init__(self):
        self.calls, self.last = 0, float("inf")

    def __call__(self, network):
        assert not network.training
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return evaluate(network, batches(1))


@pytest.mark.parametrize("method", ["pca", "taylor"])
def test_cut_off_in_every_stage(method, tmp_path):
    test, train = CutOff(), batches(shuffle=True, generator=torch.Generator())
    compress(model(), method, out=tmp_path / "whole", **arguments(test=test, train=train))
    assert test.calls == 9
    for done in range(8):
        test.calls, test.last = 0, 2
        torch.rand(done)  # random states are others each time
        torch.rand(1, generator=train.generator)
        with pytest.raises(KeyboardInterrupt):
            compress(model(), method, out=tmp_path / "cut", **arguments(test=test, train=train))
        assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint.safetensors"]
    with pytest.warns(pcafast.PcafastWarning, match="of which 8 of 9 stages are done"):
        compress(model(), method, out=tmp_path / "cut", **arguments(test=test, train=train))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_cut_off_while_the_result_is_written(tmp_path, whole, monkeypatch):
    out = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(pcafast.loop.checkpoint, "remove", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(model(), out=out, **arguments())
    (out / "plan.json").unlink()
    (out / ".model.safetensors.half").write_bytes(b"half")
    compress(model(), out=out, **arguments())
    assert contents(out) == contents(whole["pca"])


def run_in_process(folder, method):
    torch.set_num_threads(1)
    compress(model(), method, out=folder, **arguments(train=batches(count=16, shuffle=True), retrain_epochs=3))


@pytest.mark.parametrize("method", ["pca", "taylor"])
def test_killed_at_random_moments(method, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pcafast", "torch._dynamo", "torch_pruning"])
    checkpoint, moments = tmp_path / "killed" / "checkpoint.safetensors", random.Random(method)

    def process(folder):
        child = context.Process(target=run_in_process, args=(folder, method))
        child.start()
        return child

    def version():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None

    whole = process(tmp_path / "whole")
    for _ in range(4):
        before, child = version(), process(tmp_path / "killed")
        while version() == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    last = process(tmp_path / "killed")
    for child in (whole, last):
        child.join()
        assert child.exitcode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_users_own_functions(tmp_path):
    seen = []

    def train(network, epoch):
        assert network.training
        network.eval()
        seen.append((network.conv2, epoch))
        with torch.no_grad():
            network.linear.bias += torch.rand(10)
        return "ignored"

    def test(network):
        assert not network.training
        network.train()
        return network.linear.bias.sum().item()

    own = {"train": train, "test": test, "calibration": batches()}
    small, _, report = compress(model().train(), "l1", out=tmp_path / "a", **arguments(**own))
    assert [epoch for _, epoch in seen] == [1, 2, 1, 2]
    assert seen[0][0] is seen[1][0]
    assert seen[1][0] is not seen[2][0]
    assert small.training
    scores = [entry["score"] for entry in report["history"]]
    assert report["after"]["score"] == scores[-1] == small.linear.bias.sum().item()
    assert report["before"]["score"] == scores[0]
    assert scores[-1] > scores[-2] > scores[-3]
    assert "accuracy" not in report["after"]
    assert "learning_rate" not in report["asked"]
    again = compress(model().train(), "l1", out=tmp_path / "b", **arguments(**own))
    assert again.report["after"]["score"] == scores[-1]


def test_a_criterion_of_ones_own(tmp_path):
    def spread(network, stats):
        return {layer: one.compute().variance for layer, one in stats["outputs"].items() if layer != "linear"}

    criterion = pcafast.loop.Criterion("variance", spread, {"outputs": pcafast.ChannelMoments()})
    common = arguments(budget=pcafast.Budget(channels=0.5), steps=1, layers="conv[12]", round_to=4)
    report = compress(model(), criterion, out=tmp_path / "small", **common).report
    after = {layer["layer"]: layer["after"] for layer in report["layers"]}
    assert after["conv1"] + after["conv2"] == 48
    assert after["conv1"] % 4 == after["conv2"] % 4 == 0
    assert (after["conv3"], after["linear"]) == (64, 10)
    assert {scores["layer"] for scores in report["scores"]} == {"conv1", "conv2"}
    moments = pcafast.loop.calibrate(model(), batches(), outputs=pcafast.ChannelMoments())["outputs"]
    assert report["scores"][0]["values"] == pytest.approx(moments["conv1"].compute().variance.tolist())
    assert report["asked"]["method"] == "variance"


def test_chosen_layers_stay_chosen_as_factors(tmp_path):
    report = compress(model(), out=tmp_path / "small", **arguments(layers="conv2", steps=3)).report
    after = {layer["layer"]: layer["after"] for layer in report["layers"]}
    assert (after["conv1"], after["conv3"]) == (32, 64)
    assert after["conv2"] < 64
    macs = [entry["macs"] for entry in report["history"] if entry["stage"] == "compressed"]
    assert macs[0] > macs[1] > macs[2]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("svd", {}, "method: expected one of pca, .*, l1, a pcafast.Criterion or pcafast.Directions, got 'svd'"),
        ("pca", {"budget": 0.5}, "budget: expected a pcafast.Budget"),
        ("pca", {"budget": pcafast.Budget(macs=0.001)}, r"budget: macs=0.001 cannot be met.*nearest"),
        ("pca", {"budget": pcafast.Budget(channels=0.5)}, "budget: expected a share of macs or params"),
        ("pca", {"round_to": 8}, "round_to: expected only with pruning"),
        ("fisher", {"compensate_means": True}, "compensate_means.*: expected only with pruning, .* method 'fisher'"),
        ("pca", {"budget": None}, "expected either a budget or a ratio, got None and None"),
        ("pca", {"ratio": 0.5}, "expected either a budget or a ratio, got macs=0.5 and 0.5"),
        ("pca", {"budget": None, "ratio": 0}, r"ratio: expected a share in \(0, 1\], got 0"),
        ("l1", {"budget": None, "ratio": 0.5}, "refit, ratio and losses: expected only with low-rank layers"),
        ("rank", {"refit": True}, "losses: expected only with low-rank layers, got them with method 'rank'"),
        ("pca", {"losses": {}, "steps": 2}, "losses: expected steps=1 with them"),
        ("pca", {"losses": {}, "budget": None, "ratio": 0.5}, "losses: expected only with a budget"),
        ("pca", {"losses": {"conv1": {1: 0.1}}, "steps": 1}, "losses: expected those of layer 'conv2'"),
        ("l1", {"round_to": 0}, "round_to: expected a whole number"),
        ("l1", {"scope": "local"}, "scope: expected one of global, layer"),
        ("l1", {"min_width": 64, "round_to": 64}, "budget: .* cannot be met"),
        ("pca", {"steps": 0}, "steps: expected a whole number from 1 on, got 0"),
        ("pca", {"retrain_epochs": -1}, "retrain_epochs: expected a whole number from 0 on, got -1"),
        ("pca", {"retrain_epochs": 1.5}, "retrain_epochs: expected a whole number from 0 on, got 1.5"),
        ("pca", {"seed": "x"}, "seed: expected a whole number from 0 on, got 'x'"),
        ("pca", {"learning_rate": 0}, "learning_rate: expected a positive number"),
        ("pca", {"label_smoothing": 1}, r"label_smoothing: expected a share in \[0, 1\)"),
        ("pca", {"weight_decay": float("nan")}, "weight_decay: expected a number from 0 on"),
        ("pca", {"train": None}, "train: expected batches, or a function, for retrain_epochs=2"),
        ("pca", {"train": None, "retrain_epochs": 0}, "calibration: expected batches .* since train is not given"),
        ("pca", {"train": lambda *_: None}, "calibration: expected batches .* since train is a function"),
        ("pca", {"calibration": []}, "calibration: expected at least one batch, got none"),
        ("pca", {"calibration": lambda: []}, "calibration: expected batches"),
        ("pca", {"test": None}, "test: expected batches of inputs and labels .* got a NoneType"),
        ("pca", {"train": iter([])}, "train: expected batches .* many times, .* got a list_iterator"),
        ("pca", {"layers": "conv9"}, "no layer of the model matches 'conv9'"),
        ("pca", {"layers": "bn1"}, "BatchNorm2d cannot be factorised"),
        ("pca", {"data": {"train": torch.zeros(1)}}, "data: expected what JSON can hold"),
        ("taylor", {"calibration": [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))]}, "labels: expected 0 to 9"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_written(method, changes, message, tmp_path):
    class Untouched:
        def __call__(self, network):
            raise AssertionError("the work has begun")

    common = arguments(**{"test": Untouched(), **changes})
    with pytest.raises(pcafast.ArgumentError, match=message):
        compress(model(), method, out=tmp_path / "small", **common)
    assert not (tmp_path / "small").exists()


def test_a_test_function_returns_a_number(tmp_path):
    with pytest.raises(pcafast.ArgumentError, match="test: expected a function that returns a number, got 'good'"):
        compress(model(), out=tmp_path, **arguments(test=lambda _: "good"))


def test_a_run_is_only_gone_on_with_by_its_own_command(tmp_path, whole):
    test, out = CutOff(), tmp_path / "small"
    test.last = 4
    with pytest.raises(KeyboardInterrupt):
        compress(model(), "l1", out=out, **arguments(test=test))
    before = (out / "checkpoint.safetensors").read_bytes()
    for method, changes, difference in (
        ("taylor", {}, 'method was "l1" and is now "taylor"'),
        ("l1", {"budget": pcafast.Budget(macs=0.4)}, "budget macs was 0.5 and is now 0.4"),
        ("l1", {"seed": 1}, "seed was 3 and is now 1"),
        ("l1", {"round_to": 2}, "round_to was 1 and is now 2"),
        ("l1", {"learning_rate": 0.1}, "learning_rate was 0.05 and is now 0.1"),
        ("l1", {"data": {"train": "d"}}, 'data was not given and is now {"train": "d"}'),
        ("l1", {"train": batches(count=5)}, 'train was "4 batches" and is now "5 batches"'),
    ):
        with pytest.raises(pcafast.ArgumentError, match="holds an unfinished run of another command") as error:
            compress(model(), method, out=out, **arguments(**{"test": test, **changes}))
        assert difference in str(error.value)
    with pytest.raises(pcafast.ArgumentError, match="original_sha256"):
        compress(build("digits_cnn"), "l1", out=out, **arguments(test=test))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"checkpoint.safetensors": before}

    finished = contents(whole["pca"])
    with pytest.raises(pcafast.ArgumentError, match=r"holds the result of another command: .*steps was 2 and is now 1"):
        compress(model(), out=whole["pca"], **arguments(steps=1))
    assert contents(whole["pca"]) == finished


def test_what_is_in_the_way_stays(tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(pcafast.ArgumentError, match=r"holds plan.json, but not as the result of such a run"):
        compress(model(), out=tmp_path, **arguments())
    with pytest.raises(pcafast.ArgumentError, match=r"expected a folder, and .*plan.json is a file"):
        compress(model(), out=tmp_path / "plan.json", **arguments())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_finished_folder_is_read(whole):
    times = {path: path.stat().st_mtime_ns for path in whole["taylor"].iterdir()}
    with pytest.warns(pcafast.PcafastWarning, match="holds the result of this very command, so nothing was done again"):
        found = compress(model(), "taylor", out=whole["taylor"], **arguments())
    assert {path: path.stat().st_mtime_ns for path in whole["taylor"].iterdir()} == times
    assert found.report == json.loads((whole["taylor"] / "report.json").read_text())
    assert evaluate(found.model, batches(1)).loss == found.report["after"]["loss"]
    assert [action.layer for action in found.plan.actions]


@pytest.fixture
def unfinished(tmp_path):
    """The folder of a run that was cut off, and what was asked for."""
    test = CutOff()
    test.last = 4
    asked = arguments(test=test)
    with pytest.raises(KeyboardInterrupt):
        compress(model(), out=tmp_path / "small", **asked)
    test.last = float("inf")
    return tmp_path / "small", asked


@pytest.mark.parametrize("damage", ["cut off", "changed", "of another version", "something else"])
def test_a_damaged_checkpoint(damage, unfinished):
    folder, asked = unfinished
    path = folder / "checkpoint.safetensors"
    data = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        path.write_bytes(data[:-8] + b"changed!")
    elif damage == "of another version":
        path.write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    else:
        path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    before = path.read_bytes()
    with pytest.raises(pcafast.FileError, match=r"checkpoint.safetensors.*Delete it to begin the run anew"):
        compress(model(), out=folder, **asked)
    assert path.read_bytes() == before
    path.unlink()
    compress(model(), out=folder, **asked)
    assert {path.name for path in folder.iterdir()} == FINAL


def test_going_on_elsewhere_is_noted(unfinished, monkeypatch):
    folder, asked = unfinished
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(pcafast.PcafastWarning, match=r"last bits may differ: threads was 1 and is now 77"):
        report = compress(model(), out=folder, **asked).report
    assert [warning for warning in report["warnings"] if "threads was 1 and is now 77" in warning]


def test_warnings_are_shown_and_reported(tmp_path):
    def test(network):
        warnings.warn("not of pcafast", UserWarning, stacklevel=1)
        warnings.warn("seen once more", pcafast.PcafastWarning, stacklevel=1)
        return float("nan")

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        report = compress(model(), out=tmp_path, **arguments(test=test)).report
    assert report["warnings"] == ["seen once more"]
    assert [str(one.message) for one in shown].count("seen once more") == len(report["history"])
    assert report["after"]["score"] is None  # JSON has no NaN
    assert (tmp_path / "report.json").read_text().count("NaN") == 0


def test_training_that_diverges(tmp_path):
    with pytest.raises(pcafast.PcafastError, match=r"became (nan|inf).*lower learning rate.*another folder.*keeps"):
        compress(model(), out=tmp_path, **arguments(learning_rate=1e30))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


class Drawn(torch.utils.data.Dataset):
    """Draws from all generators that a user's augmentation may draw from."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index, torch.rand(()), np.random.rand(), random.random()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own_generator", [False, True])
def test_the_batches_of_a_stage_depend_on_its_number_only(workers, own_generator):
    def one_pass(stage):
        torch.rand(stage)
        generator = torch.Generator() if own_generator else None
        loader = DataLoader(Drawn(), 4, shuffle=True, num_workers=workers, generator=generator)
        with random_states_kept(loader):
            seed_stage(7, stage, loader)
            return [[part.tolist() for part in batch] for batch in loader]

    assert one_pass(3) == one_pass(3)
    for other, same in zip(one_pass(4), one_pass(3), strict=True):
        assert all(a != b for a, b in zip(other, same, strict=True))


def test_loaders_are_told_the_number_of_the_stage():
    class Loader:
        def set_epoch(self, epoch):
            self.epoch = epoch

    outer, inner = Loader(), Loader()
    outer.sampler = inner
    seed_stage(0, 5, outer)
    assert (outer.epoch, inner.epoch) == (5, 5)


def test_a_ratio_falls_step_by_step_and_adds_no_layers(tmp_path):
    """As pca-compress's --prune-dim and --prune-step: every step is fused into the factors of the step before."""
    common = arguments(budget=None, ratio=0.25, steps=3, retrain_epochs=1)
    small, plan, report = compress(model(), "pca", **common, out=tmp_path / "out")
    ranks = [action.rank for action in plan.actions if action.layer.split(".")[0] == "conv2"]
    assert ranks == [40, 25, 16]  # of 64, times 0.25 ** (1/3), (2/3), 1
    assert [type(part) for part in small.conv2] == [nn.Conv2d, nn.Conv2d]
    assert [action.fuse_into for action in plan.actions if action.layer == "conv2.0"] == ["conv2.1"] * 2
    assert plan.asked["ranks"] == report["asked"]["budget"]["ranks"] == 0.25
    assert "of the ranks" in (tmp_path / "out" / "report.html").read_text()
    loaded = pcafast.load(model(), tmp_path / "out")
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded.eval()(x), small.eval()(x))


def test_fitted_factors_keep_the_batch_norms_and_more_of_the_outputs(tmp_path):
    network = model()
    common = arguments(steps=1, retrain_epochs=0, budget=pcafast.Budget(macs=0.35), calibration=batches(count=8))
    x = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    errors = {}
    for refit in (False, True):
        result = compress(network, "pca", **common, refit=refit, out=tmp_path / str(refit))
        stages = [entry["stage"] for entry in result.report["history"]]
        assert ("batch norm re-estimated" in stages) is not refit
        assert result.report["asked"]["refit"] is refit
        errors[refit] = (result.model.eval()(x) - network.eval()(x)).square().mean()
    assert errors[True] < 0.8 * errors[False]
    for name, buffer in network.named_buffers():
        assert torch.equal(result.model.get_buffer(name), buffer)


@pytest.mark.parametrize("method", ["pca-input", "uncentred", "fisher", "gradient", "greedy"])
def test_every_basis_meets_the_budget(method, tmp_path):
    result = compress(model(), method, **arguments(steps=1, retrain_epochs=0), out=tmp_path / "out")
    assert result.report["reached"]["macs"]["share"] <= 0.5
    sides = {action.side for action in result.plan.actions}
    assert sides == {"input" if method == "pca-input" else "output"}
    for spectrum in result.report["spectra"]:
        assert sum(spectrum["eigenvalues"]) > 0


def test_directions_of_your_own(tmp_path):
    def last_channels(network, _batches, _layers):
        def basis(layer):
            order = torch.arange(layer.out_channels, dtype=torch.float64)
            return pcafast.bases.eigen(torch.diag(order), torch.zeros(layer.out_channels), select="signed")

        return {name: basis(one) for name, one in network.named_modules() if isinstance(one, nn.Conv2d)}

    own = pcafast.Directions("last channels", last_channels)
    result = compress(model(), own, **arguments(steps=1, retrain_epochs=0), out=tmp_path / "out")
    for action in result.plan.actions:
        second = result.model.get_submodule(action.layer)[1].weight[:, :, 0, 0]
        width = len(second)
        assert second.nonzero()[:, 0].tolist() == list(range(width - action.rank, width))

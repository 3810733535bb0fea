"""The result folder: saved, loaded in a new process, and refused when something is wrong with it."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import pcafast
from pcafast import result
from pcafast.errors import ArgumentError, FileError
from pcafast.models import build
from pcafast.plan import Budget, plan_low_rank


def _fresh():
    return build("digits_cnn").eval()


def _compressed(model, x):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    plan = plan_low_rank(model, stats["covariance"], budget=Budget(macs=0.5), example_input=x)
    return plan.apply(model), plan


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(images, tmp_path):
    torch.manual_seed(0)
    model = _fresh()
    model.bn1.running_mean.normal_()
    small, plan = _compressed(model, images)
    with torch.no_grad():  # as if retrained: the weights are no longer those that the plan gives
        for parameter in small.parameters():
            parameter.add_(0.01)
    result.save(small, plan, tmp_path / "small", {"accuracy": {"before": 0.9, "after": 0.88}})
    return small, plan, tmp_path / "small"


def test_loaded_model_is_the_saved_one(saved, images):
    small, _, folder = saved
    fresh = _fresh()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    loaded = result.load(fresh, folder)
    assert str(loaded) == str(small)
    assert torch.equal(loaded(images), small(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_loaded_in_a_new_process_without_unpickling(saved, images, tmp_path):
    small, _, folder = saved
    torch.save(images, tmp_path / "images.pt")
    script = """
import pickle, sys
import torch
from pcafast import result
from pcafast.models import build
images = torch.load(sys.argv[2], weights_only=True)
fresh = build("digits_cnn").eval()
pickle.Unpickler = pickle.load = pickle.loads = None
torch.save(result.load(fresh, sys.argv[1])(images), sys.argv[3])
"""
    paths = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), small(images))


def test_folder_holds_plan_weights_and_report(saved):
    _, plan, folder = saved
    names = ["model.safetensors", "plan.json", "report.html", "report.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    report = json.loads((folder / "report.json").read_text())
    planned = {"asked": plan.asked, "reached": plan.reached, "skipped": plan.skipped}
    assert report == {"format": "pcafast report", "version": 1, **planned, "accuracy": {"before": 0.9, "after": 0.88}}
    assert "<title>" in (folder / "report.html").read_text()
    assert json.loads((folder / "plan.json").read_text())["reached"] == plan.reached


class Tied(nn.Module):
    """The first and the last layer share a weight, which the constructor may leave to later."""

    def __init__(self, tie):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        if tie:
            self.tie()

    def tie(self):
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu()).relu())


@pytest.mark.parametrize("fresh_is_tied", [True, False])
def test_ties_survive(tmp_path, fresh_is_tied):
    torch.manual_seed(0)
    x = torch.randn(100, 16)
    small, plan = _compressed_by_ratio(Tied(tie=True), x)
    result.save(small, plan, tmp_path)
    loaded = result.load(Tied(fresh_is_tied), tmp_path)
    assert loaded.last.weight is loaded.first.weight
    assert torch.equal(loaded(x), small(x))
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * sum(p.numel() for p in small.parameters()) + 2000


def _compressed_by_ratio(model, x):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        model(x)
    plan = plan_low_rank(model, stats["covariance"], ratio=0.25)
    return plan.apply(model), plan


def test_views_of_one_memory_are_saved_apart(tmp_path, images):
    small, plan = _compressed(_fresh(), images)
    memory = torch.randn(20)
    small.linear.bias = nn.Parameter(memory[:10])
    small.linear.register_buffer("extra", memory[2:12])
    result.save(small, plan, tmp_path)
    fresh = _fresh()
    fresh.linear.register_buffer("extra", torch.zeros(10))
    loaded = result.load(fresh, tmp_path)
    assert torch.equal(loaded.linear.bias, memory[:10])
    assert torch.equal(loaded.linear.extra, memory[2:12])


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_missing_and_truncated_files_are_refused(saved, name):
    _, _, folder = saved
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError, match="cut off"):
        result.load(_fresh(), folder)
    (folder / name).unlink()
    with pytest.raises(FileError, match=f"cannot read .*{name}: No such file"):
        result.load(_fresh(), folder)


def test_files_of_two_results_do_not_mix(saved, tmp_path):
    small, plan, folder = saved
    with torch.no_grad():
        small.linear.bias.add_(1)
    result.save(small, plan, tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(FileError, match=r"not the file that was saved with its plan.*comes from another result"):
        result.load(_fresh(), folder)


def test_another_version_is_refused(saved):
    _, _, folder = saved
    document = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(FileError, match="plan of version 99"):
        result.load(_fresh(), folder)


def test_a_model_of_another_kind_is_refused(saved):
    _, _, folder = saved
    larger, smaller, wider = _fresh(), _fresh(), _fresh()
    larger.extra = nn.Linear(5, 5)
    with pytest.raises(ArgumentError, match=r"only the fresh one has a tensor 'extra.bias' \(and 1 more differ\)"):
        result.load(larger, folder)
    smaller.bn3 = nn.Identity()
    with pytest.raises(ArgumentError, match=r"only the saved one has a tensor 'bn3.bias' \(and 4 more differ\)"):
        result.load(smaller, folder)
    wider.linear = nn.Linear(64, 11)
    with pytest.raises(ArgumentError, match=r"tensor 'linear.bias' .* shape \(10,\) .* found \(11,\)"):
        result.load(wider, folder)
    with pytest.raises(ArgumentError, match=r"torch.float32 as in the saved model, found .* torch.float64"):
        result.load(_fresh().double(), folder)


def test_a_report_that_json_cannot_hold_writes_nothing(saved, tmp_path):
    small, plan, _ = saved
    with pytest.raises(ArgumentError, match="report: expected what JSON can hold"):
        result.save(small, plan, tmp_path / "new", {"model": small})
    assert not (tmp_path / "new").exists()


def test_a_state_that_is_not_tensors_is_refused(saved, tmp_path):
    class Stateful(nn.Module):
        def get_extra_state(self):
            return {"step": 3}

    small, plan, _ = saved
    small.add_module("extra", Stateful())
    with pytest.raises(ArgumentError, match=r"expected a state of tensors only, got a dict as 'extra._extra_state'"):
        result.save(small, plan, tmp_path / "new")


def test_a_place_that_cannot_be_written_is_an_error(saved, tmp_path):
    small, plan, _ = saved
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"):
        result.save(small, plan, tmp_path / "file" / "folder")

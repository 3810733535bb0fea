"""Plans as files: what is written is read again, and what is damaged is refused."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import pcafast
from pcafast.errors import ArgumentError, FileError, PcafastError
from pcafast.plan import Budget, Plan, plan_low_rank


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, bias=False), nn.Conv2d(24, 8, 1))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(net, images, tmp_path):
    with torch.no_grad(), pcafast.collect(net, covariance=pcafast.Covariance()) as stats:
        net(images)
    plan = plan_low_rank(net, stats["covariance"], budget=Budget(macs=0.5), example_input=images)
    plan.save(tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def test_saved_plan_gives_the_same_model(net, saved, images):
    plan, path = saved
    loaded = Plan.load(path)
    assert [path.name for path in sorted(path.parent.iterdir())] == ["plan.json", "plan.safetensors"]
    assert (loaded.actions, loaded.asked, loaded.reached, loaded.skipped) == (
        plan.actions,
        plan.asked,
        plan.reached,
        plan.skipped,
    )
    assert torch.equal(loaded.apply(net)(images), plan.apply(net)(images))
    assert json.loads(str(plan))["actions"] == json.loads(path.read_text())["actions"]


def _edited(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_rank_lowered_by_hand_keeps_the_first_directions(net, saved):
    plan, path = saved
    (action,) = plan.actions
    assert (action.layer, action.fuse_into) == ("2", "3")
    assert action.rank > 2
    small = Plan.load(_edited(path, lambda document: document["actions"][0].update(rank=2))).apply(net)
    assert (small[2].out_channels, small[3].in_channels) == (2, 2)
    assert torch.equal(small[2].weight, plan.apply(net)[2].weight[:2])


def test_rank_raised_by_hand_is_refused(net, saved):
    plan, path = saved
    stored = plan.actions[0].rank
    with pytest.raises(ArgumentError, match=f"expected at most {stored}, the directions stored .* got {stored + 1}"):
        Plan.load(_edited(path, lambda document: document["actions"][0].update(rank=stored + 1))).apply(net)


def test_plan_without_tensors_says_where_they_would_be(net, saved):
    plan, _ = saved
    with pytest.raises(PcafastError, match=r"holds no tensors, only the structure.*pcafast.load"):
        dataclasses.replace(plan, tensors=None).apply(net)
    with pytest.raises(ArgumentError, match=r"expected a tensor '.*encoder' for layer"):
        dataclasses.replace(plan, tensors={}).apply(net)
    wrong = {name: tensor[..., :1] for name, tensor in plan.tensors.items()}
    with pytest.raises(ArgumentError, match=r"expected tensor .*encoder. to be of shape"):
        dataclasses.replace(plan, tensors=wrong).apply(net)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format="something"), 'is not a plan: expected JSON with "format": "pcafast plan"'),
        (lambda d: d.update(version=2), "plan of version 2, and this pcafast reads version 1"),
        (lambda d: d.pop("asked"), 'expected an object under "asked", got None'),
        (lambda d: d.update(actions={}), 'expected a list under "actions"'),
        (lambda d: d["actions"].append(3), "expected actions of kind low_rank, prune, got 3"),
        (lambda d: d["actions"][0].update(kind="melt"), "expected actions of kind low_rank, prune, got"),
        (lambda d: d["actions"][0].pop("side"), "low_rank action '.*' cannot be read: .*side"),
        (lambda d: d["actions"][0].update(side="left"), "side .* expected 'output', 'input' or 'both', got 'left'"),
        (lambda d: d["actions"][0].update(rank=0), "rank .* expected a positive integer, got 0"),
        (lambda d: d["actions"][0].update(rank=True), "rank .* expected a positive integer, got True"),
        (lambda d: d["actions"][0].update(weight_shape="big"), "weight_shape .* expected a list of sizes"),
        (lambda d: d["actions"][0].update(layer=3), "layer .* expected a layer's name, got 3"),
        (lambda d: d["actions"][0].update(fuse_into=3), "fuse_into .* expected a layer's name or null, got 3"),
    ],
)
def test_damaged_plan_files_are_refused(saved, edit, message):
    with pytest.raises(FileError, match=message):
        Plan.load(_edited(saved[1], edit))


def test_missing_truncated_and_exchanged_plan_files_are_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(FileError, match=r"cannot read .*nowhere\.json: No such file"):
        Plan.load(tmp_path / "nowhere.json")
    beside = path.with_suffix(".safetensors")
    data = beside.read_bytes()
    beside.write_bytes(data[:-1])
    with pytest.raises(FileError, match="not the file that was saved with its plan"):
        Plan.load(path)
    beside.unlink()
    with pytest.raises(FileError, match=r"cannot read .*plan\.safetensors"):
        Plan.load(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FileError, match=r"it is not JSON .* may have been cut off"):
        Plan.load(path)

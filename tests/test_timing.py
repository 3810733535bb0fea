"""Times of layers, by layers that take a known time."""

import sys
import time

import pytest
import torch
from torch import nn

import pcafast
from pcafast.cli import main
from pcafast.loop.timing import time_layers

NAP = 0.02


class Sleeper(nn.Linear):
    def forward(self, x):
        time.sleep(NAP)
        return super().forward(x)


class Sleepy(nn.Module):
    """Calls `twice` two times and `never` not at all, in another order than that of its definition."""

    def __init__(self):
        super().__init__()
        self.quick = nn.Linear(4, 4)
        self.twice = Sleeper(4, 4, bias=False)
        self.never = nn.Linear(4, 2)
        self.once = Sleeper(4, 4)

    def forward(self, x):
        assert not self.training
        return self.twice(self.quick(self.twice(self.once(x))))


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_times_are_those_that_the_layers_take():
    model = Sleepy().train()
    found = {time.layer: time for time in time_layers(model, torch.randn(2, 4), repeats=5)}
    assert list(found) == ["once", "twice", "quick", "never"]  # as called
    # A nap is never shorter than asked for, and on a busy machine longer.
    assert NAP <= found["once"].seconds < 1.9 * NAP
    assert 2 * NAP <= found["twice"].seconds < 3.8 * NAP
    assert found["quick"].seconds < 0.1 * NAP
    assert found["never"][2:4] == (0, 0)
    shares = {name: time.share for name, time in found.items()}
    assert shares["once"] == pytest.approx(1 / 3, abs=0.1)
    assert shares["twice"] == pytest.approx(2 / 3, abs=0.1)
    assert sum(shares.values()) <= 1
    assert [(time.type, time.params) for time in found.values()] == [
        *(("Sleeper", 20), ("Sleeper", 16), ("Linear", 20), ("Linear", 10))
    ]
    assert (hooks(model), model.training, model.twice.training) == ([], True, True)


def test_layers_can_be_chosen_and_stand_inside_each_other():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Sleeper(4, 4)))
    outer, inner = time_layers(model, torch.randn(2, 4), layers="1*", repeats=2)
    assert (outer.layer, inner.layer) == ("1", "1.0")
    assert outer.seconds >= inner.seconds >= NAP


def test_an_error_in_the_forward_leaves_no_hooks():
    model = Sleepy()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        time_layers(model, torch.randn(2, 5))
    assert hooks(model) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"repeats": 0}, "repeats: expected at least one forward"), ({"layers": "conv"}, "no layer of the model matches")],
)
def test_wrong_arguments_are_named(settings, message):
    with pytest.raises(pcafast.ArgumentError, match=message):
        time_layers(Sleepy(), torch.randn(2, 4), **settings)


def test_time_on_the_device(device):
    """A product a thousand times larger takes longer, and all takes less than the whole."""
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2)).to(device)
    large, small = time_layers(model, torch.randn(512, 2048), repeats=5)
    assert large.seconds > small.seconds > 0
    assert large.share + small.share <= 1


def test_stats_prints_a_table_slowest_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    files = []
    for name, options in (("with", ["--timings"]), ("without", [])):
        out = tmp_path / f"{name}.safetensors"
        arguments = ["stats", "digits_cnn", "--out", str(out), "--images", "64", "--statistics", "moments", *options]
        monkeypatch.setattr(sys, "argv", ["pcafast", *arguments])
        torch.manual_seed(0)  # the network's weights
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        files.append(pcafast.load_statistics(out)["moments"])
        printed = capsys.readouterr().out
        assert ("ms per batch" in printed) == bool(options)
        if options:
            table = printed[printed.index("ms per batch") :].splitlines()[1:5]
    means = [{name: one.compute().mean.tolist() for name, one in file.items()} for file in files]
    assert means[0] == means[1]  # the file is the same with timings and without
    rows = {line.split()[0]: line.split()[1:] for line in table}
    params = {"conv1": ("Conv2d", "288"), "conv2": ("Conv2d", "18,432"), "conv3": ("Conv2d", "36,864")}
    assert {name: (row[0], row[3]) for name, row in rows.items()} == {**params, "linear": ("Linear", "650")}
    milliseconds, shares, weights = ([float(row[i].rstrip("%")) for row in rows.values()] for i in (1, 2, 4))
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert 0 < sum(shares) <= 100
    # What is left are the batch norms: 2 (32 + 64 + 64) of 56,554.
    assert sum(weights) == pytest.approx(99.4, abs=0.2)

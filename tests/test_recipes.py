"""The predecessors' experiments on a handful of images: that they run, what they count, and what they write."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pcafast import models
from pcafast.cli import main
from pcafast.errors import ArgumentError, FileError
from pcafast.recipes import RECIPES, pca_mnist

CLASSES = 10


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """64 training and 50 test images in MNIST's format: of class c, noise and a bright bar c."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 64), ("t10k", 50)):
        labels = np.arange(count) % CLASSES
        images = generator.integers(0, 150, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 2 : 2 * label + 5] = 255
        write_idx(raw / f"{stem}-images-idx3-ubyte", images)
        write_idx(raw / f"{stem}-labels-idx1-ubyte", labels)
    return root


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    for name, number in {"SAMPLES": 128, "MEAN_IMAGES": 50, "BATCH_SIZE": 32}.items():
        monkeypatch.setattr(pca_mnist, name, number)


@pytest.fixture
def reproduce(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcafast", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        output = capsys.readouterr()
        return done.value.code, output.out, output.err

    return run


def test_pca_mnist_trains_three_networks(mnist):
    results = pca_mnist.run(mnist, epochs=2, seeds=2, seed=5)
    assert results == json.loads(json.dumps(results))
    small, random, whole = (results["networks"][name] for name in ("Hessian", "random factors", "whole"))
    # Of the whole: 320 + 18,496 + 1,179,776 + 1,290 parameters. The factors of the second convolution: 32 x 288 and 32,
    # 64 x 32 and 64; of the linear layer: 64 x 9,216 and 64, 128 x 64 and 128.
    assert whole["params"] == sum(one.numel() for one in models.build("mnist_cnn").parameters())
    assert small["params"] == random["params"] == 320 + 11_360 + 598_208 + 1_290
    positions, rest = 24 * 24, 26 * 26 * 288 + 1_280
    assert whole["macs"] == rest + positions * 18_432 + 1_179_648
    assert small["macs"] == random["macs"] == rest + positions * (32 * 288 + 64 * 32) + 64 * (9_216 + 128)
    for network in results["networks"].values():
        assert list(network["accuracy"]) == ["5", "6"]
        assert all(len(epochs) == 2 for epochs in network["accuracy"].values())
        assert max(epochs[-1] for epochs in network["accuracy"].values()) > 3 / CLASSES
    # Rank 8 of the first convolution: 8 (9 + 32) weights for 9 x 32.
    assert list(results["left_whole"]) == ["conv1"]
    assert "rank 8 of 32" in results["left_whole"]["conv1"]


def test_pca_mnist_is_the_same_for_the_same_seed(mnist):
    one, again, other = (pca_mnist.run(mnist, epochs=1, seeds=1, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert accuracies(one) != accuracies(other)


def accuracies(results):
    return [epochs for network in results["networks"].values() for epochs in network["accuracy"].values()]


def test_the_optimizer_is_adadelta_with_a_rate_that_falls_to_zero(mnist, monkeypatch):
    rates = []
    step = torch.optim.Adadelta.step

    def recorded(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.Adadelta, "step", recorded)
    pca_mnist.run(mnist, epochs=2, seeds=1)
    assert rates == pytest.approx(3 * [1, 0.75, 0.5, 0.25])


def test_the_table_holds_means_and_extremes():
    network = {"params": 1000, "macs": 2000, "accuracy": {"0": [0.5, 0.9], "1": [0.6, 0.8]}}
    titles, rows, notes = pca_mnist.table({"networks": {"whole": network}, "left_whole": {"conv1": "it is dear"}})
    assert titles == ["", "epoch 1", "epoch 2", "of 2 seeds", "params", "MACs"]
    assert rows == [["whole", "55.00%", "85.00%", "80.00% .. 90.00%", "1,000", "2,000"]]
    assert notes == ["conv1 is left whole: it is dear"]


def test_data_of_another_kind(tmp_path):
    with pytest.raises(FileError, match="no data set"):
        pca_mnist.run(tmp_path / "absent")
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4))
    with pytest.raises(ArgumentError, match=r"data: expected torchvision's folder of MNIST.*have \(3, 32, 32\)"):
        pca_mnist.run(tmp_path / "a.npz")


def test_reproduce_prints_and_writes(mnist, reproduce):
    code, out, err = reproduce("pca-mnist", "--data", mnist, "--epochs", 1, "--seeds", 1, "--device", "cpu")
    assert (code, err) == (0, "")
    written = json.loads(Path("pcafast-reproduce/pca_mnist.json").read_text())
    assert written["command"] == "pcafast reproduce pca-mnist --data FOLDER --epochs 1 --seeds 1 --device cpu"
    assert written["environment"]["torch"] == torch.__version__
    titles, rows, notes = pca_mnist.table(written["results"])
    assert all(cell in out for cells in (titles, *rows, notes) for cell in cells)
    assert "written to pcafast-reproduce/pca_mnist.json" in out


def test_in_a_clone_the_results_go_where_tables_are_rendered_from(mnist, reproduce, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "pca-mnist", Stub)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "render.py").touch()
    monkeypatch.chdir(tmp_path / "benchmarks")
    assert reproduce("pca-mnist", "--data", mnist)[0] == 0
    assert (tmp_path / "benchmarks" / "results" / "pca_mnist.json").exists()
    assert reproduce("pca-mnist", "--data", mnist, "--out", tmp_path / "mine")[0] == 0
    assert json.loads((tmp_path / "mine" / "pca_mnist.json").read_text())["results"]["device"] == "cpu"


def test_a_recipe_has_options_of_its_own(reproduce, monkeypatch):
    monkeypatch.setitem(RECIPES, "stub", Stub)
    words = ("--lines", 3, "--big", "--share", 0.25, "--work", "there")
    code, _, err = reproduce("stub", "--data", "digits", *words, "--out", "mine")
    assert (code, err) == (0, "")
    written = json.loads(Path("mine/stub.json").read_text())
    assert written["results"] == {"device": "cpu", "lines": 3, "big": True, "share": 0.25, "work": "there"}
    assert written["command"] == "pcafast reproduce stub --data FOLDER --lines 3 --big --share 0.25 --work there"
    assert "--lines 1  --big False  --share 0.5  --work work" in reproduce("--list")[1]


class Stub:
    """A recipe that says what it was given."""

    SUMMARY = "nothing"

    @staticmethod
    def run(data, *, lines: int = 1, big: bool = False, share: float = 0.5, work: Path = Path("work"), device):
        return {"device": str(device), "lines": lines, "big": big, "share": share, "work": str(work)}

    @staticmethod
    def table(results):
        return pca_mnist.Table(["", "device"], [["on", results["device"]]], [])


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_recipes_are_listed(arguments, reproduce):
    code, out, err = reproduce(*arguments)
    assert (code, err) == (0, "")
    assert all(name in out and recipe.SUMMARY in out for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pca-cifar"], "recipe: expected any of pca-mnist.* got 'pca-cifar'"),
        (["pca-mnist"], "--data: expected the folder"),
        (["pca-mnist", "--data", "absent"], "no data set absent exists"),
        (["pca-mnist", "--data", "digits"], r"those of digits have \(1, 8, 8\)"),
        (
            ["stub", "--data", "digits", "--epochs", 2],
            "--epochs: the recipe stub has no such option. It has --lines, --big",
        ),
        (["stub", "--data", "digits", "--lines", "many"], "--lines: expected a whole number after it, got many"),
        (["pca-mnist", "--data", "digits", "--seeds", 0], "seeds: expected at least 1, got 0"),
        (["pca-mnist", "--data", "digits", "--epochs=0"], "epochs: expected at least 1, got 0"),
        (["stub", "--data", "digits", "--lines"], "--lines: expected a whole number after it, got nothing"),
        (["pca-mnist", "--data", "digits", "--device", "tpu"], "--device: expected cpu"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(arguments, message, reproduce, monkeypatch, tmp_path):
    import re

    monkeypatch.setitem(RECIPES, "stub", Stub)
    code, _, err = reproduce(*arguments)
    assert code == 2
    assert re.search(message, err.replace("\n", " ")), err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

"""The recipes of pca-compress on images made up for the purpose: that they run, and keep to their rules."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pcafast.errors import ArgumentError
from pcafast.models import build
from pcafast.recipes import RECIPES, pca_cifar_resnet56


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Random images, and ResNet-20 with random weights, under the names that the recipe looks for."""
    folder = tmp_path_factory.mktemp("cifar")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"cifar10-{split}.npz", images=images, labels=np.arange(48) % 10)
    torch.manual_seed(0)
    torch.save(build("resnet20").state_dict(), folder / pca_cifar_resnet56.WEIGHTS["resnet20"])
    return folder


def test_every_method_on_cifar_has_the_macs_of_the_rule(cifar, monkeypatch):
    recipe = RECIPES["pca-cifar-resnet56"]
    monkeypatch.setattr(recipe, "WEIGHTS", {"resnet20": recipe.WEIGHTS["resnet20"]})
    monkeypatch.setattr(recipe, "RATIOS", (0.5,))
    monkeypatch.setattr(recipe, "HESSIAN_SAMPLES", 64)
    made = {}
    monkeypatch.setattr(
        recipe._Experiment, "_row", lambda _, model, what: made.setdefault(what, model) and {"accuracy": 0.1}
    )
    results = json.loads(json.dumps(recipe.run(cifar, images=48, epochs=1)))
    (budget,) = results["resnet20"]["budgets"]
    assert set(made) == {"original", *budget["rows"]}
    assert len(budget["rows"]) == 14
    x = torch.randn(2, 3, 32, 32)
    original = made.pop("original")
    macs = {what: _macs(model, x) / _macs(original, x) for what, model in made.items()}
    assert macs[recipe.UNIFORM] == pytest.approx(budget["share_of_macs"], rel=1e-6)
    assert all(0.9 * budget["share_of_macs"] < share <= budget["share_of_macs"] + 1e-9 for share in macs.values())
    for name, layer in original.named_modules():
        if isinstance(layer, nn.Conv2d):
            uniform = made[recipe.UNIFORM].get_submodule(name)
            halved = layer.stride == (1, 1)
            assert isinstance(uniform, nn.Sequential) == halved
            assert not halved or uniform[0].out_channels == layer.out_channels // 2
    titles, rows, notes = recipe.table(results)
    assert titles == ["", f"ResNet-20, {budget['share_of_macs']:.0%} of MACs"]
    assert [row[0] for row in rows] == ["original", *budget["rows"]]
    assert {cell for _, cell in rows} == {"10.00%"}
    assert "ResNet-20" in notes[0]


def _macs(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops()


@pytest.fixture
def tree(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(("apples", "pears")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for image in range(4):
                pixels = generator.integers(0, 128, (40, 48, 3), dtype=np.uint8) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    return tmp_path / "images"


def test_resnet18_is_compressed_step_by_step(tree, tmp_path):
    recipe = RECIPES["pca-imagenet-resnet18"]
    options = {"image_size": 32, "batch_size": 4, "work": tmp_path / "work"}
    results = recipe.run(tree, prune_dim=0.5, prune_step=0.7, tune_epochs=1, **options)
    stages = [(entry["step"], entry["stage"]) for entry in results["history"]]
    assert stages == [(0, "original"), (1, "compressed"), (1, "retrained"), (2, "compressed"), (2, "retrained")]
    original = build("torchvision:resnet18", num_classes=2)
    stride_one = {
        name: layer
        for name, layer in original.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1)
    }
    assert results["ranks"] == {name: [one.out_channels, one.out_channels // 2] for name, one in stride_one.items()}
    title, first, *_ = recipe.table(results).rows[0]
    assert title == "step 0, original"
    assert first.endswith("%")
    with pytest.raises(ArgumentError, match=r"prune_step: expected a share in \(0, 1\), got 1"):
        recipe.run(tree, prune_step=1.0, **options)

"""Numbers on real data.

PCAFAST_DATA names a folder with MNIST/raw, cifar10-train.npz, cifar10-test.npz and the checkpoints below.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from pcafast import data, models
from pcafast.cli import main

DATA = Path(os.environ.get("PCAFAST_DATA", ""))

pytestmark = pytest.mark.skipif("PCAFAST_DATA" not in os.environ, reason="PCAFAST_DATA is not set")


@pytest.mark.parametrize(
    ("name", "checkpoint", "published"),
    [("resnet20", "resnet20-12fca82f.th", 9173), ("resnet56", "resnet56-4bfd9763.th", 9339)],
)
def test_accuracy_of_the_published_checkpoints(name, checkpoint, published):
    model = models.build(name, weights=DATA / checkpoint).eval()
    dataset = data.open_dataset(str(DATA / "cifar10-{split}.npz"), "test")
    with torch.inference_mode():
        correct = sum(
            int((model(images).argmax(1) == labels).sum()) for images, labels in data.loader(dataset, batch_size=250)
        )
    assert len(dataset) == 10_000
    assert abs(correct - published) <= 2


@pytest.mark.parametrize(
    ("options", "least"), [((), 0.83), (("--refit", "--images", 512), 0.875)], ids=["PCA", "fitted front to back"]
)
def test_low_rank_without_retraining(options, least, tmp_path, monkeypatch):
    """At the MACs that half the rank of every stride-1 convolution has: pca-compress's own code reaches 79.44 %."""
    arguments = [
        *("pcafast", "compress", "resnet20", "--weights", DATA / "resnet20-12fca82f.th", *options),
        *("--data", DATA / "cifar10-{split}.npz", "--budget", "macs=0.584", "--out", tmp_path / "small"),
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["after"]["images"] == 10_000
    assert report["after"]["accuracy"] >= least
    assert report["after"]["macs"] <= 0.584 * report["before"]["macs"]


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_mnist_opens_whole(split, count):
    dataset = data.open_dataset(str(DATA), split)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (count, (1, 28, 28), 10)
    images, labels = next(iter(data.loader(dataset, batch_size=count)))
    assert images.mean().item() == pytest.approx(0, abs=0.01 if split == "train" else 0.02)
    assert images.std().item() == pytest.approx(1, abs=0.01)
    assert labels.bincount().min() > 0.08 * count

"""Numbers on real data.

PCAFAST_DATA names a folder with MNIST/raw, cifar10-train.npz, cifar10-test.npz and the checkpoints below.
"""

import os
from pathlib import Path

import pytest
import torch

from pcafast import data, models

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


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_mnist_opens_whole(split, count):
    dataset = data.open_dataset(str(DATA), split)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (count, (1, 28, 28), 10)
    images, labels = next(iter(data.loader(dataset, batch_size=count)))
    assert images.mean().item() == pytest.approx(0, abs=0.01 if split == "train" else 0.02)
    assert images.std().item() == pytest.approx(1, abs=0.01)
    assert labels.bincount().min() > 0.08 * count

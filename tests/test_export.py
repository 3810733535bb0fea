"""Smaller models leave: through torch.export, through ONNX, and through their folder into another process."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import pcafast
from pcafast import models

SIZES = {"digits_cnn": (1, 8, 8), "lenet5": (1, 28, 28), "mnist_cnn": (1, 28, 28)}
NAMES = [*sorted(set(models.available()) - {"resnet32", "resnet44", "resnet56", "resnet110"}), "torchvision:resnet50"]
HOW = ["low_rank", "pruned"]


def smaller(model, example, how):
    """A compressed copy of the model, with its plan."""
    if how == "pruned":
        scores = pcafast.scores.filter_norm(model)
        plan = pcafast.plan_pruning(model, scores, budget=pcafast.Budget(macs=0.5), example_input=example)
        return plan.apply(model), plan
    # The widest layers have the slowest eigenvalues, and are of no other kind than the rest.
    layers = [name for name, module in model.named_modules() if is_narrow_layer(module)]
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance(), layers=layers) as stats:
        model(example)
    plan = pcafast.plan_low_rank(model, stats["covariance"], ratio=0.25, example_input=example)
    return plan.apply(model), plan


def is_narrow_layer(module):
    return isinstance(module, nn.Conv2d | nn.Linear) and len(module.weight) <= 128


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=HOW)
def made(request, name):
    """(model, plan, images, outputs)."""
    torch.manual_seed(0)
    model = models.build(name)
    images = torch.randn(3, *SIZES.get(name, (3, 32, 32)))
    with torch.no_grad():
        model(images)  # in training mode, so that the batch norms know how large the activations are
    model.eval()
    small, plan = smaller(model, images, request.param)
    assert plan.actions
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        return small, plan, images, small(images)


def test_torch_export(made):
    small, _, images, expected = made
    program = torch.export.export(small, (images,))
    with torch.no_grad():
        outputs = program.module()(images)
    # The same operations in the same order.
    assert torch.equal(outputs, expected)


def test_onnx(made, tmp_path):
    small, _, images, expected = made
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.isfinite(outputs).all()
    # onnxruntime adds up in another order and folds batch norms into convolutions: some float32 roundings per layer.
    assert np.abs(outputs - expected.numpy()).max() < 2e-5 * expected.abs().max()


LOADING = """
import sys
import torch
import pcafast
name, folder, images, outputs = sys.argv[1:]
model = pcafast.load(pcafast.models.build(name), folder).eval()
with torch.no_grad():
    torch.save(model(torch.load(images, weights_only=True)), outputs)
"""


def test_folder_loads_in_a_process_that_never_saw_the_plan_made(made, name, tmp_path):
    small, plan, images, expected = made
    pcafast.save(small, plan, tmp_path / "small")
    torch.save(images, tmp_path / "images.pt")
    arguments = [name, tmp_path / "small", tmp_path / "images.pt", tmp_path / "outputs.pt"]
    subprocess.run([sys.executable, "-c", LOADING, *map(str, arguments)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), expected)

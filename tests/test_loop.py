"""Training, evaluating, calibrating and measuring against what is known beforehand."""

import copy
import math

import pytest
import torch
from torch import nn

import pcafast
from pcafast.loop import Trainer, calibrate, evaluate, measure


def labelled(*sizes, classes=3):
    return [(torch.randn(size, 4), torch.randint(0, classes, (size,))) for size in sizes]


class FirstPixels(nn.Module):
    """Class scores are the first three inputs."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return self.dropout(x[:, :3])


def test_evaluate_counts_and_keeps_modes():
    model, batches = FirstPixels().train(), labelled(5, 2)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = evaluate(model, batches)
    assert found.correct == int((inputs[:, :3].argmax(1) == labels).sum())
    assert (found.images, found.accuracy) == (7, found.correct / 7)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(inputs[:, :3], labels)), rel=1e-6)
    assert model.training
    assert model.dropout.training


def test_the_trainer_learns_a_linear_rule():
    weight, model = torch.randn(4, 3), nn.Linear(4, 3)
    inputs = torch.randn(600, 4)
    batches = [(x, (x @ weight).argmax(1)) for x in inputs.split(50)]
    trainer = Trainer(model, 5 * len(batches), learning_rate=0.5, weight_decay=0)
    losses = [trainer.epoch(batches) for _ in range(5)]
    assert losses[-1] < 0.5 * losses[0]
    assert evaluate(model, batches).accuracy > 0.95


def test_the_trainer_leaves_frozen_parameters_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    Trainer(model, 1).epoch(labelled(8))
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False]


def test_the_trainer_steps_as_sgd_does():
    """By torch's own optimizer, with the schedule worked out by hand: rising for a tenth, then falling as a cosine."""
    mine = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    theirs, batches = copy.deepcopy(mine).train(), labelled(*[8] * 20)
    trainer = Trainer(mine, 20, learning_rate=0.3, weight_decay=0.1, label_smoothing=0.2)
    losses = [trainer.epoch(batches[:10]), trainer.epoch(batches[10:])]
    flat, weights = ([one for one in theirs.parameters() if (one.ndim == 1) == wanted] for wanted in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": flat}]
    optimizer = torch.optim.SGD(groups, 0.3, momentum=0.9, nesterov=True)
    expected = []
    for number, (inputs, labels) in enumerate(batches):
        rate = 0.15 * (number + 1) if number < 2 else 0.15 * (1 + math.cos(math.pi * (number - 1) / 19))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = nn.functional.cross_entropy(theirs(inputs), labels, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx([sum(expected[:10]) / 10, sum(expected[10:]) / 10], rel=1e-6)
    for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


def test_the_trainer_goes_on_from_its_state():
    batches = labelled(8, 8, 8, 8)
    whole = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    whole[0].bias.requires_grad_(False)
    fresh = copy.deepcopy(whole)
    trainer = Trainer(whole, 8)
    trainer.epoch(batches)
    state, weights = copy.deepcopy(trainer.state_dict()), copy.deepcopy(whole.state_dict())
    trainer.epoch(batches)
    fresh.load_state_dict(weights)
    resumed = Trainer(fresh, 8)
    resumed.load_state_dict(state)
    resumed.epoch(batches)
    assert all(a.equal(b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))
    assert set(state) == {"steps", *(f"momentum.{name}" for name, _ in whole.named_parameters() if name != "0.bias")}


def test_the_trainer_says_that_it_diverged():
    model = nn.Linear(4, 3)
    with pytest.raises(pcafast.PcafastError, match=r"loss became nan after 1 steps at .* 0.25. Train with a lower"):
        Trainer(model, 2, learning_rate=0.25).epoch(
            [*labelled(4), (torch.full((2, 4), math.nan), torch.tensor([0, 1]))]
        )


def test_the_trainer_keeps_modes():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    model[1].train()
    Trainer(model, 1).epoch(labelled(2))
    assert (model.training, model[0].training, model[1].training) == (False, False, True)


def test_measure_counts_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    (costs,) = measure(model, batch=torch.randn(2, 3, 6, 6), repeats=2)
    assert costs.params == 8 * 27 + 8 + 16 + 5 * 288 + 5
    assert costs.macs == 36 * 8 * 27 + 5 * 288
    assert costs.seconds > 0


def test_measure_times_each_model_on_its_own():
    slow = nn.Sequential(*[nn.Linear(300, 300) for _ in range(100)])
    quick, long, again = measure(slow[:1], slow, slow[:1], batch=torch.randn(64, 300), repeats=5)
    assert long.macs == 100 * quick.macs
    assert long.seconds > 5 * max(quick.seconds, again.seconds)


def test_measure_counts_attention():
    """Whose fast path in inference mode hides its products from a counter of operations."""
    tokens, width = 7, 8
    model = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    products = 4 * width * width + 2 * width * 16 + 2 * tokens * width
    assert measure(model, batch=torch.randn(1, tokens, width), repeats=1)[0].macs == tokens * products


def test_calibrate_keeps_gradients_and_modes_even_after_an_error():
    model = nn.Linear(4, 3).train()
    model.weight.grad = torch.ones(3, 4)
    gradient = model.weight.grad
    calibrate(model, labelled(5), taylor=pcafast.Taylor())
    with pytest.raises(pcafast.ArgumentError, match="labels: expected 0 to 2, as the model has 3 outputs, got 9"):
        calibrate(model, [*labelled(5), (torch.randn(1, 4), torch.tensor([9]))], taylor=pcafast.Taylor())
    assert model.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3, 4))
    assert model.bias.grad is None
    assert model.training


@pytest.mark.parametrize("call", [evaluate, lambda m, b: calibrate(m, b, c=pcafast.Covariance())])
def test_bad_batches_are_explained(call):
    model = nn.Linear(4, 3)
    with pytest.raises(pcafast.ArgumentError, match="batches: expected at least one batch"):
        call(model, [])
    with pytest.raises(pcafast.PcafastError, match=r"cannot take a batch of images of shape \(2, 5\)"):
        call(model, [(torch.randn(2, 5), torch.tensor([0, 1]))])
    with pytest.raises(pcafast.ArgumentError, match=r"labels: expected 0 to 2.*got -1"):
        call(model, [(torch.randn(2, 4), torch.tensor([0, -1]))])
    with pytest.raises(pcafast.ArgumentError, match=r"model: expected class scores of shape \(2, classes\)"):
        call(nn.Sequential(model, nn.Unflatten(1, (3, 1))), [(torch.randn(2, 4), torch.tensor([0, 1]))])


def test_a_model_without_gradients_cannot_be_calibrated_for_taylor():
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(pcafast.ArgumentError, match="no parameter requires a gradient"):
        calibrate(model, labelled(5), taylor=pcafast.Taylor())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected at least one batch"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number, got 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive number, got nan"),
        ({"weight_decay": -1}, "weight_decay: expected a number from 0 on, got -1"),
        ({"label_smoothing": 1}, r"label_smoothing: expected a share in \[0, 1\), got 1"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "model: expected parameters to train"),
    ],
)
def test_a_trainer_of_nothing_or_with_wrong_numbers_is_refused(settings, message):
    with pytest.raises(pcafast.ArgumentError, match=message):
        Trainer(**{"model": nn.Linear(2, 2), "steps": 1, **settings})


def test_a_trainer_without_batches():
    with pytest.raises(pcafast.ArgumentError, match="batches: expected at least one batch to train on"):
        Trainer(nn.Linear(4, 3), 1).epoch([])

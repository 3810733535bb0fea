"""Ranks by a list, and by losses that were measured."""

import itertools
import math

import pytest
import torch
from torch import nn

import pcafast
from pcafast.errors import ArgumentError
from pcafast.plan import Budget, plan_low_rank


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


BATCHES = [(torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed)), None) for seed in (1, 2)]
EXAMPLE = BATCHES[0][0][:1]


@pytest.fixture(scope="module")
def statistics(model):
    with torch.no_grad(), pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        for inputs, _ in BATCHES:
            model(inputs)
    return stats["covariance"]


def _ranks(plan):
    return {action.layer: action.rank for action in plan.actions}


def test_ranks_of_a_list_are_taken_unless_they_cost_more(model, statistics):
    plan = plan_low_rank(model, statistics, ranks={"0": 9, "2": 5})
    assert _ranks(plan) == {"2": 5}
    assert plan.asked == {"method": "low_rank", "ranks": {"0": 9, "2": 5}}
    assert plan.skipped == {
        "0": "rank 9 of 12 costs no less than the layer; 8 would",
        "5": "no rank was given for it",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": {"0": 0}}, "ranks: expected a whole number from 1 to 12 for layer '0', got 0"),
        ({"ranks": {"0": 13}}, "ranks: expected a whole number from 1 to 12 for layer '0', got 13"),
        ({"ranks": {"0": 2.0}}, r"ranks: expected a whole number from 1 to 12 for layer '0', got 2\.0"),
        ({"ranks": {"conv": 2}}, r"ranks: expected layers that there are statistics of \(0, 2, 5\), got 'conv'"),
        ({"ranks": 3}, "ranks: expected a mapping by the names of layers, got 3"),
        ({"budget": Budget(params=0.5), "losses": {"0": [1, 2]}}, r"losses: expected {rank: loss} for layer '0', got"),
        ({"budget": Budget(params=0.5), "losses": {"0": {1: "a"}}}, "losses: expected finite numbers .* '0'"),
        ({"ranks": {"0": 2}, "ratio": 0.5}, "exactly one of budget, ratio, energy and ranks, got ratio, ranks"),
        ({"ratio": 0.5, "losses": {}}, "losses: expected only with a budget"),
        ({"budget": Budget(params=0.5), "losses": {"0": {1: 0.1}}}, "losses: expected those of layer '2' .* got {}"),
        ({"budget": Budget(params=0.5), "losses": {"0": {0: 0.1}}}, "losses: .*'0' at some ranks from 1 to 12"),
        ({"budget": Budget(params=0.5), "losses": {"0": {1: math.nan}}}, "losses: expected finite numbers .* '0'"),
        ({"budget": Budget(params=0.5), "losses": {"0": {9: 0.1}}}, "losses: expected one at a rank .* up to 8"),
    ],
)
def test_wrong_ranks_and_losses_are_refused(model, statistics, options, message):
    with pytest.raises(ArgumentError, match=message):
        plan_low_rank(model, statistics, **options)


def _costs(layer, rank):
    outputs, inputs = layer.weight.flatten(1).shape
    return layer.weight.numel() + outputs if rank is None else rank * (inputs + outputs) + rank + outputs


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 0.9])
def test_ranks_by_losses_are_those_of_the_least_sum_along_straight_lines(model, statistics, share):
    losses = {"0": {2: 0.9, 6: 0.1}, "2": {1: 2.0, 4: 0.3, 8: 0.2}, "5": {1: 0.5, 3: 0.4}}
    full = {"0": 12, "2": 16, "5": 5}
    plan = plan_low_rank(model, statistics, budget=Budget(params=share), losses=losses)

    def loss(name, rank):
        points = {**losses[name], full[name]: 0.0}
        lower = max(known for known in points if known <= rank)
        upper = min(known for known in points if known >= rank)
        way = 0 if lower == upper else (rank - lower) / (upper - lower)
        return points[lower] + way * (points[upper] - points[lower])

    layers = {name: model[int(name)] for name in losses}
    ranks = {
        name: [None, *(r for r in range(min(losses[name]), full[name]) if _costs(layer, r) < _costs(layer, None))]
        for name, layer in layers.items()
    }
    whole = sum(parameter.numel() for parameter in model.parameters())
    best = min(
        sum(loss(name, rank) for name, rank in zip(losses, choice, strict=True) if rank is not None)
        for choice in itertools.product(*ranks.values())
        if sum(_costs(layer, rank) for layer, rank in zip(layers.values(), choice, strict=True)) <= share * whole
    )
    found = sum(loss(name, rank) for name, rank in _ranks(plan).items())
    assert plan.reached["params"]["share"] <= share
    assert best <= found + 1e-12
    assert found <= best + 0.1  # the last step of the greedy choice
    assert all(rank >= min(losses[name]) for name, rank in _ranks(plan).items())


def test_losses_never_fall_below_those_of_larger_ranks(model, statistics):
    losses = {"0": {2: 0.0, 6: 1.0}, "2": {1: 0.5}, "5": {1: 0.5}}
    plan = plan_low_rank(model, statistics, budget=Budget(params=0.95), losses=losses)
    assert _ranks(plan).get("0", 12) > 2


def test_a_budget_below_the_lowest_measured_ranks_is_refused(model, statistics):
    losses = {"0": {6: 0.1}, "2": {8: 0.2}, "5": {3: 0.4}}
    with pytest.raises(ArgumentError, match="with each of them at the lowest rank that was measured"):
        plan_low_rank(model, statistics, budget=Budget(params=0.3), losses=losses)


def test_measured_losses_are_divergences_of_the_class_probabilities(model, statistics):
    model.train()
    losses = pcafast.rank_losses(model, statistics, BATCHES, shares=(0.25, 1.0))
    assert model.training
    assert {name: list(of) for name, of in losses.items()} == {"0": [2, 8], "2": [3, 13], "5": [1, 3]}
    x = torch.cat([inputs for inputs, _ in BATCHES])
    for name, of in losses.items():
        for rank, loss in of.items():
            small = plan_low_rank(model, statistics, ranks={name: rank}).apply(model)
            with torch.no_grad():
                p, q = model(x).double().softmax(1), small(x).double().softmax(1)
            expected = (p * (p / q).log()).sum(1).mean()
            assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-7)
    assert losses["2"][3] > losses["2"][13]


def test_losses_cannot_be_measured_on_nothing(model, statistics):
    with pytest.raises(ArgumentError, match="batches: expected at least one"):
        pcafast.rank_losses(model, statistics, [])
    with pytest.raises(ArgumentError, match=r"shares: expected some in \(0, 1\]"):
        pcafast.rank_losses(model, statistics, BATCHES, shares=[1.5])
    broken = [(torch.full((2, 3, 5, 5), torch.nan), None)]
    with pytest.raises(pcafast.PcafastError, match="outputs are not finite"):
        pcafast.rank_losses(model, statistics, broken)

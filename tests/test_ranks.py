import itertools
import random

import pytest

from pcafast.plan.ranks import Option, choose, lower_hull


def _random_layers(generator: random.Random) -> list[list[Option]]:
    """Layers as spectra make them: convex down to the largest cheaper rank, then a jump to the whole layer."""
    layers = []
    for _ in range(generator.randint(1, 4)):
        variances = sorted((generator.random() ** 4 for _ in range(generator.randint(2, 6))), reverse=True)
        per_rank = generator.randint(1, 9)
        losses = [sum(variances[rank:]) / sum(variances) for rank in range(1, len(variances))]
        options = [Option(per_rank * rank, loss) for rank, loss in enumerate(losses, start=1)]
        layers.append([*options, Option(options[-1].cost + generator.randint(1, 9), 0.0)])
    return layers


def _totals(layers, indices):
    picked = [options[index] for options, index in zip(layers, indices, strict=True)]
    return sum(option.cost for option in picked), sum(option.loss for option in picked)


def _brute_force(layers, budget):
    choices = (_totals(layers, indices) for indices in itertools.product(*(range(len(options)) for options in layers)))
    return min(loss for cost, loss in choices if cost <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_choice_keeps_to_the_budget_and_is_one_step_from_the_optimum_at_most(seed):
    generator = random.Random(seed)
    layers = _random_layers(generator)
    cheapest = sum(options[0].cost for options in layers)
    dearest = sum(options[-1].cost for options in layers)
    largest_step = max(
        options[a].loss - options[b].loss for options in layers for a, b in itertools.pairwise(lower_hull(options))
    )
    for budget in range(cheapest, dearest + 1):
        cost, loss = _totals(layers, choose(layers, budget))
        assert cost <= budget
        assert loss <= _brute_force(layers, budget) + largest_step


@pytest.mark.parametrize("seed", range(60))
def test_choice_is_optimal_where_the_hull_steps_use_up_the_budget(seed):
    layers = _random_layers(random.Random(seed))
    steps = sorted(
        ((options[a].loss - options[b].loss) / (options[b].cost - options[a].cost), options[b].cost - options[a].cost)
        for options in layers
        for a, b in itertools.pairwise(lower_hull(options))
    )
    budget = sum(options[0].cost for options in layers)
    for _, cost in reversed(steps):
        budget += cost
        assert _totals(layers, choose(layers, budget))[1] == pytest.approx(_brute_force(layers, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_more_fits_into_what_is_left(seed):
    layers = _random_layers(random.Random(seed))
    budget = (sum(options[0].cost for options in layers) + sum(options[-1].cost for options in layers)) // 2
    chosen = choose(layers, budget)
    slack = budget - _totals(layers, chosen)[0]
    for options, index in zip(layers, chosen, strict=True):
        assert index == len(options) - 1 or options[index + 1].cost - options[index].cost > slack


def test_whole_budget_leaves_every_layer_whole_even_where_a_rank_loses_nothing():
    layers = [[Option(1, 0.5), Option(2, 0.0), Option(4, 0.0)]] * 2
    assert choose(layers, 8) == [2, 2]


def test_ties_go_to_the_earlier_layer():
    layers = [[Option(1, 1.0), Option(2, 0.0)]] * 3
    assert choose(layers, 4) == [1, 0, 0]


def test_budget_below_the_cheapest_cannot_be_met():
    assert choose([[Option(3, 1.0), Option(5, 0.0)]] * 2, 5) is None
    assert choose([[Option(3, 1.0), Option(5, 0.0)]] * 2, 6) == [0, 0]


def test_no_layers_need_no_budget():
    assert choose([], 0) == []
    assert choose([], -1) is None

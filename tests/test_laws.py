"""The seven laws that every statistic keeps."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pcafast
from pcafast import (
    ActivationGradient,
    ChannelMoments,
    Covariance,
    FeatureMapRank,
    GradientCovariance,
    PatchCovariance,
    Taylor,
)

STATISTICS = {
    "covariance": Covariance,
    "input": lambda: Covariance(side="input"),
    "patches": PatchCovariance,
    "gradient": GradientCovariance,
    "taylor": Taylor,
    "rank": FeatureMapRank,
    "moments": ChannelMoments,
    "activation_gradient": ActivationGradient,
    "patch_gradient": lambda: ActivationGradient(side="input"),
}
KINDS = [Covariance, PatchCovariance, Taylor, FeatureMapRank, GradientCovariance, ChannelMoments, ActivationGradient]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12 * 9, 5),
    ).eval()


def collected(images, labels, splits, model=None):
    """All statistics over the images, in batches of these sizes."""
    model = model or network()
    with pcafast.collect(model, **{name: make() for name, make in STATISTICS.items()}) as stats:
        for batch, targets in zip(images.split(splits), labels.split(splits), strict=True):
            F.cross_entropy(model(batch), targets).backward()
    return stats


def flat(stats):
    """Everything that was computed: {(statistic, layer, part): tensor}."""
    computed = {}
    for name, layers in stats.items():
        for layer, statistic in layers.items():
            value = statistic.compute()
            parts = value if isinstance(value, tuple) else (value,)
            computed |= {(name, layer, index): part for index, part in enumerate(parts)}
    return computed


def assert_same(one, other, tolerance):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        scale = float(other[key].abs().max())
        torch.testing.assert_close(tensor, other[key], rtol=tolerance, atol=tolerance * scale, msg=str(key))


@pytest.fixture
def data():
    return torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24,))


# 1. Any split, any order, any number of processes, saved and loaded in the middle: the same result.


@pytest.mark.parametrize("splits", [[8, 8, 8], [1, 22, 1], [5, 7, 12], [1] * 24])
def test_law_1_any_split(data, splits):
    assert_same(collected(*data, splits), collected(*data, [24]), 1e-5)


def test_law_1_any_order(data):
    images, labels = data
    backwards = torch.arange(23, -1, -1)
    assert_same(collected(images[backwards], labels[backwards], [10, 14]), collected(*data, [10, 14]), 1e-5)


def test_law_1_the_same_batches_give_the_same_bits(data):
    assert_same(collected(*data, [10, 14]), collected(*data, [10, 14]), 0.0)


def test_law_1_merged(data):
    images, labels = data
    first, second = collected(images[:9], labels[:9], [4, 5]), collected(images[9:], labels[9:], [15])
    first.merge(second)
    assert_same(first, collected(*data, [24]), 1e-5)


def test_law_1_saved_and_loaded_in_the_middle(data, tmp_path):
    images, labels = data
    collected(images[:9], labels[:9], [9]).save(tmp_path / "half.safetensors")
    stats = collected(images[9:], labels[9:], [15])
    stats.merge(pcafast.load_statistics(tmp_path / "half.safetensors"))
    assert_same(stats, collected(*data, [24]), 1e-5)


def _process(rank, world, folder, images, labels):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    share = [(0, 7), (7, 24), (24, 24)][rank]  # the last process sees no data at all
    model = network()
    with pcafast.collect(model, **{name: make() for name, make in STATISTICS.items()}) as stats:
        if share[0] < share[1]:
            F.cross_entropy(model(images[slice(*share)]), labels[slice(*share)]).backward()
    stats.all_reduce()
    stats.save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_law_1_any_number_of_processes(data, tmp_path):
    mp.spawn(_process, (3, str(tmp_path), *data), nprocs=3)
    expected = collected(*data, [24])
    for rank in range(3):
        assert_same(pcafast.load_statistics(tmp_path / f"{rank}.safetensors"), expected, 1e-5)


# 2. float32 input: error at most 1e-6 after 10,000 batches with mean / std = 1000; 16-bit input: wide sums.


def test_law_2_a_mean_a_thousand_times_the_deviation():
    channels, batches = 6, 10_000
    mix = torch.randn(channels, channels)
    statistic = Covariance()
    total, outer, count = torch.zeros(channels, dtype=torch.float64), 0, 0
    shift = torch.full((channels, 1), 1000.0, dtype=torch.float64)
    for _ in range(batches):
        x = (1000 + mix @ torch.randn(channels, 32)).float()
        statistic.update(x[None])
        centred = x.double() - shift
        total += centred.sum(1)
        outer = outer + centred @ centred.T
        count += 32
    mean = total / count
    exact = outer / count - mean[:, None] * mean
    found = statistic.compute()
    assert (found.covariance - exact).norm() / exact.norm() <= 1e-6
    torch.testing.assert_close(found.mean, mean + 1000, rtol=1e-12, atol=0)


def test_law_2_a_mean_that_drifts_away_from_the_first_batch():
    x = torch.randn(200, 1, 4, 64) + torch.linspace(0, 1e4, 200).view(-1, 1, 1, 1)
    statistic = Covariance()
    for batch in x:
        statistic.update(batch)
    exact = torch.cov(x.double().movedim(2, 0).flatten(1), correction=0)
    assert (statistic.compute().covariance - exact).norm() / exact.norm() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_law_2_sixteen_bit_input(dtype):
    x = (torch.randn(4, 20, 40, 40) + 3).to(dtype)
    exact = torch.cov(x.double().movedim(1, 0).flatten(1), correction=0)
    found = pcafast.functional.covariance(x).covariance
    assert (found - exact).norm() / exact.norm() <= 1e-6


# 3. Rank equals the count from float64 singular values, unless one lies within 0.1 % of the threshold.


def test_law_3_rank_of_maps_of_a_network(data):
    model, images = network(), data[0]
    with torch.no_grad():
        maps = F.relu(model[1](model[0](images)))
    maps[:, ::3] *= torch.rand(24, 3, 8, 1) > 0.5
    values = torch.linalg.svdvals(maps.double())
    threshold = values[..., :1] * 8 * 2.0**-23
    assert not ((values / threshold - 1).abs() < 1e-3).any()
    assert torch.equal(pcafast.functional.feature_map_rank(maps), (values > threshold).sum(-1))


# 4. No activation outlives its own use.

BLOCKS = {
    "conv-BN-ReLU": lambda: [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
    "conv-ReLU": lambda: [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()],
    "conv-ReLU in place": lambda: [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)],
    "conv-BN-ReLU in place": lambda: [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)],
}


def peak_memory(step):
    """Bytes that torch's allocator held at most, above what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tap", ["layer", "norm", "activation"])
def test_law_4_memory_of_a_training_step(block, tap):
    layers = [layer for _ in range(6) for layer in BLOCKS[block]()]
    model = nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    images, labels = torch.randn(16, 3, 24, 24), torch.randint(0, 10, (16,))

    def step():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    step()
    plain = peak_memory(step)
    statistics = {
        "covariance": Covariance(tap=tap),
        "patches": PatchCovariance(),
        "taylor": Taylor(tap=tap),
        "rank": FeatureMapRank(),
    }
    with pcafast.collect(model, **statistics) as stats:
        step()  # makes the states
        watched = peak_memory(step)
    assert all(not statistic.is_empty for layers in stats.values() for statistic in layers.values())
    assert watched <= 1.02 * plain, f"{watched:,} against {plain:,} bytes"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tap", ["layer", "norm", "activation"])
def test_law_4_the_activation_gradient_keeps_what_a_relu_would_let_go_and_no_more(block, tap):
    """The exception to the law: of a ReLU autograd keeps the result, and this needs what went into it."""
    depth, images, labels = 6, torch.randn(64, 3, 24, 24), torch.randint(0, 10, (64,))
    layers = [layer for _ in range(depth) for layer in BLOCKS[block]()]
    model = nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def step():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    step()
    plain = peak_memory(step)
    with pcafast.collect(model, o=ActivationGradient(tap=tap), i=ActivationGradient(side="input")) as stats:
        step()  # makes the states
        watched = peak_memory(step)
    assert all(not statistic.is_empty for layers in stats.values() for statistic in layers.values())
    before_relu = tap == "norm" or (tap == "layer" and "BN" not in block)
    kept = depth * 4 * 64 * 16 * 24 * 24 if before_relu else 0
    assert watched <= 1.02 * plain + kept, f"{watched:,} against {plain:,} bytes and {kept:,} kept"


@pytest.mark.parametrize("inplace", [False, True])
def test_law_4_taylor_before_a_relu_equals_after_it(inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(6 * 36, 4))
    images, labels = torch.randn(5, 3, 8, 8), torch.randint(0, 4, (5,))
    with pcafast.collect(model, layers="0", before=Taylor(), after=Taylor(tap="activation")) as stats:
        F.cross_entropy(model(images), labels).backward()
    convolved = model[0](images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model[3](F.relu(convolved).flatten(1)), labels), convolved)
    expected = pcafast.functional.taylor_scores(convolved, gradient)
    torch.testing.assert_close(stats["before"]["0"].compute(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["after"]["0"].compute(), expected, rtol=1e-6, atol=0)


# 5. Hooks leave no trace, a layer called twice counts twice, a recomputed forward counts once.


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always")
    return {
        (name, kind): len(getattr(module, kind, ()))
        for name, module in model.named_modules()
        for kind in (*kinds, "_forward_hooks_with_kwargs")
    }


def test_law_5_nothing_is_left_behind(data):
    images, labels = data
    model = network().train()
    model[0].weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    hooks, modes = hooks_of(model), [module.training for module in model.modules()]
    expected = twin(images)
    F.cross_entropy(expected, labels).backward()
    with pcafast.collect(model, **{name: make() for name, make in STATISTICS.items()}):
        output = model(images)
        F.cross_entropy(output, labels).backward()
    assert torch.equal(output, expected)
    assert hooks_of(model) == hooks
    assert torch._C._len_torch_function_stack() == 0
    assert [module.training for module in model.modules()] == modes
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("where", ["in the loop", "in the forward"])
def test_law_5_an_exception_removes_the_hooks(data, where):
    model = network()
    hooks = hooks_of(model)
    with (
        pytest.raises((RuntimeError, KeyError)),
        pcafast.collect(model, rank=FeatureMapRank(), taylor=Taylor()) as stats,
    ):
        if where == "in the loop":
            model(data[0])
            raise KeyError("the user's own")
        model(torch.randn(2, 3, 1, 1))
    assert hooks_of(model) == hooks
    before = {key: value.clone() for key, value in stats["rank"]["0"].state_dict().items()}
    F.relu(model(data[0])).sum().backward()
    after = stats["rank"]["0"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class CallsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.layer(F.relu(self.layer(x)))).mean((1, 2, 3))


def test_law_5_a_layer_called_twice_counts_twice():
    model, x = CallsTwice(), torch.randn(3, 4, 6, 6)
    with pcafast.collect(model, **{name: make() for name, make in STATISTICS.items()}) as stats:
        model(x).sum().backward()
    first = model.layer(x)
    second = model.layer(F.relu(first))
    both = torch.cat([first, second]).detach()
    torch.testing.assert_close(
        stats["covariance"]["layer"].compute().covariance,
        pcafast.functional.covariance(both).covariance,
        rtol=1e-5,
        atol=1e-7,
    )
    assert stats["taylor"]["layer"].state_dict()["examples"] == 6
    for name in ("gradient", "activation_gradient", "patch_gradient"):
        assert stats[name]["layer"].state_dict()["count"] == 6 * 36
    assert stats["rank"]["layer"].distribution().sum() == 6 * 4


BACKWARDS = {
    "loss.backward()": lambda loss, parameters: loss.backward(),
    "loss.backward(inputs)": lambda loss, parameters: loss.backward(inputs=parameters),
    "autograd.backward": lambda loss, parameters: torch.autograd.backward(loss),
    "autograd.grad": lambda loss, parameters: torch.autograd.grad(loss, parameters),
}


@pytest.mark.parametrize(
    ("reentrant", "backward"),
    # The re-entrant kind does not take inputs.
    [*[(False, one) for one in BACKWARDS], (True, "loss.backward()"), (True, "autograd.backward")],
)
def test_law_5_a_recomputed_forward_counts_once(reentrant, backward, data):
    images, labels = data
    images = images.clone().requires_grad_()  # or the re-entrant kind has no gradient at all
    model = network()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            middle = checkpoint(self.inner[:5], x, use_reentrant=reentrant)
            return self.inner[5:](middle)

    def watched(outer, layers):
        with pcafast.collect(outer, layers=layers, **{name: make() for name, make in STATISTICS.items()}) as stats:
            BACKWARDS[backward](F.cross_entropy(outer(images), labels), list(outer.parameters()))
        return stats

    found = watched(Checkpointed(), ["inner.0", "inner.3"])
    plain = watched(model, ["0", "3"])
    for name, layers in plain.items():
        for layer, statistic in layers.items():
            for state, value in statistic.state_dict().items():
                assert torch.equal(value, found[name][f"inner.{layer}"].state_dict()[state]), (name, layer, state)


# 6. NaN and infinities are never averaged in silence. (Wrong arguments: in the tests of what takes them.)


def poisoned(data):
    images = data[0].clone()
    images[13, 0, 0, 0] = math.nan
    return images, data[1]


def test_law_6_a_batch_with_nan_is_left_out_counted_and_named(data):
    with pytest.warns(pcafast.PcafastWarning, match=r"covariance: NaN or infinities were left out.*0 \(1\), 3 \(1\)"):
        found = collected(*poisoned(data), [12, 12])
    kept = collected(data[0][:12], data[1][:12], [12])
    for name in ("covariance", "patches", "taylor", "moments", "activation_gradient", "patch_gradient"):
        assert {layer: one.skipped for layer, one in found[name].items()} == {"0": 1, "3": 1, "6": 1}
        for layer, one in found[name].items():
            for state, value in one.state_dict().items():
                assert state == "skipped" or torch.equal(value, kept[name][layer].state_dict()[state])
    # Of ranks only the maps with NaN are left out: all eight of image 13.
    assert found["rank"]["0"].skipped == 8
    assert found["rank"]["0"].distribution().sum() == 8 * 23


@pytest.mark.parametrize("make", KINDS)
def test_law_6_nonfinite_raise_starts_anew_after_reset_and_load(make, data):
    images, labels = poisoned(data)

    def run(batch, statistic):
        model = network()
        with pcafast.collect(model, layers="0", statistic=statistic) as stats:
            stats["statistic"]["0"].load_state_dict(skipping.state_dict())
            F.cross_entropy(model(batch), labels).backward()
        return stats["statistic"]["0"]

    skipping = make()
    with pytest.warns(pcafast.PcafastWarning, match="statistic: NaN"):
        skipping = run(images, make())
    again = run(data[0], make(nonfinite="raise"))  # has skipped before, and does not now
    again.reset()
    with pytest.raises(pcafast.NonFiniteError):
        run(images, make(nonfinite="raise"))


@pytest.mark.parametrize("make", KINDS)
def test_law_6_nonfinite_raise(make, data):
    model = network()
    images, labels = poisoned(data)
    statistic = make(nonfinite="raise")
    with (
        pytest.raises(pcafast.NonFiniteError, match=f"{make.__name__} of layer '0': the batch holds NaN"),
        pcafast.collect(model, layers="0", statistic=statistic),
    ):
        F.cross_entropy(model(images), labels).backward()


# 7. What was decided is written down.


def test_law_7_a_plan_applied_twice_gives_the_same_model(data):
    model = network()
    stats = collected(*data, [24], model)
    plan = pcafast.plan_low_rank(model, stats["covariance"], ratio=0.5)
    once, twice = plan.apply(model), plan.apply(model)
    assert plan.actions
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_law_7_an_empty_plan_changes_nothing(data):
    model = network()
    assert torch.equal(pcafast.Plan().apply(model)(data[0]), model(data[0]))

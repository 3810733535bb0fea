"""Choosing layers, tapping them at the right place, and masks."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcafast
from pcafast import ChannelMoments, Covariance, FeatureMapRank, GradientCovariance, Taylor


class Functional(nn.Module):
    """Batch norm as a module, everything else as functions; a residual connection around the second layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.values = {}

    def forward(self, x):
        see = self.values
        x = see["conv1", "layer"] = self.conv1(x)
        x = see["conv1", "norm"] = self.bn1(x)
        x = see["conv1", "activation"] = torch.relu(x)
        y = see["conv2", "layer"] = self.conv2(x)
        y = see["conv2", "norm"] = F.batch_norm(y, self.bn2.running_mean, self.bn2.running_var)
        y = see["conv2", "activation"] = F.silu(y + x)
        y = see["head", "layer"] = see["head", "norm"] = see["head", "activation"] = self.head(y.mean((2, 3)))
        return y


class Modules(nn.Module):
    """Modules in a Sequential, in place, without batch norm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Dropout(0.1), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(6, 4, 1)
        )
        self.values = {}

    def forward(self, x):
        see = self.values
        conv, dropout, leaky, last = self.body
        y = conv(x)
        see["body.0", "layer"] = see["body.0", "norm"] = y.clone()
        y = see["body.0", "activation"] = leaky(dropout(y))
        y = see["body.3", "layer"] = see["body.3", "norm"] = see["body.3", "activation"] = last(y)
        return y.mean((2, 3))


@pytest.mark.parametrize("network", [Functional, Modules])
@pytest.mark.parametrize("tap", ["layer", "norm", "activation"])
def test_taps(network, tap):
    model = network().eval()
    x = torch.randn(4, 3, 6, 6)
    with pcafast.collect(model, covariance=Covariance(tap=tap), moments=ChannelMoments(tap=tap)) as stats:
        model(x)
    expected = {layer: value.detach() for (layer, at), value in model.values.items() if at == tap}
    assert stats["covariance"].keys() == expected.keys()
    for layer, value in expected.items():
        dim = -1 if layer == "head" else 1
        mean, covariance = pcafast.functional.covariance(value, channel_dim=dim)
        torch.testing.assert_close(stats["covariance"][layer].compute(), (mean, covariance), rtol=1e-6, atol=1e-8)
        share = (value == 0).double().movedim(dim, 0).flatten(1).mean(1)
        torch.testing.assert_close(stats["moments"][layer].compute().zero_share, share)


@pytest.mark.parametrize("tap", ["layer", "norm", "activation"])
def test_gradients_at_taps(tap):
    model, x, labels = Functional().eval(), torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    with pcafast.collect(model, gradient=GradientCovariance(tap=tap), taylor=Taylor(tap=tap)) as stats:
        output = model(x)
        for value in model.values.values():
            value.retain_grad()
        F.cross_entropy(output, labels).backward()
    for (layer, at), value in model.values.items():
        if at != tap:
            continue
        dim = -1 if layer == "head" else 1
        expected = pcafast.functional.covariance(value.grad * 4, channel_dim=dim)
        torch.testing.assert_close(stats["gradient"][layer].compute(), expected, rtol=1e-5, atol=1e-12)
        scores = pcafast.functional.taylor_scores(value, value.grad, channel_dim=dim)
        torch.testing.assert_close(stats["taylor"][layer].compute(), scores, rtol=1e-5, atol=1e-15)


def test_input_side_and_groups():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Conv1d(8, 4, 1), nn.Conv3d(2, 2, 1))
    x, sequence, volume = torch.randn(3, 6, 5, 5), torch.randn(3, 8, 7), torch.randn(2, 2, 3, 3, 3)
    with pcafast.collect(model, inputs=Covariance(side="input"), outputs=Covariance()) as stats:
        y = model[0](x)
        model[1](input=sequence)
        model[2](volume)
    halves = [pcafast.functional.covariance(half).covariance for half in y.detach().split(4, dim=1)]
    torch.testing.assert_close(stats["outputs"]["0"].compute().covariance, torch.stack(halves), rtol=1e-6, atol=1e-8)
    expected = pcafast.functional.covariance(sequence)
    torch.testing.assert_close(stats["inputs"]["1"].compute(), expected, rtol=1e-6, atol=1e-8)
    expected = pcafast.functional.covariance(volume)
    torch.testing.assert_close(stats["inputs"]["2"].compute(), expected, rtol=1e-6, atol=1e-8)


def test_a_mask_leaves_padding_out():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    tokens = torch.randn(4, 9, 5)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    with pcafast.collect(model, c=Covariance(), i=Covariance(side="input"), g=GradientCovariance()) as stats:
        stats.mask = mask
        output = model(tokens)
        hidden = model[:1](tokens)  # an unmasked second pass would count as well
        (output * mask.unsqueeze(2)).square().sum().backward()
    first = torch.cat([model[0](tokens)[mask]] * 2).detach()
    expected = pcafast.functional.covariance(first)
    torch.testing.assert_close(stats["c"]["0"].compute(), expected, rtol=1e-5, atol=1e-8)
    expected = pcafast.functional.covariance(F.relu(hidden)[mask].detach())
    torch.testing.assert_close(stats["i"]["2"].compute(), expected, rtol=1e-5, atol=1e-8)
    assert stats["g"]["2"].state_dict()["count"] == mask.sum()


def test_a_mask_of_another_shape_is_refused():
    model = nn.Sequential(nn.Linear(5, 6))
    with (
        pytest.raises(pcafast.ArgumentError, match=r"mask: expected the positions \(4, 9\).*got \(4, 8\)"),
        pcafast.collect(model, c=Covariance()) as stats,
    ):
        stats.mask = torch.ones(4, 8)
        model(torch.randn(4, 9, 5))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["conv1", "conv2", "head"]),
        (nn.Conv2d, ["conv1", "conv2"]),
        ("conv?", ["conv1", "conv2"]),
        (["head", nn.BatchNorm2d], ["bn1", "bn2", "head"]),
        (lambda name, module: name.endswith("2"), ["conv2", "bn2"]),
    ],
)
def test_choosing_layers(layers, expected):
    stats = pcafast.collect(Functional(), layers=layers, covariance=Covariance())
    assert sorted(stats["covariance"]) == sorted(expected)


def test_ranks_are_for_maps_only():
    assert set(pcafast.collect(Functional(), rank=FeatureMapRank())["rank"]) == {"conv1", "conv2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "conv9", "c": Covariance()}, "no layer of the model matches 'conv9'. Its layers are: conv1, bn1,"),
        ({"layers": ["conv1", "x*"], "c": Covariance()}, r"no layer of the model matches 'x\*'"),
        ({"layers": nn.Conv3d, "c": Covariance()}, "no layer of the model matches .*Conv3d"),
        ({"layers": lambda name, module: False, "c": Covariance()}, "no layer of the model matches"),
        ({"layers": "head", "rank": FeatureMapRank()}, r"rank: none of the chosen layers \(head\) can have a Feature"),
        ({}, "statistics: expected at least one"),
        ({"c": Covariance}, "c: expected a statistic such as"),
    ],
)
def test_bad_choices_are_explained(arguments, message):
    with pytest.raises(pcafast.ArgumentError, match=message):
        pcafast.collect(Functional(), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Covariance(side="input", tap="norm"), 'tap: expected "layer" for side="input", got \'norm\''),
        (lambda: Covariance(side="left"), "side: expected one of output, input, got 'left'"),
        (lambda: Taylor(reduction="l1"), "reduction: expected one of molchanov2017, .*got 'l1'"),
        (lambda: Taylor(loss_reduction="max"), "loss_reduction: expected one of mean, sum, got 'max'"),
        (lambda: FeatureMapRank(tap="end"), "tap: expected one of layer, norm, activation, got 'end'"),
        (lambda: ChannelMoments(nonfinite="ignore"), "nonfinite: expected one of skip, raise, got 'ignore'"),
    ],
)
def test_bad_settings_are_explained(make, message):
    with pytest.raises(pcafast.ArgumentError, match=message):
        make()


def test_a_compiled_model_is_refused():
    model = Functional()
    compiled = torch.compile(model)
    with (
        pytest.raises(pcafast.ArgumentError, match="expected the eager module"),
        pcafast.collect(compiled, c=Covariance()),
    ):
        pass
    model.conv1.compile()
    with pytest.raises(pcafast.ArgumentError, match="expected the eager module"):
        pcafast.collect(model, c=Covariance()).__enter__()


def test_unbatched_images_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with (
        pytest.raises(
            pcafast.ArgumentError, match=r"layer '0': expected a batch of 4 dimensions, got shape \(4, 5, 5\)"
        ),
        pcafast.collect(model, c=Covariance()),
    ):
        model(torch.randn(3, 5, 5))


class Follows(nn.Module):
    """A convolution, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def in_place(x, change):
    change(x)
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x),
        lambda x: F.relu(x) + x,
        lambda x: x + F.relu(x),
        lambda x: x.square().sum() * F.relu(x),
        lambda x: F.relu(x).sum() * torch.cat([x, x]),
        lambda x: F.relu(F.relu(x) + x),
        lambda x: F.relu(x.clone(), inplace=True) * x,
        lambda x: in_place(x, F.relu_),
        lambda x: F.relu(F.dropout(x, 0.5, False), inplace=True),
        lambda x: in_place(x, lambda y: F.leaky_relu(y, 0.1, True)),
        lambda x: in_place(x, lambda y: F.silu(y, inplace=True)),
        lambda x: in_place(x, lambda y: y.add_(1)).square(),
        lambda x: F.hardtanh(x, -0.1, 0.2),
        lambda x: F.max_pool2d(F.relu(x), 2),
        lambda x: F.dropout(x, 0.5, True, True),
    ],
)
def test_taylor_whatever_becomes_of_the_output(function):
    """The gradient is that of all uses of the output, so the activation must be that before all of them."""
    model, x = Follows(function), torch.randn(2, 3, 4, 4)
    with pcafast.collect(model, taylor=Taylor()) as stats:
        torch.manual_seed(1)
        model(x).square().mean().backward()
    convolved = model.conv(x).detach().requires_grad_()
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(function(convolved * 1).square().mean(), convolved)
    expected = pcafast.functional.taylor_scores(convolved, gradient)
    torch.testing.assert_close(stats["taylor"]["conv"].compute(), expected, rtol=1e-5, atol=0)


def test_taylor_of_an_output_that_the_loss_uses_too():
    model = Follows(lambda x: (F.relu(x), x))
    x = torch.randn(2, 3, 4, 4)
    with pcafast.collect(model, taylor=Taylor()) as stats:
        rectified, convolved = model(x)
        (rectified.mean() + convolved.square().mean()).backward()
    gradient = (convolved > 0) / 128 + 2 * convolved / 128
    expected = pcafast.functional.taylor_scores(convolved, gradient)
    torch.testing.assert_close(stats["taylor"]["conv"].compute(), expected, rtol=1e-5, atol=0)


def test_taylor_after_a_batch_norm_that_a_residual_is_added_to_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            out = self.normed = self.norm(self.conv(x))
            self.before = out.detach().clone()
            out += x
            return F.relu(out, inplace=True)

    model, x = Block(), torch.randn(2, 3, 4, 4)
    with pcafast.collect(model, taylor=Taylor(tap="norm")) as stats:
        loss = model(x).square().mean()
        loss.backward()
    gradient = 2 / 96 * F.relu(model.before + x)
    expected = pcafast.functional.taylor_scores(model.before, gradient)
    torch.testing.assert_close(stats["taylor"]["conv"].compute(), expected, rtol=1e-5, atol=0)


def test_parts_of_the_model_called_alone():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "b": nn.Sequential(nn.Conv2d(4, 2, 1))})
    x = torch.randn(5, 3, 4, 4)
    with pcafast.collect(model, r=FeatureMapRank(), t=Taylor(tap="activation")) as stats:
        for _ in range(3):
            model["b"](model["a"](x)).sum().backward()
            assert not stats._hooks._values._followers
    assert {layer: int(one.state_dict()["examples"]) for layer, one in stats["t"].items()} == {"a.0": 15, "b.0": 15}


def test_gradients_are_scaled_by_the_batch_and_not_by_folded_positions():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model, x = Folds(), torch.randn(2, 7, 4)
    with pcafast.collect(model, folded=GradientCovariance()) as stats:
        model(x).square().flatten(1).sum(1).mean().backward()
    expected = pcafast.functional.covariance(2 * model.linear(x), channel_dim=-1)
    torch.testing.assert_close(stats["folded"]["linear"].compute(), expected, rtol=1e-5, atol=1e-8)


def test_sixteen_bit_gradients_are_scaled_without_overflow():
    gradient = (300 * torch.randn(256, 3)).half()
    statistic = GradientCovariance()
    statistic.update(gradient)
    expected = torch.cov(gradient.double().T * 256, correction=0)
    assert (statistic.compute().covariance - expected).norm() <= 1e-6 * expected.norm()


def test_the_channels_of_other_layers_are_where_the_statistic_says():
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6))
    with pcafast.collect(model, layers=lambda name, module: bool(name), c=Covariance(channel_dim=-1)) as stats:
        model(torch.randn(2, 9, 5))
    assert {len(one.compute().mean) for one in stats["c"].values()} == {6}


def test_shared_modules_and_the_model_itself():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.Sequential(conv))
    assert list(pcafast.collect(model, c=Covariance())["c"]) == ["0"]
    assert list(pcafast.collect(model, layers="1.0", c=Covariance())["c"]) == ["1.0"]
    with pcafast.collect(conv, c=Covariance()) as stats:
        conv(torch.randn(2, 3, 4, 4))
    assert stats["c"][""].state_dict()["count"] == 32


def test_copies_of_the_model_made_inside_the_block_have_no_hooks(tmp_path):
    model = Functional()
    with pcafast.collect(model, t=Taylor(), r=FeatureMapRank()) as stats:
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        for other in (twin, torch.load(tmp_path / "model.pt", weights_only=False)):
            other(torch.randn(2, 3, 6, 6)).sum().backward()
        assert stats["r"]["conv1"].is_empty
        model(torch.randn(2, 3, 6, 6)).sum().backward()
    twin(torch.randn(2, 3, 6, 6))
    assert stats["t"]["conv1"].state_dict()["examples"] == 2


def test_a_block_in_which_nothing_happens_warns():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    warning = pytest.warns(pcafast.PcafastWarning, match="c: no forward called any of its layers")
    with warning, pcafast.collect(model, c=Covariance()):
        torch.compile(model, backend="eager")


def test_collections_of_other_layers_do_not_merge():
    one, other = (pcafast.collect(Functional(), layers=layer, c=Covariance()) for layer in ("conv1", "conv2"))
    with pytest.raises(pcafast.ArgumentError, match="'c' of layer 'conv1' is only in this collection"):
        one.merge(other)


def test_an_output_overwritten_in_place_is_an_error_and_not_a_wrong_number():
    model = Follows(lambda x: x.mul_(2))
    with (
        pytest.raises(pcafast.PcafastError, match=r"layer 'conv' was overwritten in place.*tap=\"activation\""),
        pcafast.collect(model, taylor=Taylor()),
    ):
        model(torch.randn(2, 3, 4, 4)).sum().backward()


def test_a_second_backward_is_an_error_and_not_a_wrong_number():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with (
        pytest.raises(pcafast.PcafastError, match="A second backward pass reached layer '0'"),
        pcafast.collect(model, taylor=Taylor()),
    ):
        loss = model(torch.randn(2, 3, 4, 4)).sum()
        loss.backward(retain_graph=True)
        loss.backward()


def test_nothing_seen_is_an_error():
    model = Functional()
    with pcafast.collect(model, taylor=Taylor(), c=Covariance()) as stats, torch.no_grad():
        model(torch.randn(2, 3, 6, 6))
    stats["c"]["conv1"].compute()
    with pytest.raises(
        pcafast.PcafastError, match=r"Taylor of layer 'conv1' has seen no batch.*calls the layer and a backward"
    ):
        stats["taylor"]["conv1"].compute()


def test_inference_mode_then_training():
    model = Functional()
    stats = pcafast.collect(model, c=Covariance(), rank=FeatureMapRank(), moments=ChannelMoments(tap="norm"))
    with stats, torch.inference_mode():
        model(torch.randn(2, 3, 6, 6))
    with stats:
        model(torch.randn(3, 3, 6, 6)).sum().backward()
    assert stats["c"]["conv1"].state_dict()["count"] == 5 * 36


def test_maps_of_several_sizes_grow_the_histogram():
    statistic = FeatureMapRank()
    statistic.update(torch.eye(3).expand(2, 4, 3, 3))
    statistic.update(torch.eye(5).expand(1, 4, 5, 5))
    assert statistic.distribution().tolist() == [[0, 0, 0, 2, 0, 1]] * 4
    assert statistic.compute().tolist() == [11 / 3] * 4


def test_a_hook_call_is_cheap():
    """Of layers so small that the kernels take no time: 20 us of Python by design, and some for busy machines."""
    model, x = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(50)]), torch.randn(1, 2, 1, 1)

    def best():
        times = []
        for _ in range(30):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
        return min(times) / 50

    with torch.no_grad():
        plain = best()
        with pcafast.collect(model, c=Covariance()):
            watched = best()
    assert watched - plain < 60e-6


def test_a_mask_that_leaves_nothing_is_refused():
    statistic = pcafast.Covariance(channel_dim=-1)
    with pytest.raises(pcafast.ArgumentError, match="weight: expected some position that counts"):
        statistic.update(torch.randn(2, 3, 4), weight=torch.zeros(2, 3, dtype=torch.bool))
    assert statistic.is_empty

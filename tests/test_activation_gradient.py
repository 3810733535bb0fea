"""The activation-gradient matrix against its formula, against the loss itself, and at the hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from patch_truth import MODES
from torch import nn

import pcafast
from pcafast import ActivationGradient, ArgumentError
from pcafast.functional import activation_gradient


def truth(a, g, groups=1):
    """Of rows (N, D) in float64: mean, and matrix or one for each group."""
    a, g = a.double(), g.double()
    mean = a.mean(0)
    blocks = torch.stack(
        [
            x.T @ y / len(a) - torch.outer(x.mean(0), y.mean(0))
            for x, y in zip(a.chunk(groups, dim=1), g.chunk(groups, dim=1), strict=True)
        ]
    )
    return mean, blocks[0] if groups == 1 else blocks


def rows(x, channel_dim=1):
    return x.detach().movedim(channel_dim, -1).flatten(0, -2)


def patch_rows(layer, x):
    """What the layer multiplies its weight with, (positions, D), by torch's own padding and unfold."""
    if isinstance(layer, nn.Linear):
        return rows(x, -1)
    x = x.detach().double()
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        sides = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        sides = [(p, p) for p in layer.padding]
    x = F.pad(x, [one for pair in reversed(sides) for one in pair], mode=MODES[layer.padding_mode])
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(x, kernel, dilation=dilation, stride=stride).movedim(1, -1).flatten(0, 1)


def patch_gradient_rows(layer, gradient):
    """W' times the gradient of the output, group by group: (positions, D)."""
    by_position = rows(gradient, -1 if isinstance(layer, nn.Linear) else 1).double()
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().double().flatten(1).chunk(groups)
    return torch.cat([g @ w for g, w in zip(by_position.chunk(groups, dim=1), weight, strict=True)], dim=1)


def assert_matrix(found, expected, tolerance=1e-6):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(
    ("shape", "dim", "groups"),
    [((5, 4, 3, 3), 1, 1), ((5, 6, 7), 1, 2), ((40, 4), 1, 1), ((3, 7, 6), -1, 3), ((3, 4, 2, 3, 2), 1, 4)],
)
def test_output_side_is_the_formula(shape, dim, groups, device):
    a, g = torch.randn(2, *shape, device=device)
    statistic = ActivationGradient(channel_dim=dim, groups=groups)
    statistic.update(a, g, batch_size=11)
    expected = truth(rows(a, dim), 11 * rows(g, dim), groups)
    assert_matrix(statistic.compute(), expected)
    assert torch.equal(statistic.compute().symmetric, statistic.compute().matrix + statistic.compute().matrix.mT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_function_is_the_statistic(reduction):
    a, g = torch.randn(2, 6, 5, 4, 3)
    statistic = ActivationGradient(loss_reduction=reduction)
    statistic.update(a, g)
    found = activation_gradient(a, g, loss_reduction=reduction)
    assert_matrix(found, statistic.compute(), 1e-12)
    assert_matrix(found, truth(rows(a), rows(g) * (6 if reduction == "mean" else 1)))


LAYERS = {
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 6)),
    "no bias, asymmetric kernel": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (5, 4, 7, 6)),
    "stride that leaves pixels over": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(1, 0)), (5, 4, 8, 9)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=(2, 1)), (5, 4, 8, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (5, 4, 7, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 1)), (5, 4, 7, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 7, 6)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), (5, 4, 7, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (5, 4, 7, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (5, 4, 7, 6)),
    "1x1 with a stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (5, 4, 7, 6)),
    "1-d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (5, 4, 17)),
    "1-d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (5, 4, 17)),
    "1-d, circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (5, 4, 17)),
    "linear": (lambda: nn.Linear(4, 6), (20, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 6), (5, 7, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_both_sides_of_a_layer_are_the_formulas(name, device):
    make, shape = LAYERS[name]
    layer, x = make().to(device), torch.randn(shape, device=device) + 2
    seen = []
    with pcafast.collect(layer, i=ActivationGradient(side="input"), o=ActivationGradient()) as stats:
        for part in x.split(3):
            output = layer(part)
            output.retain_grad()
            output.square().flatten(1).sum(1).mean().backward()
            seen.append((output.detach(), output.grad * len(part)))
    output, gradient = map(torch.cat, zip(*seen, strict=True))
    groups, dim = getattr(layer, "groups", 1), -1 if isinstance(layer, nn.Linear) else 1
    expected = truth(rows(output, dim), rows(gradient, dim), groups)
    assert_matrix(stats["o"][""].compute(), expected)
    expected = truth(patch_rows(layer, x), patch_gradient_rows(layer, gradient), groups)
    assert_matrix(stats["i"][""].compute(), expected)


# What it means.


class Projects(nn.Module):
    """A convolution of which a direction is shrunk by a small factor, of its output or of its patches."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.head = nn.Linear(5 * 16, 4)
        self.project = None

    def forward(self, x):
        if self.project is None:
            y = self.conv(x)
        else:
            side, direction, mean, by = self.project
            weight = self.conv.weight.flatten(1)
            patches = F.unfold(x, 3, padding=1, stride=2)  # (N, D, L)
            if side == "input":
                along = direction @ (patches - mean[:, None])
                patches = patches - by * direction[:, None] * along[:, None]
            y = weight @ patches + self.conv.bias[:, None]
            if side == "output":
                y = y - by * direction[:, None] * (direction @ (y - mean[:, None]))[:, None]
            y = y.unflatten(2, (4, 4))
        return self.head(torch.tanh(y).flatten(1))


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_loss_changes_as_the_matrix_says(side):
    model, examples, eps = Projects().double(), 12, 1e-5
    x, labels = torch.randn(examples, 3, 8, 8, dtype=torch.float64) + 1, torch.randint(0, 4, (examples,))
    with pcafast.collect(model, layers="conv", s=ActivationGradient(side=side)) as stats:
        for part, targets in zip(x.split(5), labels.split(5), strict=True):
            F.cross_entropy(model(part), targets).backward()
    mean, matrix = stats["s"]["conv"].compute()
    positions = examples * 16
    with torch.no_grad():
        for direction in F.normalize(torch.randn(4, len(mean), dtype=torch.float64)):
            losses = []
            for by in (eps, -eps):
                model.project = (side, direction, mean, by)
                losses.append(F.cross_entropy(model(x), labels, reduction="sum"))
            change = (losses[0] - losses[1]) / (2 * eps)
            quadratic = direction @ matrix @ direction
            torch.testing.assert_close(change, -positions * quadratic, rtol=1e-6, atol=1e-9)
            half = direction @ stats["s"]["conv"].compute().symmetric @ direction / 2
            torch.testing.assert_close(half, quadratic)


# At the hooks.


def classify(model, images, labels, **statistics):
    with pcafast.collect(model, **statistics) as stats:
        for batch, targets in zip(images.split(4), labels.split(4), strict=True):
            F.cross_entropy(model(batch), targets).backward()
    return stats


def test_every_layer_of_a_network_both_sides_at_once():
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 6, 3, stride=2, groups=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, 8), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    ).eval()
    images, labels = torch.randn(12, 3, 8, 8), torch.randint(0, 4, (12,))
    stats = classify(model, images, labels, o=ActivationGradient(), i=ActivationGradient(side="input"))
    values, x = {}, images
    for name, layer in model.named_children():  # without anything in place
        values[name] = x, None
        x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        x.retain_grad()
        values[name] = values[name][0], x
    F.cross_entropy(x, labels, reduction="sum").backward()
    assert stats["o"].keys() == stats["i"].keys() == {"0", "3", "6", "9"}
    for name in stats["o"]:
        layer, (x, y) = model.get_submodule(name), values[name]
        groups, dim = getattr(layer, "groups", 1), -1 if isinstance(layer, nn.Linear) else 1
        expected = truth(rows(y, dim), rows(y.grad, dim), groups)
        assert_matrix(stats["o"][name].compute(), expected, 1e-5)
        expected = truth(patch_rows(layer, x), patch_gradient_rows(layer, y.grad), groups)
        assert_matrix(stats["i"][name].compute(), expected, 1e-5)


class Follows(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def in_place(change):
    def function(x):
        change(x)
        return x

    return function


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        in_place(F.relu_),
        in_place(nn.ReLU(inplace=True)),
        in_place(nn.LeakyReLU(0.1, inplace=True)),
        in_place(lambda x: F.silu(x, inplace=True)),
        in_place(lambda x: x.add_(1)),
        lambda x: F.relu(F.dropout(x, 0.5, False), inplace=True),
        lambda x: F.relu(x) + x,
        lambda x: x.square().sum() * F.relu(x),
        lambda x: F.max_pool2d(F.relu_(x), 2),
    ],
)
def test_the_activation_is_that_before_a_relu_even_if_overwritten(function):
    """As of VGG's ReLUs in place, for which pca-compress takes values and gradients after them."""
    model, x = Follows(function), torch.randn(3, 3, 4, 4)
    with pcafast.collect(model, s=ActivationGradient()) as stats:
        model(x).square().mean().backward()
    convolved = model.conv(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(convolved * 1).square().mean(), convolved)
    assert (convolved < 0).any()
    assert_matrix(stats["s"]["conv"].compute(), truth(rows(convolved), 3 * rows(gradient)), 1e-5)


@pytest.mark.parametrize("tap", ["norm", "activation"])
def test_taps(tap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))
    nn.init.normal_(model[1].bias)
    images, labels = torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4,))
    stats = classify(copy.deepcopy(model), images, labels, s=ActivationGradient(tap=tap))
    normed = model[1](model[0](images))
    rectified = F.relu(normed)
    value = normed if tap == "norm" else rectified
    output = model[4](rectified.flatten(1))
    (gradient,) = torch.autograd.grad(F.cross_entropy(output, labels, reduction="sum"), value)
    assert_matrix(stats["s"]["0"].compute(), truth(rows(value), rows(gradient)), 1e-5)


def test_the_input_given_by_name_and_a_layer_with_a_frozen_weight():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.second.requires_grad_(False)

        def forward(self, x):
            return self.second(input=torch.tanh(self.first(input=x)))

    model, x = Named(), torch.randn(6, 3)
    with pcafast.collect(model, s=ActivationGradient(side="input")) as stats:
        output = model(x)
        output.square().sum(1).mean().backward()
    hidden = torch.tanh(model.first(x))
    expected = truth(rows(hidden), patch_gradient_rows(model.second, 2 * output))
    assert_matrix(stats["s"]["second"].compute(), expected, 1e-5)
    assert not stats["s"]["first"].is_empty


def test_an_input_overwritten_in_place_is_an_error_and_not_a_wrong_number():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2).requires_grad_(False)

        def forward(self, x):
            x = self.first(x)
            output = self.second(x)
            x.mul_(2)
            return output

    model = Overwrites()
    with (
        pytest.raises(pcafast.PcafastError, match="The input of layer 'second' was overwritten in place"),
        pcafast.collect(model, layers="second", s=ActivationGradient(side="input")),
    ):
        model(torch.randn(5, 3)).sum().backward()


def test_the_input_side_is_of_layers_that_multiply_patches():
    model = nn.Sequential(nn.Conv3d(2, 3, 1), nn.ConvTranspose2d(3, 4, 3, groups=1), nn.Linear(4, 2))
    assert pcafast.collect(model, s=ActivationGradient(side="input"))["s"].keys() == {"2"}
    assert pcafast.collect(model, s=ActivationGradient())["s"].keys() == {"0", "1", "2"}
    with pytest.raises(ArgumentError, match="none of the chosen layers"):
        pcafast.collect(model, layers="0", s=ActivationGradient(side="input"))


# Accuracy and state. (Any split, merging and files: also in the laws.)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("offset", ["activation", "gradient", "both"])
def test_a_mean_a_thousand_times_the_deviation(side, offset):
    layer = nn.Conv2d(4, 4, 3)
    statistic = ActivationGradient(
        side=side, **ActivationGradient.settings_for(layer) if side == "input" else {}, loss_reduction="sum"
    )
    seen = []
    for _ in range(20):
        x = torch.randn(4, 4, 18, 18) + (1000 if offset != "gradient" else 0)
        g = torch.randn(4, 4, 16, 16) + (1000 if offset != "activation" else 0)
        g += 0.5 * x[..., 1:-1, 1:-1] - (500 if offset != "gradient" else 0)
        a = x[..., 1:-1, 1:-1] if side == "output" else x
        statistic.update(a, g, layer_weight=layer.weight)
        seen.append((rows(a), rows(g)) if side == "output" else (patch_rows(layer, x), patch_gradient_rows(layer, g)))
    expected = truth(*map(torch.cat, zip(*seen, strict=True)))
    assert_matrix(statistic.compute(), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_products_are_wide_and_do_not_overflow(dtype):
    a, g = (300 * torch.randn(2, 256, 3, 4, 4)).to(dtype)
    g += a / 2
    with torch.autocast("cpu", torch.bfloat16):  # of no concern to it
        found = activation_gradient(a, g)
    mean, matrix = truth(rows(a), 256 * rows(g).double())
    assert (found.matrix - matrix).norm() <= 1e-6 * matrix.norm()
    assert (found.mean - mean).norm() <= 1e-7 * a.double().std()


def test_autocast_is_of_no_concern_to_the_input_side():
    x, g, weight = torch.randn(4, 6, 5, 5), torch.randn(4, 8, 3, 3), torch.randn(8, 6, 3, 3)
    plain, cast = (ActivationGradient(side="input", kernel_size=3) for _ in range(2))
    plain.update(x, g, layer_weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast.update(x, g, layer_weight=weight)
    assert torch.equal(plain.compute().matrix, cast.compute().matrix)


def test_merged_saved_and_loaded_in_the_middle(tmp_path):
    layer, x = nn.Conv2d(3, 4, 3, padding=1, stride=2, groups=1), torch.randn(9, 3, 6, 6) + 5

    def collected(x):
        with pcafast.collect(layer, i=ActivationGradient(side="input"), o=ActivationGradient()) as stats:
            layer(x).square().flatten(1).sum(1).mean().backward()
        return stats

    whole, first, second = collected(x), collected(x[:2]), collected(x[2:])
    first.save(tmp_path / "first.safetensors")
    second.merge(pcafast.load_statistics(tmp_path / "first.safetensors"))
    for side in ("i", "o"):
        assert_matrix(second[side][""].compute(), whole[side][""].compute())


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "left"}, "side: expected one of output, input, got 'left'"),
        ({"side": "input", "tap": "norm"}, 'tap: expected "layer" for side="input", got \'norm\''),
        ({"loss_reduction": "max"}, "loss_reduction: expected one of mean, sum, got 'max'"),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1"),
        ({"padding_mode": "mirror"}, "padding_mode: expected one of zeros"),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(ArgumentError, match=message):
        ActivationGradient(**settings)


X, G, W = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3), torch.randn(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, (X, G), r"gradient: expected that of the layer's output.*\(2, 4, 5, 5\).*got \(2, 6, 3, 3\)"),
        ({"groups": 3}, (X, X), "groups: expected a divisor of the 4 channels of activation and the 4 .*got 3"),
        ({}, (X.long(), X), "activation: expected float16, bfloat16, float32 or float64, got torch.int64"),
        ({}, (X, X.long()), "gradient: expected float16, .*got torch.int64"),
        ({"channel_dim": 4}, (X, X), r"channel_dim: expected one of the 4 dimensions"),
        ({"side": "input", "kernel_size": 3}, (X, G), 'layer_weight: expected the weight.*side="input", got None'),
        ({"side": "input", "kernel_size": 3}, (X, G, W[:, :2]), r"layer_weight: expected shape \(6, 4, 3, 3\), got"),
        ({"side": "input", "kernel_size": 3}, (X, G[..., :2], W), r"gradient: expected.*\(2, 6, 3, 3\).*got"),
        ({"side": "input", "kernel_size": 7}, (X, G, W), "kernel_size: expected at most the 5 rows"),
    ],
)
def test_bad_batches_are_explained_and_leave_no_state(settings, arguments, message):
    statistic = ActivationGradient(**settings)
    activation, gradient, *weight = arguments
    with pytest.raises(ArgumentError, match=message):
        statistic.update(activation, gradient, layer_weight=weight[0] if weight else None)
    assert statistic.is_empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, G), r"gradient: expected shape \(2, 4, 5, 5\), got \(2, 6, 3, 3\)"),
        ((X[:0], X[:0]), "activation and gradient: expected at least one sample"),
        ((X, X / 0), "activation and gradient: expected finite values"),
        ((X.long(), X.long()), "activation: expected float16"),
    ],
)
def test_the_function_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        activation_gradient(*arguments)


def test_an_empty_batch_counts_nothing_and_other_channels_are_refused():
    statistic = ActivationGradient()
    statistic.update(X[:0], X[:0])
    with pytest.raises(pcafast.PcafastError, match="has seen no batch"):
        statistic.compute()
    statistic.update(X, X)
    with pytest.raises(ArgumentError, match="expected 4 entries as before, got 6"):
        statistic.update(G, G)


@pytest.mark.parametrize("what", ["activation", "gradient", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out(what, value):
    statistic = ActivationGradient(side="input", kernel_size=3)
    statistic.update(X, G, layer_weight=W)
    before = statistic.state_dict()
    bad = {"activation": X.clone(), "gradient": G.clone(), "weight": W.clone()}
    bad[what].view(-1)[5] = value
    statistic.update(bad["activation"], bad["gradient"], layer_weight=bad["weight"])
    assert statistic.skipped == 1
    assert all(torch.equal(one, before[name]) for name, one in statistic.state_dict().items() if name != "skipped")
    strict = ActivationGradient(side="input", kernel_size=3, nonfinite="raise")
    with pytest.raises(pcafast.NonFiniteError, match="NaN or infinities"):
        strict.update(bad["activation"], bad["gradient"], layer_weight=bad["weight"])

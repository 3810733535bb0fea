"""Covariance of patches against that of torch's own: all that a convolution can be, accuracy, streaming, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patch_truth import columns, mean_and_covariance
from torch import nn

import pcafast
from pcafast import ArgumentError, PatchCovariance, functional, reference
from pcafast.functional import patch_covariance
from pcafast.patches import Patches

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def error(found, expected):
    """Relative, in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


convolutions = st.fixed_dictionaries(
    {
        "kernel_size": pairs(1, 5),
        "stride": st.one_of(st.just((1, 1)), pairs(1, 4)),
        "padding": st.tuples(pairs(0, 4), pairs(0, 4)),
        "dilation": pairs(1, 3),
        "padding_mode": st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    }
)
OPERATORS = {"native": functional.operators, "reference": reference}


@pytest.mark.parametrize("backend", OPERATORS)
@settings(deadline=None, max_examples=200)
@given(
    convolution=convolutions,
    groups=st.sampled_from([1, 1, 2, 5]),
    group_channels=st.sampled_from([1, 2, 3, 17]),
    examples=st.integers(1, 3),
    size=pairs(1, 14),
    seed=st.integers(0, 2**32 - 1),
)
@example(  # patches that have no pixel at all
    convolution={
        "kernel_size": (1, 2),
        "stride": (1, 1),
        "padding": ((0, 0), (1, 1)),
        "dilation": (1, 2),
        "padding_mode": "zeros",
    },
    groups=1,
    group_channels=2,
    examples=1,
    size=(1, 1),
    seed=0,
)
def test_it_is_that_of_unfold(backend, convolution, groups, group_channels, examples, size, seed):
    torch.manual_seed(seed)
    x = torch.randn(examples, groups * group_channels, *size, dtype=torch.float64) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "operators", OPERATORS[backend])
        try:
            found = patch_covariance(x, groups=groups, **convolution)
        except ArgumentError:  # so must torch
            with pytest.raises(RuntimeError):
                columns(x, **convolution)
            return
    mean, covariance = mean_and_covariance(columns(x, **convolution), groups)
    scale = float(x.square().mean())  # the covariance may be zero
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-12, atol=1e-12 * scale)


# Around the widths of vectors (8, 16), tiles and blocks of channels (96), bands and batches of pixels (256, 2048).
SHAPES = [
    *[(2, c, 6, 7) for c in (1, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 80)],
    *[(1, c, 5, 4) for c in (95, 96, 97, 130)],
    *[(1, 3, h, w) for h, w in ((1, 2), (1, 300), (300, 1), (16, 16), (17, 15), (45, 46), (3, 700), (64, 40))],
    (50, 5, 7, 7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_dtype_and_layout(shape, dtype, device):
    x = (torch.randn(shape, device=device) + 2).to(dtype)
    wide = torch.cat([x, torch.full_like(x, math.nan)], 3)
    layouts = [x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, wide[..., : shape[3]]]
    for kernel, padding in ((3, 1), (1, 0)):
        both = (padding, padding)
        expected = mean_and_covariance(columns(x, (kernel, kernel), padding=(both, both)))
        for laid_out in layouts:
            found = patch_covariance(laid_out, kernel, padding=padding)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            assert error(found.mean, expected[0]) <= 1e-12
            assert error(found.covariance, expected[1]) <= tolerance
            assert torch.equal(found.covariance, found.covariance.mT)


@pytest.mark.parametrize("groups", [2, 4, 40])
@pytest.mark.parametrize("stride", [1, 2])
def test_groups(groups, stride, device):
    x = torch.randn(3, 40, 9, 8, device=device) + 1
    patches = columns(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))
    found = patch_covariance(x, 3, stride=stride, padding=1, groups=groups)
    assert error(found.covariance, mean_and_covariance(patches, groups)[1]) <= 1e-6


@pytest.mark.parametrize(("size", "kernel", "stride"), [((8, 1), (3, 1), (1, 2)), ((1, 9), (1, 3), (2, 1))])
def test_maps_of_one_column_or_row(size, kernel, stride):
    x = torch.randn(2, 20, *size, dtype=torch.float64)
    exact = mean_and_covariance(columns(x, kernel, stride))[1]
    assert error(patch_covariance(x, kernel, stride=stride).covariance, exact) <= 1e-12


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize(("channels", "height", "width"), [(20, 3, 1500), (3, 1, 9000), (2, 40, 2100), (100, 2, 2049)])
def test_rows_that_are_cut(channels, height, width, stride):
    x = torch.randn(2, channels, height, width) + 1
    convolution = {"kernel_size": (min(height, 3), 4), "padding": ((0, 1), (2, 5)), "dilation": (1, 3)}
    exact = mean_and_covariance(columns(x, stride=stride, **convolution))[1]
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        assert error(patch_covariance(laid_out, stride=stride, **convolution).covariance, exact) <= 1e-6


# Accuracy


DISTRIBUTIONS = {
    "relu": torch.relu,
    "relu, shifted": lambda x: torch.relu(x) + 2,
    "integers": lambda x: (3 * x).round(),
    "clipped": lambda x: x.clamp(0.3, 1),
    "outliers": lambda x: x.where(x < 3, 1e4 * x),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("channels", "kernel", "padding"), [(20, 3, 1), (1, 5, 2), (600, 1, 0)])
def test_many_equal_samples(name, channels, kernel, padding, device):
    """Whose rounding goes the same way every time, if nothing is done about it."""
    x = DISTRIBUTIONS[name](torch.randn(8, channels, 28, 28, device=device))
    patches = columns(x, (kernel, kernel), padding=((padding, padding),) * 2)
    exact = mean_and_covariance(patches)[1]
    centred = patches.float() - patches.float().mean(1, keepdim=True)
    of_torch = error((centred @ centred.T).double() / centred.shape[1], exact)
    assert error(patch_covariance(x, kernel, padding=padding).covariance, exact) <= max(1e-6, 2 * of_torch)
    plain = mean_and_covariance(x.double().movedim(1, 0).flatten(1))[1]
    assert error(functional.covariance(x).covariance, plain) <= max(1e-6, 2 * of_torch)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels", [3, 20])
def test_a_border_a_thousand_times_larger_than_the_interior(padding, channels, device):
    x = torch.randn(4, channels, 28, 28, device=device)
    border = torch.ones(28, 28, device=device, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    x = torch.where(border, 1000 * x, x)
    exact = mean_and_covariance(columns(x, (3, 3), padding=((padding, padding),) * 2))[1]
    found = patch_covariance(x, 3, padding=padding).covariance
    assert error(found, exact) <= 1e-6
    eigenvalues = torch.linalg.eigvalsh(found)
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]
    # Nor is the small interior lost beside the border: each entry to the size of its own row and column.
    sizes = exact.diagonal().sqrt()
    assert ((found - exact).abs() / (sizes[:, None] * sizes)).max() <= 1e-6


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (16, 3), (2, 5)])
def test_a_mean_a_thousand_times_the_deviation(padding, channels, kernel, device):
    x = 1000 + torch.randn(4, channels, 20, 20, device=device)
    exact = mean_and_covariance(columns(x, (kernel, kernel), padding=((padding, padding),) * 2))[1]
    assert error(patch_covariance(x, kernel, padding=padding).covariance, exact) <= 1e-6


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e20, 1e30])
def test_very_large_or_small_numbers(magnitude, device):
    x = torch.randn(2, 4, 8, 8, device=device) * magnitude
    exact = mean_and_covariance(columns(x, (3, 3), padding=((1, 1), (1, 1))))[1]
    assert error(patch_covariance(x, 3, padding=1).covariance, exact) <= 1e-6


def test_law_2_many_batches():
    """10,000 batches of mean / deviation 1000."""
    statistic, reflected = PatchCovariance(kernel_size=2), 0
    shift, total = torch.tensor(1000.0, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for _ in range(10_000):
        x = 1000 + torch.randn(1, 2, 4, 4)
        statistic.update(x)
        patches = columns(x, (2, 2)) - shift
        total += patches.sum(1)
        reflected = reflected + patches @ patches.T
    mean = total / 90_000
    exact = reflected / 90_000 - mean[:, None] * mean
    assert error(statistic.compute().covariance, exact) <= 1e-6


# Streaming


def test_the_state_of_a_3x3_kernel_has_29_blocks():
    statistic = PatchCovariance(kernel_size=3, padding=1)
    statistic.update(torch.randn(2, 16, 12, 10))
    assert statistic.state_dict()["comoment"].shape == (29, 1, 16, 16)


SIZES = [(8, 8), (2, 3), (1, 1), (5, 9), (6, 6)]


@pytest.mark.parametrize("kernel", [(3, 3), (1, 4), (2, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_maps_of_different_sizes(kernel, stride, device):
    settings_ = {"kernel_size": kernel, "stride": stride, "padding": ((1, 1), (2, 1))}
    maps = [torch.randn(3, 17, *size, dtype=torch.float64, device=device) + 3 for size in SIZES]
    patches = torch.cat([columns(x, **settings_) for x in maps], 1)
    mean, covariance = mean_and_covariance(patches)
    one, parts = PatchCovariance(**settings_), [PatchCovariance(**settings_) for _ in maps]
    for part, x in zip(parts, maps, strict=True):
        one.update(x)
        part.update(x)
    merged = PatchCovariance(**settings_)
    for part in reversed(parts):
        merged.merge(part)
    for found in (one.compute(), merged.compute()):
        torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=0)
        assert error(found.covariance, covariance) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_with_an_infinity_leaves_the_state_as_it_was(dtype, device):
    statistic = PatchCovariance(kernel_size=3, padding=1)
    statistic.update(torch.randn(2, 3, 5, 5, dtype=dtype, device=device))
    before = statistic.state_dict()
    for bad in (math.inf, math.nan):
        x = torch.randn(2, 3, 5, 5, dtype=dtype, device=device)
        x[1, 2, 4, 4] = bad
        statistic.update(x)
    assert statistic.skipped == 2
    assert all(torch.equal(value, before[name]) for name, value in statistic.state_dict().items() if name != "skipped")


@pytest.mark.parametrize("backend", OPERATORS)
def test_a_pixel_of_no_patch_may_be_anything(backend, monkeypatch, device):
    monkeypatch.setattr(functional, "operators", OPERATORS[backend])
    x = torch.randn(2, 3, 6, 6, device=device)
    expected = patch_covariance(x, 1, stride=2)
    x[:, :, 1::2] = math.nan
    x[:, :, :, 1::2] = math.inf
    found = patch_covariance(x, 1, stride=2)
    assert torch.equal(found.covariance, expected.covariance)


# Layers

LAYERS = {
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2)), (3, 4, 9, 8)),
    "same, even kernel": (nn.Conv2d(3, 5, (2, 4), padding="same"), (3, 3, 7, 7)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (3, 3, 7, 7)),
    "circular": (nn.Conv2d(16, 5, 3, padding=1, padding_mode="circular"), (3, 16, 7, 7)),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2), (3, 8, 7, 7)),
    "conv1d": (nn.Conv1d(5, 6, 4, stride=2, padding=1), (3, 5, 11)),
    "conv1d, same": (nn.Conv1d(5, 6, 4, padding="same"), (3, 5, 11)),
    "linear": (nn.Linear(7, 3), (4, 7)),
    "linear, tokens": (nn.Linear(7, 3), (4, 5, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_predicts_the_covariance_of_the_outputs(name):
    """With weight W, outputs have covariance W S W' and mean W m + b: so the patches are those of the layer."""
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64) + 1
    with pcafast.collect(nn.Sequential(layer), inputs=PatchCovariance(), outputs=pcafast.Covariance()) as stats:
        layer_output = layer(x)
    assert layer_output.requires_grad
    mean, covariance = stats["inputs"]["0"].compute()
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    expected = stats["outputs"]["0"].compute()
    blocks = covariance.view(groups, *covariance.shape[-2:])
    predicted = weight @ blocks @ weight.mT
    torch.testing.assert_close(predicted.squeeze(0), expected.covariance, rtol=1e-10, atol=1e-12)
    predicted_mean = (weight @ mean.view(groups, -1, 1)).flatten() + layer.bias
    torch.testing.assert_close(predicted_mean.detach(), expected.mean, rtol=1e-10, atol=1e-12)


def test_layers_without_patches_are_left_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3))
    with pcafast.collect(model, patches=PatchCovariance()) as stats:
        model(torch.randn(2, 1, 8, 8))
    assert list(stats["patches"]) == ["0"]
    with pytest.raises(ArgumentError, match=r"none of the chosen layers \(0\) can have a PatchCovariance"):
        pcafast.collect(nn.Sequential(nn.Conv3d(1, 2, 3)), patches=PatchCovariance())


def test_the_kfac_example():
    """The Kronecker factors of a layer, as the docstring says, against per-example gradients of a linear model."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4)).double()
    images, labels = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    with pcafast.collect(model, a=PatchCovariance(), g=pcafast.GradientCovariance(loss_reduction="mean")) as stats:
        F.cross_entropy(model(images), labels).backward()
    mean, covariance = stats["a"]["0"].compute()
    a = covariance + torch.outer(mean, mean)
    mean, covariance = stats["g"]["0"].compute()
    g = covariance + torch.outer(mean, mean)
    patches = columns(images, (3, 3), padding=((1, 1), (1, 1)))
    assert error(a, patches @ patches.T / patches.shape[1]) <= 1e-10
    maps = model[0](images).detach().requires_grad_()
    loss = F.cross_entropy(model[2](model[1](maps)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, maps)
    samples = gradient.movedim(1, 0).flatten(1)
    assert error(g, samples @ samples.T / samples.shape[1]) <= 1e-10


# Bad input

X = torch.randn(2, 4, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kernel_size": 6},
            r"kernel_size: expected at most the 5 rows of the padded input, got 6 \(kernel 6, dilation 1\)",
        ),
        (
            {"kernel_size": (1, 3), "dilation": 3},
            r"expected at most the 6 columns of the padded input, got 7 \(kernel 3",
        ),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1, or two of them, got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: expected an integer of at least 1, or two of them"),
        ({"kernel_size": 3, "stride": 0}, "stride: expected an integer of at least 1, or two of them, got 0"),
        ({"kernel_size": 3, "stride": (1, 0)}, "stride: expected an integer of at least 1"),
        ({"kernel_size": 3, "dilation": 0}, "dilation: expected an integer of at least 1"),
        ({"kernel_size": 3, "padding": -1}, "padding: expected an integer of at least 0"),
        ({"kernel_size": 3, "padding": (1, 1, 1)}, "padding: expected one number or one .or two. for each of two axes"),
        ({"kernel_size": 3, "padding": 0.5}, "padding: expected an integer of at least 0"),
        ({"kernel_size": 3, "padding": "SAME"}, "padding: expected 'same', 'valid' or numbers, got 'SAME'"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, "'same' goes with stride 1 alone"),
        (
            {"kernel_size": 3, "padding_mode": "edge"},
            "padding_mode: expected one of zeros, reflect, replicate, circular",
        ),
        ({"kernel_size": 3, "padding": 5, "padding_mode": "reflect"}, "padding: expected at most 4 of mode 'reflect'"),
        (
            {"kernel_size": 3, "padding": 6, "padding_mode": "circular"},
            "expected at most 5 of mode 'circular' for 5 rows",
        ),
        ({"kernel_size": 3, "groups": 3}, "groups: expected a divisor of the 4 channels of x, got 3"),
        ({"kernel_size": 3, "groups": 0}, "groups: expected a divisor"),
        ({"kernel_size": 3, "correction": 24}, "correction: expected less than the 24 samples seen, got 24"),
        ({"kernel_size": 3, "x": X[0]}, r"x: expected maps of shape \(N, C, H, W\), got shape \(4, 5, 6\)"),
        ({"kernel_size": 3, "x": X.long()}, "x: expected float16, bfloat16, float32 or float64"),
        ({"kernel_size": 3, "x": X[:0]}, "x: expected at least one sample"),
        ({"kernel_size": 3, "x": X / 0}, "x: expected finite values"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        patch_covariance(**{"x": X, **arguments})


def test_a_state_beyond_all_memory_is_refused_with_its_size():
    x = torch.zeros(()).expand(1, 400_000, 1, 1)
    with pytest.raises(ArgumentError, match=r"one that would need 1,192.1 GiB"):
        patch_covariance(x, 1)
    with pytest.raises(ArgumentError, match=r"one that would need 1,192.1 GiB"):
        functional.covariance(x)
    statistic = pcafast.Covariance()
    statistic.layer = "wide"
    with pytest.raises(ArgumentError, match=r"Covariance of layer 'wide': .* would need 1,192.1 GiB"):
        statistic.update(x)
    assert statistic.is_empty


def test_a_kernel_beyond_all_accounts_is_refused():
    with pytest.raises(ArgumentError, match="kernel_size: expected a smaller kernel"):
        patch_covariance(torch.randn(1, 32, 64, 64), 31, padding=15, groups=32)


@pytest.mark.parametrize("channel_dim", [2, -2, 3])
def test_channels_elsewhere(channel_dim):
    x = torch.randn(2, 5, 6, 7)
    statistic = PatchCovariance(kernel_size=3, channel_dim=channel_dim)
    statistic.update(x.movedim(1, channel_dim))
    assert torch.equal(statistic.compute().covariance, patch_covariance(x, 3).covariance)


def test_an_empty_batch_changes_nothing():
    for statistic, x in (
        (PatchCovariance(channel_dim=-1), torch.empty(0, 4)),
        (PatchCovariance(kernel_size=3), torch.empty(0, 4, 5, 5)),
    ):
        statistic.update(x)
        assert not statistic.state_dict()["patches"]


@pytest.mark.parametrize("bad", [torch.randn(2, 5, 2, 2), torch.ones(2, 4, 2, 2, dtype=torch.int64)])
def test_a_refused_batch_leaves_the_state_as_it_was(bad):
    statistic = other_state()
    before = statistic.state_dict()
    with pytest.raises(ArgumentError):
        statistic.update(bad)
    after = statistic.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    fresh = PatchCovariance(kernel_size=3, padding=1)
    with pytest.raises(ArgumentError):
        fresh.update(torch.ones(2, 4, 2, 2, dtype=torch.int64))
    assert fresh.is_empty


@pytest.mark.parametrize("other", [{"kernel_size": 5, "padding": 2}, {"groups": 2}])
def test_a_state_of_another_kernel_or_groups_is_not_loaded(other):
    with pytest.raises(ArgumentError, match="state: expected 1 groups and a kernel of 9 pixels"):
        PatchCovariance(kernel_size=3, padding=1).load_state_dict(other_state(**other).state_dict())


def other_state(**changes):
    other = PatchCovariance(**{"kernel_size": 3, "padding": 1, **changes})
    other.update(torch.randn(2, 4, 6, 6))
    return other


@pytest.mark.parametrize("change", [{"kernel_size": 2}, {"padding": 0}, {"groups": 2}, {"padding_mode": "circular"}])
def test_a_state_of_other_settings_is_not_merged(change):
    statistic = other_state()
    before = statistic.state_dict()
    with pytest.raises(ArgumentError, match="other: expected a PatchCovariance"):
        statistic.merge(other_state(**change))
    assert all(torch.equal(value, before[name]) for name, value in statistic.state_dict().items())


def test_a_state_of_other_channels_or_dtype_is_refused():
    statistic, other = other_state(), PatchCovariance(kernel_size=3, padding=1)
    before = statistic.state_dict()
    other.update(torch.randn(2, 5, 6, 6))
    with pytest.raises(ArgumentError, match="expected 4 entries as before, got 5"):
        statistic.merge(other)
    with pytest.raises(ArgumentError, match="expected 4 entries as before, got 5"):
        statistic.update(torch.randn(2, 5, 6, 6))
    with pytest.raises(ArgumentError, match=r"state 'comoment': expected torch\.float64"):
        statistic.load_state_dict({**before, "comoment": before["comoment"].float()})
    with pytest.raises(ArgumentError, match=r"state 'right': expected torch\.float64 of shape"):
        statistic.load_state_dict({**before, "left": before["left"][:, :3]})
    assert all(torch.equal(value, before[name]) for name, value in statistic.state_dict().items())


LAYOUT = Patches.of(3, padding=1).layout(X, 1)
STATE = {
    name: torch.zeros(shape, dtype=torch.float64)
    for name, shape in (
        ("patches", ()),
        ("count", (29,)),
        ("left", (29, 4)),
        ("right", (29, 4)),
        ("comoment", (29, 1, 4, 4)),
    )
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rectangles": LAYOUT.rectangles + 1}, "rectangles: expected pixels inside of a map of 5 x 6"),
        ({"rectangles": LAYOUT.rectangles[:, :5]}, "rectangles: expected contiguous Long of shape"),
        ({"taps": torch.zeros(2, 2, dtype=torch.int64)}, "taps: expected one, or one rectangle of pixels"),
        ({"taps": torch.ones(1, 2, dtype=torch.int64)}, "rectangles: expected pixels inside"),
        ({"steps": torch.zeros(2, dtype=torch.int64)}, "steps: expected numbers from 1"),
        ({"source_rows": LAYOUT.source_rows + 1}, "source_rows: expected numbers from -1 to below 5, got 5"),
        ({"slot_ends": LAYOUT.slot_ends + 1}, "slot_ends: expected numbers from 29 to below 30, got 30"),
        (
            {"slot_rectangles": LAYOUT.slot_rectangles + 1},
            "slot_rectangles: expected numbers from 0 to below 29, got 29",
        ),
    ],
)
def test_the_operator_refuses_a_layout_that_leads_outside(change, message):
    with pytest.raises(ValueError, match=message):
        functional.add_patches(
            X, LAYOUT._replace(**change), 1, {**STATE, "skipped": torch.zeros((), dtype=torch.int64)}
        )

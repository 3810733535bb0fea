"""The native operators against the reference in float64: values, layouts, dtypes, registration, bad input."""

import pytest
import torch
from states import as_laid_out, covariance_state, moments_state, patch_state, taylor_state

from pcafast import native, reference
from pcafast.patches import Patches

OPS = torch.ops.pcafast

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (shape, channel_dim): at and around the vector width (8), the register tile (4), the channel block (64) and the
# panel of samples (512).
SHAPES = [
    *[((2, c, 7, 9), 1) for c in (1, 3, 4, 5, 8, 63, 64, 65)],
    *[((1, 3, p), 1) for p in (1, 7, 8, 9, 511, 512, 513, 1025)],
    ((300, 10), 1),
    ((1, 5), 1),
    ((4, 33, 17), -1),
    ((2, 3, 5, 20), -1),
    ((6, 5, 4), 0),
    ((9,), 0),
    ((2, 3, 6, 5), 2),
    ((3, 4, 2, 7, 5), -2),
    ((2, 4, 3, 4, 5), 1),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


def layouts_of(shape):
    return [layout for layout in LAYOUTS if (layout != "channels_last" or len(shape) == 4) and len(shape) > 1]


CASES = [(shape, dim, layout) for shape, dim in SHAPES for layout in layouts_of(shape) or ["contiguous"]]


def sample(shape, dtype, layout, device, mean=2.0):
    return as_laid_out((torch.randn(shape, device=device) + mean).to(dtype), layout)


def assert_close(found, expected, dtype):
    """To the rounding of float32 sums, which all dtypes but float64 may use within a panel of samples."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_the_native_library_is_loaded():
    assert native.MISSING is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "layout"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_covariance_is_that_of_the_reference(shape, dim, layout, dtype, weighted, device):
    channels = shape[dim]
    positions = torch.empty(shape, device=device).select(dim, 0).shape
    for groups in {1, channels}:
        found, expected = covariance_state(channels, groups, device), covariance_state(channels, groups, device)
        for mean in (2.0, -1.0):
            x = sample(shape, dtype, layout, device, mean)
            weight = torch.rand(positions, device=device).round(decimals=1) if weighted else None
            scale = 2.5 if weighted else 1.0
            OPS.covariance_update_(x, dim, groups, scale, weight, *found)
            reference.covariance_update_(x, dim, groups, scale, weight, *expected)
        assert_close(found, expected, dtype)
        assert torch.equal(found[2], found[2].mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "layout"), CASES)
def test_taylor_is_that_of_the_reference(shape, dim, layout, dtype, device):
    found, expected = taylor_state(shape[dim], device), taylor_state(shape[dim], device)
    for _ in range(2):
        activation, gradient = sample(shape, dtype, layout, device), sample(shape, dtype, "contiguous", device, 0)
        OPS.taylor_update_(activation, gradient, dim, 3.5, *found)
        reference.taylor_update_(activation, gradient, dim, 3.5, *expected)
    assert_close(found, expected, torch.float32 if device.type == "cuda" else torch.float64)


def test_taylor_of_an_activation_and_a_gradient_of_different_dtypes(device):
    activation, gradient = torch.randn(3, 5, 9, device=device).bfloat16(), torch.randn(3, 5, 9, device=device)
    found, expected = taylor_state(5, device), taylor_state(5, device)
    OPS.taylor_update_(activation, gradient, 1, 1.0, *found)
    reference.taylor_update_(activation, gradient, 1, 1.0, *expected)
    assert_close(found, expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "layout"), CASES)
def test_channel_moments_are_those_of_the_reference(shape, dim, layout, dtype, device):
    found, expected = moments_state(shape[dim], device), moments_state(shape[dim], device)
    for mean in (2.0, 0.0):
        x = sample(shape, dtype, layout, device, mean).relu()
        OPS.channel_moments_update_(x, dim, *found)
        reference.channel_moments_update_(x, dim, *expected)
    assert_close(found, expected, torch.float64)


def test_float32_covariance_errs_no_more_than_twice_what_torch_does(device):
    x = torch.randn(8, 70, 33, 35, device=device) * torch.logspace(-2, 2, 70, device=device).view(70, 1, 1) + 3
    samples = x.movedim(1, 0).flatten(1)
    exact = torch.cov(samples.double(), correction=0)
    state = covariance_state(70, device=device)
    OPS.covariance_update_(x, 1, 1, 1.0, None, *state)
    of_torch = torch.cov(samples, correction=0)

    def error(found):
        return float((found - exact).norm() / exact.norm())

    assert error(state[2][0] / state[0]) <= 2 * error(of_torch) + 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(bad, device):
    good = torch.randn(3, 5, 4, 4, device=device)
    poisoned = good.clone()
    poisoned[1, 2, 3, 0] = bad
    for update, state in (
        (lambda x, s: OPS.covariance_update_(x, 1, 1, 1.0, None, *s), covariance_state(5, device=device)),
        (lambda x, s: OPS.taylor_update_(x, good, 1, 1.0, *s), taylor_state(5, device)),
        (lambda x, s: OPS.taylor_update_(good, x, 1, 1.0, *s), taylor_state(5, device)),
        (lambda x, s: OPS.channel_moments_update_(x, 1, *s), moments_state(5, device)),
    ):
        update(good, state)
        before = [tensor.clone() for tensor in state]
        update(poisoned, state)
        assert all(torch.equal(a, b) for a, b in zip(before[:-1], state[:-1], strict=True))
        assert (before[-1], state[-1]) == (0, 1)


def test_masked_positions_may_hold_anything(device):
    x = torch.randn(2, 6, 4, device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool, device=device)
    expected = torch.cov(x[mask].double().T, correction=0)
    x[~mask] = float("nan")
    state = covariance_state(4, device=device)
    OPS.covariance_update_(x, -1, 1, 1.0, mask, *state)
    assert (state[0], state[-1]) == (8, 0)
    torch.testing.assert_close(state[2][0] / 8, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_an_empty_batch_changes_nothing(shape, device):
    x, channels = torch.empty(shape, device=device), shape[1]
    for update, state in (
        (lambda s: OPS.covariance_update_(x, 1, 1, 1.0, None, *s), covariance_state(channels, device=device)),
        (lambda s: OPS.taylor_update_(x, x, 1, 1.0, *s), taylor_state(channels, device)),
        (lambda s: OPS.channel_moments_update_(x, 1, *s), moments_state(channels, device)),
    ):
        update(state)
        assert not any(tensor.any() for tensor in state)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_batches_give_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, gradient = torch.randn(2, 8, 40, 24, 24)
        results = []
        for _ in range(5):
            covariance, taylor, moments = covariance_state(40), taylor_state(40), moments_state(40)
            OPS.covariance_update_(x, 1, 1, 1.0, None, *covariance)
            OPS.taylor_update_(x, gradient, 1, 1.0, *taylor)
            OPS.channel_moments_update_(x, 1, *moments)
            results.append([*covariance, *taylor, *moments])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_registration(device):
    x, gradient = torch.randn(2, 2, 6, 5, 4, device=device)
    weight = torch.rand(2, 5, 4, device=device)
    layout = Patches.of(3, padding=1).layout(x, 2)
    for operator, arguments in (
        (OPS.covariance_update_, (x, 1, 2, 1.0, weight, *covariance_state(6, 2, device))),
        (OPS.patch_covariance_update_, (x, *layout[:8], 2, *patch_state(layout, 6, 2, device))),
        (OPS.taylor_update_, (x, gradient, 1, 2.0, *taylor_state(6, device))),
        (OPS.channel_moments_update_, (x, 1, *moments_state(6, device))),
        (OPS.feature_map_rank, (x, 1e-6, 0.0)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-12, 1e12, 1e20, 1e30])
def test_covariance_of_very_large_or_small_numbers(magnitude, device):
    x = torch.randn(3, 7, 50, device=device) * magnitude
    exact = torch.cov(x.double().movedim(1, 0).flatten(1), correction=0)
    state = covariance_state(7, device=device)
    OPS.covariance_update_(x, 1, 1, 1.0, None, *state)
    assert (state[2][0] / state[0] - exact).norm() / exact.norm() <= 1e-6


def test_moments_of_numbers_whose_sum_has_no_square(device):
    x = torch.arange(60_000.0, dtype=torch.float64, device=device)[None, None] * 1e147
    state = moments_state(1, device)
    OPS.channel_moments_update_(x, 1, *state)
    expected = (x - x.mean()).div(1e147).square().mean()
    torch.testing.assert_close(state[2].squeeze() / 1e147 / 1e147 / 60_000, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("channels", [511, 513, 600])
def test_covariance_of_many_channels(channels, device):
    """Where the threads share one matrix instead of having one each."""
    x = torch.randn(2, channels, 700, device=device)
    exact = torch.cov(x.double().movedim(1, 0).flatten(1), correction=0)
    state = covariance_state(channels, device=device)
    OPS.covariance_update_(x, 1, 1, 1.0, None, *state)
    assert (state[2][0] / state[0] - exact).norm() / exact.norm() <= 1e-6
    assert torch.equal(state[2], state[2].mT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ops, x: ops.covariance_update_(x.int(), 1, 1, 1.0, None, *covariance_state(4)),
            "x: expected float16.*nt",
        ),
        (
            lambda ops, x: ops.covariance_update_(x.to(torch.complex64), 1, 1, 1.0, None, *covariance_state(4)),
            "x: expected float16.*omplex",
        ),
        (
            lambda ops, x: ops.covariance_update_(x, 3, 1, 1.0, None, *covariance_state(4)),
            "channel_dim: expected one of the 3",
        ),
        (
            lambda ops, x: ops.covariance_update_(x, 1, 3, 1.0, None, *covariance_state(4)),
            "groups: expected a divisor of the 4",
        ),
        (
            lambda ops, x: ops.covariance_update_(x, 1, 1, 1.0, torch.ones(2, 4), *covariance_state(4)),
            r"weight: expected the shape of x without channels, \[2, 3\], got \[2, 4\]",
        ),
        (
            lambda ops, x: ops.covariance_update_(x, 1, 1, 1.0, torch.full((2, 3), -0.5), *covariance_state(4)),
            "weight: expected no negative number and no NaN",
        ),
        (lambda ops, x: ops.taylor_update_(x, x[:1], 1, 1.0, *taylor_state(4)), "gradient: expected the shape"),
        (
            lambda ops, x: ops.taylor_update_(x.int(), x.int(), 1, 1.0, *taylor_state(4)),
            "activation: expected float16.*nt",
        ),
        (
            lambda ops, x: ops.channel_moments_update_(x.to(torch.complex64), 1, *moments_state(4)),
            "x: expected float16.*omplex",
        ),
        (lambda ops, x: ops.channel_moments_update_(x, -4, *moments_state(4)), "channel_dim: expected one of the 3"),
        (lambda ops, x: ops.feature_map_rank(x[None].int(), 0.0, 0.0), "x: expected float16.*nt"),
        (lambda ops, x: ops.feature_map_rank(x[None].to(torch.complex64), 0.0, 0.0), "x: expected float16.*omplex"),
        (lambda ops, x: ops.feature_map_rank(x, 0.0, 0.0), r"x: expected feature maps of shape \(N, C, H, W\)"),
        (lambda ops, x: ops.feature_map_rank(x[None], -1.0, 0.0), "rtol: expected a finite number that is not neg"),
        (lambda ops, x: ops.feature_map_rank(x[None], float("nan"), 0.0), "rtol: expected a finite number"),
        (lambda ops, x: ops.feature_map_rank(x[None], 0.0, float("inf")), "atol: expected a finite number"),
    ],
)
@pytest.mark.parametrize("ops", [OPS, reference], ids=["native", "reference"])
def test_bad_arguments_are_named(call, message, ops):
    with pytest.raises(ValueError, match=message):
        call(ops, torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: OPS.covariance_update_(x, 1, 1, 1.0, None, *covariance_state(5)),
            r"mean: expected.*\[4\].*got.*\[5\]",
        ),
        (
            lambda x: OPS.covariance_update_(x, 1, 1, 1.0, None, *[state.float() for state in covariance_state(4)]),
            "count: expected contiguous Double",
        ),
        (lambda x: OPS.taylor_update_(x, x, 1, 1.0, *taylor_state(3)), r"sums: expected.*\[4, 4\]"),
        (lambda x: OPS.channel_moments_update_(x, 1, *moments_state(3)), r"mean: expected.*\[4\]"),
    ],
)
def test_states_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 3))

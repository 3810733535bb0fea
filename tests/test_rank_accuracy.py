"""The rank of a map is the count that float64 singular values give, at every threshold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pcafast  # noqa: F401  registers the operators

SHAPES = [
    (1, 1),
    (1, 9),
    (9, 1),
    (2, 2),
    (3, 5),
    (7, 7),
    (8, 8),
    (9, 9),
    (14, 14),
    (16, 16),
    (17, 31),
    (28, 28),
    (32, 32),
    (33, 33),
    (56, 56),
    (64, 48),
    (64, 64),
    (65, 65),
    (90, 67),
    (66, 80),
    (112, 112),
]
LARGE = SHAPES[-4:]  # by way of their Gram matrices, at the default rtol
DEFAULT = "default"
RTOLS = [DEFAULT, 1e-3, 1e-9, 0.0]


def default_rtol(x: Tensor) -> float:
    return max(x.shape[2:]) * torch.finfo(torch.float32).eps


def rank(x: Tensor, rtol: float | str = DEFAULT, atol: float = 0.0) -> Tensor:
    return torch.ops.pcafast.feature_map_rank(x, default_rtol(x) if rtol == DEFAULT else rtol, atol)


def assert_counts_singular_values(x: Tensor, rtol: float | str = DEFAULT) -> None:
    """Compare every map that has no singular value within 0.1 % of its threshold; half of them must be such."""
    noise = max(x.shape[2:]) * torch.finfo(torch.float64).eps
    relative = max(default_rtol(x) if rtol == DEFAULT else rtol, noise)
    # Near 1, since LAPACK is inexact for maps of denormals. A power of two, in two steps because it may overflow.
    exponent = torch.frexp(x.double().abs().amax((2, 3), keepdim=True)).exponent
    near_one = torch.ldexp(torch.ldexp(x.double(), -(exponent // 2)), -(exponent - exponent // 2))
    singular_values = torch.linalg.svdvals(near_one)
    threshold = relative * singular_values[..., :1]
    decided = ((singular_values - threshold).abs() >= 1e-3 * threshold).all(2)
    assert decided.double().mean() >= 0.5
    expected = (singular_values > threshold).sum(2)
    torch.testing.assert_close(rank(x, rtol)[decided], expected[decided], rtol=0, atol=0)


def low_rank_maps(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Maps (3, ranks, height, width) in float64, of up to 7 ranks between 1 and the shorter side."""
    shorter = min(height, width)
    ranks = sorted({1, 2, 3, shorter // 4, shorter // 2, shorter - 1, shorter} & set(range(1, shorter + 1)))
    left = torch.randn(3, len(ranks), height, shorter, generator=generator, dtype=torch.float64)
    right = torch.randn(3, len(ranks), shorter, width, generator=generator, dtype=torch.float64)
    kept = torch.arange(shorter) < torch.tensor(ranks)[:, None]
    return left * kept[:, None, :] @ right


def maps_with_spectra(singular_values: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random maps (N, C, height, width) in float64 with the given singular values (N, C, shorter side)."""
    batch, shorter = singular_values.shape[:2], singular_values.shape[2]
    left = torch.linalg.qr(torch.randn(*batch, height, shorter, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(*batch, width, shorter, generator=generator, dtype=torch.float64)).Q
    return left * singular_values[:, :, None, :] @ right.mT


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rtol", RTOLS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_low_rank_maps_at_all_scales(height: int, width: int, rtol: float | str, generator: torch.Generator) -> None:
    maps = low_rank_maps(height, width, generator)
    scales = torch.tensor([1e-20, 1.0, 1e15]).double()[:, None, None, None]
    assert_counts_singular_values(maps * scales, rtol)
    assert_counts_singular_values((maps * scales).float(), rtol)
    assert_counts_singular_values((torch.relu(maps) * scales).float(), rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_rank_of_integer_maps(dtype: torch.dtype, generator: torch.Generator) -> None:
    """A product of integer factors, one of them unit triangular, has its inner size as its rank, in every type."""
    for inner in range(1, 17):
        left = torch.randint(0, 2, (2, 5, 16, inner), generator=generator).tril(-1) + torch.eye(16, inner)
        right = torch.randint(0, 2, (2, 5, inner, 20), generator=generator).triu(1) + torch.eye(inner, 20)
        assert (rank((left @ right).to(dtype)) == inner).all()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (512, 512), (512, 300), (129, 512), (1, 512), (512, 3)])
def test_largest_maps(height: int, width: int, generator: torch.Generator) -> None:
    assert_counts_singular_values(low_rank_maps(height, width, generator)[:1, -3:].float())


@given(
    shape=st.sampled_from(SHAPES + 2 * LARGE),
    # Of a square as large as 100 x 100 the Gram matrix is still used at 7e-6.
    rtol=st.sampled_from([None, 1e-2, 1e-3, 7e-6, 1e-6, 1e-9, 1e-12]),
    scale=st.sampled_from([1e-280, 1e-20, 1.0, 1e15, 1e280]),
    absolute=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_singular_values_around_the_threshold(
    shape: tuple[int, int], rtol: float | None, scale: float, absolute: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    height, width = shape
    shorter = min(shape)
    threshold = max(shape) * torch.finfo(torch.float32).eps if rtol is None else rtol
    is_above = torch.rand(2, 5, shorter, generator=generator) < torch.rand(2, 5, 1, generator=generator)
    spectra = threshold * torch.where(is_above, 1.002, 0.998).double()
    spectra[..., 0] = 1
    maps = maps_with_spectra(spectra, height, width, generator) * scale
    expected = is_above[..., 1:].sum(2) + 1
    found = rank(maps, 0.0, threshold * scale) if absolute else rank(maps, threshold)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_threshold_is_the_larger_of_the_two(generator: torch.Generator) -> None:
    spectra = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25]).double().expand(3, 3, 6)
    maps = maps_with_spectra(spectra, 6, 9, generator)
    for rtol, atol, expected in [
        (0.1, 0.0, 4), (0.0, 0.7, 4), (0.1, 1.5, 3), (0.3, 0.7, 2), (0.0, 9.0, 0), (2.0, 0.0, 0), (0.0, 1e300, 0),
    ]:  # fmt: skip
        assert (rank(maps, rtol, atol) == expected).all()


def test_equal_singular_values() -> None:
    for size in (2, 8, 33, 64, 384):
        identities = torch.eye(size).expand(1, 3, size, size)
        assert (rank(identities) == size).all()
        assert (rank(identities, 0.999) == size).all()
        assert (rank(identities, 1.001) == 0).all()


def test_threshold_equal_to_a_singular_value_of_a_part() -> None:
    """The Sturm sequence then has a zero in its middle; the singular values are 1.618 and 0.618."""
    upper = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert rank(torch.stack([upper, upper.T])[None], 0.0, 1.0).tolist() == [[1, 1]]


@pytest.mark.parametrize("rtol", RTOLS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_constant_maps(height: int, width: int, rtol: float | str) -> None:
    for value in (0.1, -3.7, 1e30, 1e-30, 1e-42):
        assert (rank(torch.full((1, 3, height, width), value), rtol) == 1).all()
    for value in (1e300, 1e-300, 5e-324, -torch.finfo(torch.float64).max):
        assert (rank(torch.full((1, 3, height, width), value, dtype=torch.float64), rtol) == 1).all()
    for value in (0.0, -0.0):
        assert (rank(torch.full((1, 3, height, width), value), rtol) == 0).all()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-40), (torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-318),
        (torch.float64, 1e-300), (torch.float64, 1e300), (torch.float16, 2.0**-20), (torch.bfloat16, 1e-39),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("height", "width"), [(9, 12), (67, 70)])
def test_extreme_magnitudes(
    dtype: torch.dtype, scale: float, height: int, width: int, generator: torch.Generator
) -> None:
    maps = (low_rank_maps(height, width, generator) * scale).to(dtype)
    maps[0, 0] = 0
    maps[0, 1] = 1
    assert_counts_singular_values(maps)


@pytest.mark.parametrize("size", [8, 66])
def test_nonfinite_maps_leave_their_neighbours_alone(size: int, generator: torch.Generator) -> None:
    clean = low_rank_maps(size, size, generator)[:2].float()
    expected = rank(clean)
    for value in (float("nan"), float("inf"), -float("inf")):
        maps = clean.clone()
        maps[0, 2, 3, 4] = value
        maps[1, 0, 0, 0] = value
        found = rank(maps)
        assert found[0, 2] == found[1, 0] == -1
        found[0, 2], found[1, 0] = expected[0, 2], expected[1, 0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(1, 6), (7, 5), (66, 65)])
def test_a_nonfinite_element_shows_wherever_it_is(
    height: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    places = torch.randperm(height * width, generator=generator)[:35]
    places[:3] = torch.tensor([0, width - 1, height * width - 1])
    for base in (torch.zeros(height, width, dtype=dtype), torch.randn(height, width, generator=generator).to(dtype)):
        for value in (float("nan"), float("inf")):
            maps = base.repeat(1, len(places), 1, 1)
            maps.flatten(2)[0, torch.arange(len(places)), places] = value
            assert (rank(maps) == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(12, 14), (70, 70)])
def test_strides(dtype: torch.dtype, height: int, width: int, generator: torch.Generator) -> None:
    maps = torch.relu(torch.randn(3, 10, height, width, generator=generator)).to(dtype)
    views = [
        maps.contiguous(memory_format=torch.channels_last),
        maps.mT,
        maps.transpose(0, 1),
        maps[:, 1::3, 2:9, ::2],
        maps[:, :, ::4, 3:5],
        maps[1:2, 4:5].expand(5, 3, height, width),
        maps.permute(2, 3, 0, 1),
    ]
    for view in views:
        torch.testing.assert_close(rank(view), rank(view.contiguous()))
        assert_counts_singular_values(view)


@pytest.mark.parametrize("size", [6, 65])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_a_map_does_not_depend_on_its_batch(channels: int, size: int, generator: torch.Generator) -> None:
    maps = torch.relu(torch.randn(3, channels, size, size, generator=generator) - 2.5 / size**0.5)
    alone = [[int(rank(maps[n : n + 1, c : c + 1])) for c in range(channels)] for n in range(3)]
    assert rank(maps).tolist() == alone


def test_threads_give_the_same_ranks(generator: torch.Generator) -> None:
    maps = torch.relu(torch.randn(10, 61, 24, 24, generator=generator) - 1.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = rank(maps)
        torch.set_num_threads(3)
        torch.testing.assert_close(rank(maps), expected)
    finally:
        torch.set_num_threads(threads)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    ranks = rank(torch.empty(shape))
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == torch.zeros(shape[:2]).tolist()

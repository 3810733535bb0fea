import pytest
import torch

from pcafast.bases import left_out_shares, principal_components
from pcafast.errors import ArgumentError


def _covariance(channels: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(3 * channels, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / len(rows)


def test_components_diagonalise_the_covariance_from_the_largest_variance_down():
    covariance = _covariance(7)
    variances, basis = principal_components(covariance)
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(basis @ covariance @ basis.T, torch.diag(variances))
    assert torch.equal(variances, variances.sort(descending=True).values)


def test_first_component_is_the_direction_that_the_data_was_stretched_in():
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64) + 3 * torch.outer(direction, direction)
    variances, basis = principal_components(covariance)
    torch.testing.assert_close(variances, torch.tensor([4.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(basis[0], -direction)  # the largest component is positive


@pytest.mark.parametrize("seed", range(5))
def test_largest_component_of_each_direction_is_positive(seed):
    basis = principal_components(_covariance(6, seed)).basis
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_each_group_is_decomposed_alone():
    blocks = torch.stack([_covariance(4, seed) for seed in range(3)])
    variances, basis = principal_components(blocks)
    for group, block in enumerate(blocks):
        alone = principal_components(block)
        torch.testing.assert_close(variances[group], alone.variances)
        torch.testing.assert_close(basis[group], alone.basis)


def test_variances_of_a_deficient_covariance_are_never_negative():
    row = torch.randn(1, 20, dtype=torch.float64)
    assert (principal_components(row.T @ row).variances >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_float64(dtype):
    variances, basis = principal_components(_covariance(3).to(dtype))
    assert variances.dtype == basis.dtype == torch.float64


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.zeros(2, 3), r"expected square matrices, .* got shape \(2, 3\)"),
        (torch.zeros(4), r"got shape \(4,\)"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "expected finite numbers"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), r"expected a symmetric matrix, .* by 0\.1"),
    ],
)
def test_bad_covariance(covariance, message):
    with pytest.raises(ArgumentError, match=message):
        principal_components(covariance)


def test_left_out_shares_are_the_tails_of_the_spectrum():
    variances = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(left_out_shares(variances), torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64))


def test_left_out_shares_of_groups_are_of_their_common_variance():
    variances = torch.tensor([[6.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(left_out_shares(variances), torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64))


def test_nothing_is_left_out_of_no_variance():
    assert left_out_shares(torch.zeros(3)).tolist() == [0, 0, 0, 0]

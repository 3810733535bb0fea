"""The stateless functions against closed forms and the predecessors' formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pcafast
from pcafast import ChannelMoments, Covariance, FeatureMapRank, Taylor
from pcafast.functional import LARGEST_MAP_ON_CUDA, covariance, feature_map_rank, taylor_scores


@pytest.mark.parametrize(("shape", "dim"), [((5, 4, 3, 3), 1), ((5, 3, 4), -1), ((7, 4), 1), ((3, 4, 2, 2, 2), 1)])
@pytest.mark.parametrize("correction", [0, 1])
def test_covariance_is_numpys(shape, dim, correction, device):
    x = torch.randn(shape, device=device)
    mean, cov = covariance(x, channel_dim=dim, correction=correction)
    samples = x.movedim(dim, 0).flatten(1).cpu().double().numpy()
    np.testing.assert_allclose(cov.cpu(), np.cov(samples, ddof=correction), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean.cpu(), samples.mean(1), rtol=1e-6, atol=1e-7)
    assert mean.dtype == cov.dtype == torch.float64


def gradient_of_each_example(activation, weight):
    """The loss of example n is sum(weight * activation[n]**2) / 2; returns the gradient of the mean-reduced loss."""
    activation.requires_grad_()
    loss = (weight * activation.square()).flatten(1).sum(1).div(2).mean()
    (gradient,) = torch.autograd.grad(loss, activation)
    return gradient


@pytest.mark.parametrize(
    ("reduction", "formula"),
    [
        # The gradient of an example's own loss by its activation a is w * a, so a * g = w * a**2.
        ("molchanov2017", lambda ag: ag.sum((2, 3)).abs().mean(0) / 12),
        ("molchanov2019", lambda ag: ag.sum((2, 3)).square().mean(0) / 12),
        ("signed", lambda ag: ag.mean((0, 2, 3)).abs()),
        ("absolute", lambda ag: ag.abs().mean((0, 2, 3))),
    ],
)
def test_taylor_scores_of_a_loss_with_known_gradient(reduction, formula, device):
    activation = torch.randn(5, 6, 3, 4, dtype=torch.float64, device=device)
    weight = torch.randn(6, 3, 4, dtype=torch.float64, device=device)
    gradient = gradient_of_each_example(activation, weight)
    expected = formula(weight * activation.detach().square())
    found = taylor_scores(activation, gradient, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    summed = taylor_scores(activation, gradient * 5, reduction=reduction, loss_reduction="sum")
    torch.testing.assert_close(summed, expected, rtol=1e-12, atol=0)


def test_signed_is_pytorch_prunings_ranking():
    """There, t_c = mean over N, H, W of a * g per batch, R_c = sum of t_c, score = abs(R) / norm(R)."""
    batches = torch.randn(3, 2, 4, 6, 5, 5)
    total = sum((a * g).mean((0, 2, 3)) for a, g in batches)
    statistic = pcafast.Taylor(reduction="signed")
    for activation, gradient in batches:
        statistic.update(activation, gradient)
    found = statistic.compute()
    torch.testing.assert_close(found / found.norm(), (total.abs() / total.norm()).double(), rtol=1e-5, atol=1e-7)


def test_rank_is_hranks():
    """HRank counts singular values above s_max * max(H, W) * eps(float32), map by map."""
    maps = torch.randn(4, 5, 14, 14).relu() * (torch.rand(4, 5, 14, 1) > 0.4)
    expected = [[torch.linalg.matrix_rank(m.double(), rtol=14 * 2.0**-23).item() for m in image] for image in maps]
    assert feature_map_rank(maps).tolist() == expected


def test_ranks_of_known_maps(device):
    zero, constant, identity = torch.zeros(8, 8), torch.ones(8, 8), torch.eye(8)
    nan = constant.clone()
    nan[3, 3] = torch.nan
    maps = torch.stack([zero, constant, identity, 1e-30 * identity, 1e30 * constant, nan])[None].to(device)
    assert feature_map_rank(maps).tolist() == [[0, 1, 8, 8, 1, -1]]
    assert feature_map_rank(maps, atol=0.5).tolist() == [[0, 1, 8, 0, 1, -1]]
    assert feature_map_rank(identity.mul(torch.arange(1, 9)).to(device)[None, None], rtol=0.5).tolist() == [[4]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: covariance(torch.randn(2, 3), channel_dim=2), r"channel_dim: expected one of the 2.*got 2"),
        (lambda: covariance(torch.empty(0, 3)), r"x: expected at least one sample, got shape \(0, 3\)"),
        (lambda: covariance(torch.tensor([[1.0, torch.nan]])), "x: expected finite values"),
        (lambda: covariance(torch.randn(1, 3), correction=1), "correction: expected less than the 1 samples"),
        (lambda: covariance(torch.ones(2, 3, dtype=torch.int64)), "x: expected float16.*got Long"),
        (lambda: taylor_scores(torch.ones(2, 3), torch.ones(2, 3), reduction="l1"), "reduction: expected one of"),
        (lambda: taylor_scores(torch.ones(2, 3), torch.ones(2, 3), loss_reduction="max"), "loss_reduction: expected"),
        (lambda: taylor_scores(torch.ones(2, 3), torch.ones(2, 4)), "gradient: expected the shape"),
        (lambda: taylor_scores(torch.ones(2, 3), torch.full((2, 3), torch.inf)), "expected finite values"),
        (lambda: taylor_scores(torch.ones(0, 3), torch.ones(0, 3)), r"expected at least one.*\(0, 3\)"),
        (lambda: taylor_scores(torch.ones(2, 3, 0), torch.ones(2, 3, 0)), r"expected at least one.*\(2, 3, 0\)"),
        (lambda: taylor_scores(torch.ones(2, 3), torch.ones(2, 3).int()), "gradient: expected float16.*got Int"),
        (lambda: feature_map_rank(torch.ones(3, 4)), "x: expected feature maps of shape"),
        (lambda: feature_map_rank(torch.ones(1, 1, 3, 3).int()), "x: expected float16.*got Int"),
        (lambda: feature_map_rank(torch.ones(1, 1, 3, 3).cfloat()), "x: expected float16.*got Complex"),
        (lambda: feature_map_rank(torch.ones(1, 1, 3, 3), rtol=-1), "rtol: expected"),
        (lambda: feature_map_rank(torch.ones(1, 1, 3, 3), rtol=float("nan")), "rtol: expected.*got nan"),
        (lambda: feature_map_rank(torch.ones(1, 1, 3, 3), atol=float("nan")), "atol: expected.*got nan"),
        (lambda: FeatureMapRank(rtol=-1.0), "rtol: expected a finite number.*got -1"),
        (lambda: FeatureMapRank(atol=float("nan")), "atol: expected a finite number.*got nan"),
        (lambda: Taylor().update(torch.ones(3), torch.ones(3)), "channel_dim: expected one of the 1.*got 1"),
        (lambda: ChannelMoments(channel_dim=7).update(torch.ones(3, 4)), "channel_dim: expected one of the 2.*got 7"),
        (lambda: Covariance(channel_dim=7).update(torch.ones(3, 4)), "channel_dim: expected one of the 2.*got 7"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rank_of_maps_beyond_the_cuda_kernel(device):
    header = Path(__file__).parents[1] / "csrc" / "cuda" / "kernels_cuda.h"
    assert f"kMostRankRows = {LARGEST_MAP_ON_CUDA};" in header.read_text()
    factors = torch.randn(2, 2, 3, LARGEST_MAP_ON_CUDA + 5, device=device)
    maps = factors.mT[..., :3] @ factors[..., :20]
    assert (feature_map_rank(maps) == 3).all()
    maps[0, 1, -1, -1] = torch.nan
    assert feature_map_rank(maps).tolist() == [[3, -1], [3, 3]]


def test_arguments_that_require_a_gradient_are_fine():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert not covariance(x).covariance.requires_grad
    assert not taylor_scores(x, x.detach()).requires_grad
    feature_map_rank(x)
    x.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))

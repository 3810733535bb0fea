"""Scores of channels against their formulas."""

import pytest
import torch
from torch import nn

import pcafast
from pcafast import scores
from pcafast.errors import ArgumentError


def test_taylor_is_the_statistic_with_each_layer_of_unit_length() -> None:
    statistic = pcafast.Taylor()
    activation, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    statistic.update(activation, gradient)
    found = scores.taylor({"conv": statistic})["conv"]
    # The paper's score: the mean over examples of |sum over positions| / positions, each of the example's own loss.
    raw = (4 * activation.double() * gradient.double()).sum((2, 3)).abs().mean(0) / 25
    torch.testing.assert_close(found, raw / raw.square().sum().sqrt())
    signed = scores.taylor({"conv": statistic}, reduction="signed")["conv"]
    raw = (4 * activation.double() * gradient.double()).mean((0, 2, 3)).abs()
    torch.testing.assert_close(signed, raw / raw.square().sum().sqrt())


def test_rank_is_the_mean_rank() -> None:
    statistic = pcafast.FeatureMapRank()
    maps = torch.randn(6, 2, 4, 4)
    maps[:3, 1] = 1.0  # of rank one
    statistic.update(maps)
    assert scores.rank({"conv": statistic})["conv"].tolist() == [4.0, 2.5]


@pytest.mark.parametrize("p", [1, 2])
def test_filter_norm_is_over_everything_behind_an_output(p) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Linear(5, 3))
    found = scores.filter_norm(model, p=p)
    assert list(found) == ["0", "2"]
    for name in found:
        weight = model.get_submodule(name).weight.detach().double()
        expected = torch.stack([(one.abs() ** p).sum() ** (1 / p) for one in weight])
        torch.testing.assert_close(found[name], expected)


def test_layer_without_any_score_stays_zero_when_normalised() -> None:
    assert scores.normalised({"dead": torch.zeros(3)})["dead"].tolist() == [0, 0, 0]


def test_layers_without_data_are_left_out() -> None:
    assert scores.taylor({"idle": pcafast.Taylor()}) == {}
    assert scores.rank({"idle": pcafast.FeatureMapRank()}) == {}


def test_statistic_of_another_kind() -> None:
    with pytest.raises(ArgumentError, match="expected the Taylor of layer 'conv', got a Covariance"):
        scores.taylor({"conv": pcafast.Covariance()})
    with pytest.raises(ArgumentError, match=r"take one entry, such as stats\['taylor'\]"):
        scores.rank({"taylor": {"conv": pcafast.Taylor()}})

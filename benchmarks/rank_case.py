"""Rank of feature maps: the maps, the peers, and the truth."""

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from pcafast.functional import default_rtol, feature_map_rank

CHANNELS = 32
PEERS = ("pcafast", "batched", "one by one")


def rank_case(side: int, images: int) -> Case:
    """Maps of one size, float32; torch.linalg.matrix_rank once for all of them, and once for each as in HRank."""
    maps = feature_maps(images, side)
    calls = (lambda: feature_map_rank(maps), lambda: torch.linalg.matrix_rank(maps), lambda: one_by_one(maps))
    check(maps, calls[0]())
    assert share_wrong(maps, calls[1]()) < 0.02
    assert share_wrong(maps, calls[2]()) < 0.02
    return Case("rank", {"shape": tuple(maps.shape)}, dict(zip(PEERS, calls, strict=True)))


def feature_maps(images: int, side: int) -> Tensor:
    """Maps (N, 32, H, W) such as a network has after a ReLU: some zero, some of low rank, many of full rank.

    Smooth random images, convolved with random 3x3 filters, each channel normalised, moved down by a random amount and
    cut off at zero.
    """
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(images, 3, max(side // 4, 2), max(side // 4, 2), generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")
    x = F.conv2d(smooth, torch.randn(CHANNELS, 3, 3, 3, generator=generator), padding=1)
    x = F.batch_norm(x, None, None, training=True)
    return F.relu(x - torch.randn(1, CHANNELS, 1, 1, generator=generator).abs())


def one_by_one(maps: Tensor) -> Tensor:
    """One SVD, and one wait for its result, for every image and channel: HRank's way."""
    images, channels = maps.shape[:2]
    ranks = [torch.linalg.matrix_rank(maps[i, j]).item() for i in range(images) for j in range(channels)]
    return torch.tensor(ranks).view(images, channels)


def exact_ranks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (N, C) by SVD in float64, and which are sure: no singular value lies within 0.1 % of the threshold."""
    values = torch.linalg.svdvals(maps.cpu().double())
    threshold = default_rtol(maps) * values[..., :1]
    unsure = ((values / threshold - 1).abs() < 1e-3).any(-1)
    return (values > threshold).sum(-1), ~unsure


def check(maps: Tensor, ranks: Tensor) -> None:
    """See that the ranks are exact."""
    exact, sure = exact_ranks(maps)
    assert sure.double().mean() > 0.98, f"{int((~sure).sum())} of {sure.numel()} maps lie at the threshold"
    assert torch.equal(ranks.cpu()[sure], exact[sure])


def share_wrong(maps: Tensor, ranks: Tensor) -> float:
    """Of the maps: where a peer's SVD in float32 gives another rank than the exact one."""
    return float((ranks.cpu() != exact_ranks(maps)[0]).double().mean())

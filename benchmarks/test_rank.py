"""Rank of feature maps: pcafast against an SVD of every map."""

from rank_case import PEERS, rank_case

__all__ = ["PEERS"]

make = rank_case
CASES = [(8, 256), (16, 256), (32, 128), (56, 16), (112, 4), (224, 1)]  # side, images of 32 channels
TINY = [(8, 2), (56, 1)]


def test_rank(measure):
    measure()

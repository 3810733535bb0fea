"""Moments of channels: pcafast against what torch offers for each of them."""

import itertools

from cases import DTYPES, LAYOUTS, SHAPES
from moments_case import PEERS, moments_case

__all__ = ["PEERS"]

make = moments_case
CASES = list(itertools.product(SHAPES, DTYPES, LAYOUTS))
TINY = [((2, 8, 7, 7), "bfloat16", "channels last")]


def test_moments(measure):
    measure()

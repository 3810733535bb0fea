"""Taylor scores: pcafast against pytorch-pruning's expression."""

import itertools

from cases import DTYPES, LAYOUTS, SHAPES
from taylor_case import PEERS, taylor_case

__all__ = ["PEERS"]

make = taylor_case
CASES = list(itertools.product(SHAPES, DTYPES, LAYOUTS))
TINY = [((2, 8, 7, 7), "bfloat16", "channels last")]


def test_taylor(measure):
    measure()

"""Covariance of convolutions' outputs: pcafast against recipes of torch calls."""

from cases import LAYOUTS
from covariance_case import PEERS, covariance_case
from networks import OUTPUTS

__all__ = ["PEERS"]

make = covariance_case
IMAGES = {"ResNet-50": 16, "VGG-16": 4}
CASES = [
    (network, (IMAGES[network], *shape), layout)
    for network, shapes in OUTPUTS.items()
    for shape in shapes
    for layout in LAYOUTS
]
TINY = [("ResNet-50", (2, 24, 7, 7), layout) for layout in LAYOUTS]


def test_covariance(measure):
    measure()

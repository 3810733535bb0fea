"""Covariance of the patches that 3x3 convolutions take in: pcafast against unfolding, and against K-FAC packages."""

from networks import INPUTS
from patch_covariance_case import PEERS, patch_covariance_case

__all__ = ["PEERS"]

make = patch_covariance_case
IMAGES = {"ResNet-18": 32, "VGG-16": 4, "ResNet-56": 64}
CASES = [
    (network, (IMAGES[network], *shape), stride) for network, layers in INPUTS.items() for *shape, stride in layers
]
TINY = [("ResNet-18", (2, 20, 6, 6), stride) for stride in (1, 2)]


def test_patch_covariance(measure):
    measure()

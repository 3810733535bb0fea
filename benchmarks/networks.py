"""The shapes of the layers that operators are timed on: all distinct ones of well-known networks.

ResNet-50, ResNet-18 and VGG-16 are torchvision's at 224x224, ResNet-56 is that for CIFAR. A test compares these tables
with the networks; they are written out, since a machine with a GPU may have no torchvision.
"""

OUTPUTS = {
    "ResNet-50": [
        *((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56), (128, 28, 28), (512, 28, 28)),
        *((256, 28, 28), (256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7)),
    ],
    "VGG-16": [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)],
}
"""Channels, height and width of what convolutions put out."""

INPUTS = {
    "ResNet-18": [
        *((64, 56, 56, 1), (64, 56, 56, 2), (128, 28, 28, 1), (128, 28, 28, 2)),
        *((256, 14, 14, 1), (256, 14, 14, 2), (512, 7, 7, 1)),
    ],
    "VGG-16": [
        *((3, 224, 224, 1), (64, 224, 224, 1), (64, 112, 112, 1), (128, 112, 112, 1), (128, 56, 56, 1)),
        *((256, 56, 56, 1), (256, 28, 28, 1), (512, 28, 28, 1), (512, 14, 14, 1)),
    ],
    "ResNet-56": [
        *((3, 32, 32, 1), (16, 32, 32, 1), (16, 32, 32, 2), (32, 16, 16, 1), (32, 16, 16, 2), (64, 8, 8, 1)),
    ],
}
"""Channels, height and width of what 3x3 convolutions take in, and their stride; all pad by 1."""

"""The MNIST network of pca-compress: that of PyTorch's example of late 2019, less one activation."""

import torch.nn.functional as F
from torch import Tensor, nn


class MnistCNN(nn.Module):
    """Images (N, 1, 28, 28) to class scores; as in pca-compress, no activation follows the second convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout2d(0.25)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(x.flatten(1)))
        scores: Tensor = self.fc2(self.dropout2(x))
        return scores

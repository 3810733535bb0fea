"""Passes over a data set, batch by batch, each of which can be had again."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pcafast.data.images import ImageDataset
from pcafast.errors import ArgumentError


class Batches:
    """Images (N, C, H, W), float32, and labels (N,), int64, pass after pass.

    What is random in a pass depends on the seed and on the number of the pass alone, which counts from 0 up.
    """

    def __init__(
        self, dataset: ImageDataset, chosen: Tensor, *, batch_size: int, shuffle: bool, augment: bool, seed: int
    ) -> None:
        self._dataset, self._chosen, self._batch_size = dataset, chosen, batch_size
        self._shuffle, self._augment, self._seed = shuffle, augment, seed
        self._epoch = 0

    def __len__(self) -> int:
        """Batches per pass."""
        return -(-len(self._chosen) // self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one of this number, whichever have been before, and count on from there."""
        if epoch < 0:
            raise ArgumentError(f"epoch must be at least 0, got {epoch}.")
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Begin a pass."""
        number = self._epoch
        self._epoch += 1
        return self._pass(number)

    def _pass(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        order = self._chosen
        if self._shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        for indices in order.split(self._batch_size):
            yield self._dataset.batch(indices, generator if self._augment else None)

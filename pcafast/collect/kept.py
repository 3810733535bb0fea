"""Keeping an activation until its gradient comes, the way autograd keeps its own."""

from typing import Any

import torch
from torch import Tensor

from pcafast.errors import PcafastError
from pcafast.statistics.statistic import Side


class _Save(torch.autograd.Function):
    """A graph node of no effect that saves a tensor.

    Saving through autograd makes activation checkpointing recompute the tensor and offloading move it, and
    notices if it is overwritten.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:  # never called: nothing depends on the output
        return None, None


_ANCHOR = torch.zeros((), requires_grad=True)  # a node is only made if an input requires a gradient


class KeptActivation:
    """Holds an activation until it is taken."""

    def __init__(self, layer: str, x: Tensor, side: Side = "output") -> None:
        self._layer, self._side = layer, side
        self.replace(x)

    def replace(self, x: Tensor) -> None:
        """Hold another tensor instead."""
        with torch.enable_grad():
            self._output: Any = _Save.apply(_ANCHOR, x.detach())  # the node lives as long as its output

    def take(self) -> Tensor:
        """The activation, which is let go.

        Raises:
            PcafastError: it was overwritten in the meantime.
        """
        try:
            saved: Tensor = self._output.grad_fn.saved_tensors[0]
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise PcafastError(
                f"The {self._side} of layer {self._layer!r} was overwritten in place before its gradient was known. "
                'Make what does so not work in place or, for an output, use tap="activation".'
            ) from error
        # The hook that holds this object lives as long as the graph, which is longer than autograd keeps its tensors.
        self._output = None
        return saved

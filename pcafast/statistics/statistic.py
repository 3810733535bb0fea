"""What all streaming statistics share: their state, merging, reduction over processes, and saving.

A statistic is a keyword-only dataclass: its fields are its settings, and its state is declared once, in
``states``, as a table of named tensors. ``dataclasses.replace`` makes an empty copy with other settings.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcafast.errors import ArgumentError, PcafastError
from pcafast.memory import require_memory

Tap = Literal["layer", "norm", "activation"]
Side = Literal["output", "input"]
Sizes = Mapping[str, int]
Total = Callable[[Sequence[Tensor]], Tensor]
SelfStatistic = TypeVar("SelfStatistic", bound="Statistic")


class NonFiniteError(PcafastError):
    """A batch holds NaN or infinities and the statistic was told to raise."""


@dataclasses.dataclass(frozen=True)
class State:
    """A tensor of a statistic's state; its shape names sizes that the first batch makes known."""

    shape: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64


KINDS: dict[str, type["Statistic"]] = {}
"""Every kind of statistic by its name, as files of statistics know it."""


@dataclasses.dataclass(kw_only=True)
class Statistic(ABC):
    """A quantity streamed over batches.

    Attributes:
        tap: where in the model it looks: right after the layer, after its batch norm, or after its activation
            (whichever of these comes last where the model has fewer).
        channel_dim: which dimension of what it is given holds the channels. ``collect`` knows it for convolutions,
            linear layers, layer norms and embeddings, and takes this for others.
        nonfinite: a batch with NaN or infinities is left out and counted (``skip``) or an error (``raise``).
        layer: the name of the layer it belongs to, for messages.
    """

    states: ClassVar[dict[str, State]]
    growing_sizes: ClassVar[frozenset[str]] = frozenset()
    needs_gradient: ClassVar[bool] = False
    side = "output"  # a setting only of kinds that annotate it

    tap: Tap = "layer"
    channel_dim: int = 1
    nonfinite: Literal["skip", "raise"] = "skip"

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        self._state: dict[str, Tensor] = {}
        self.layer = ""
        for setting, expected in self.choices().items():
            if getattr(self, setting) not in expected:
                raise ArgumentError(f"{setting}: expected one of {', '.join(expected)}, got {getattr(self, setting)!r}")
        if self.side == "input" and self.tap != "layer":
            raise ArgumentError(f'tap: expected "layer" for side="input", got {self.tap!r}')

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that settings with few of them can have."""
        return {"tap": ("layer", "norm", "activation"), "side": ("output", "input"), "nonfinite": ("skip", "raise")}

    def fits(self, layer: nn.Module) -> bool:
        """Whether the output of such a layer has this statistic."""
        return True

    @classmethod
    def settings_for(cls, layer: nn.Module) -> dict[str, Any]:
        """The settings that such a layer asks for."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return {"groups": layer.groups} if "groups" in fields and hasattr(layer, "groups") else {}

    @abstractmethod
    def compute(self) -> Any:
        """The statistic of all that was seen; what the functional form returns."""

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_empty(self) -> bool:
        """Whether no batch has been seen."""
        return not self._state

    @property
    def has_data(self) -> bool:
        """Whether there is anything to compute from."""
        return not self.is_empty and self._has_data()

    @property
    def skipped(self) -> int:
        """How many batches (for ranks: maps) were left out because of NaN or infinities."""
        return 0 if self.is_empty else int(self._state["skipped"])

    def reset(self) -> None:
        """Forget all batches."""
        self._state = {}

    def merge(self: SelfStatistic, other: SelfStatistic) -> None:
        """Take in all that ``other`` has seen, as if this statistic had seen it."""
        if type(other) is not type(self) or other.settings != self.settings:
            raise ArgumentError(f"other: expected a {self!r} to merge, got {other!r}")
        if other.is_empty:
            return
        if self.is_empty:
            self.load_state_dict(other.state_dict())
            return
        sizes = self._common_sizes([self._sizes(), other._sizes()])
        device = self._state["skipped"].device
        parts = [_resized(part._state, self.states, sizes, device) for part in (self, other)]
        self._state = self._combined(parts, lambda tensors: tensors[0] + tensors[1])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes into each of them. All must call it, once, at the end."""
        gathered: list[Sizes] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, self._sizes(), group)
        sizes = self._common_sizes([one for one in gathered if one])
        if not sizes:
            return
        device = _default_device(group) if self.is_empty else self._state["skipped"].device
        mine = _resized(self._state, self.states, sizes, device)

        def total(tensors: Sequence[Tensor]) -> Tensor:
            reduced = tensors[0].clone()
            dist.all_reduce(reduced, group=group)
            return reduced

        self._state = self._combined([mine], total)

    def state_dict(self) -> dict[str, Tensor]:
        """The state by name, copied; empty if no batch has been seen."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, forgetting the present one.

        Raises:
            ArgumentError: names, shapes or dtypes are not those of this statistic.
        """
        if state and set(state) != set(self.states):
            raise ArgumentError(f"state: expected {sorted(self.states)}, got {sorted(state)}")
        sizes: dict[str, int] = {}
        for name, tensor in state.items():
            declared = self.states[name]
            fits = tensor.ndim == len(declared.shape) and tensor.dtype == declared.dtype
            fits = fits and all(
                sizes.setdefault(size, length) == length
                for size, length in zip(declared.shape, tensor.shape, strict=True)
            )
            if not fits:
                raise ArgumentError(
                    f"state {name!r}: expected {declared.dtype} of shape {declared.shape} with {sizes}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        self._state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}

    def _combined(self, parts: Sequence[Mapping[str, Tensor]], total: Total) -> dict[str, Tensor]:
        """One state from several; ``total`` adds up one tensor of each, and those of other processes."""
        return {name: total([part[name] for part in parts]) for name in self.states}

    def _ready(self, device: torch.device, sizes: Sizes) -> dict[str, Tensor]:
        """The state, made on the first batch and checked against the sizes of every later one."""
        if self.is_empty:
            shapes = [tuple(sizes[size] for size in declared.shape) for declared in self.states.values()]
            require_memory(f"{type(self).__name__} of layer {self.layer!r}", shapes, device)
            self._state = _resized({}, self.states, sizes, device)
        elif sizes != self._sizes() or self._state["skipped"].device != device:
            common = self._common_sizes([self._sizes(), sizes])
            self._state = _resized(self._state, self.states, common, device)
        return self._state

    def _common_sizes(self, several: Sequence[Sizes]) -> dict[str, int]:
        common: dict[str, int] = {}
        for sizes in several:
            for name, size in sizes.items():
                if common.setdefault(name, size) != size and name not in self.growing_sizes:
                    raise ArgumentError(
                        f"{type(self).__name__} of layer {self.layer!r}: expected {common[name]} {name} "
                        f"as before, got {size}"
                    )
                common[name] = max(common[name], size)
        return common

    def _sizes(self) -> dict[str, int]:
        return {
            size: length
            for name, tensor in self._state.items()
            for size, length in zip(self.states[name].shape, tensor.shape, strict=True)
        }

    def _require_data(self) -> None:
        if not self.has_data:
            left_out = f" ({self.skipped} were left out because of NaN or infinities)" if self.skipped else ""
            needs = " and a backward pass that reaches it" if self.needs_gradient else ""
            raise PcafastError(
                f"{type(self).__name__} of layer {self.layer!r} has seen no batch{left_out}: "
                f"it takes a forward pass that calls the layer{needs}."
            )

    @abstractmethod
    def _has_data(self) -> bool: ...

    @contextmanager
    def _noticing_nonfinite(self) -> Iterator[None]:
        # Reads from the device, so only where the user asked for it.
        before = self.skipped if self.nonfinite == "raise" else 0
        yield
        if self.nonfinite == "raise" and self.skipped > before:
            raise NonFiniteError(
                f"{type(self).__name__} of layer {self.layer!r}: the batch holds NaN or infinities. "
                'nonfinite="skip" leaves such batches out.'
            )


def _resized(
    state: Mapping[str, Tensor], declared: Mapping[str, State], sizes: Sizes, device: torch.device
) -> dict[str, Tensor]:
    """The state on the device, padded with zeros to the sizes, and new where it is absent."""
    result = {}
    for name, of in declared.items():
        shape = tuple(sizes[size] for size in of.shape)
        old = state.get(name)
        if old is not None and old.shape == shape:
            result[name] = old.to(device)
            continue
        with torch.inference_mode(False):  # else the state could not be updated outside of inference mode
            result[name] = torch.zeros(shape, dtype=of.dtype, device=device)
        if old is not None:
            result[name][tuple(slice(length) for length in old.shape)] = old
    return result


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

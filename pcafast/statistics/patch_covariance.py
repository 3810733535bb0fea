"""Covariance of the patches that a convolution takes in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.functional import MeanCovariance, add_patches, channel_count, finish_patch_covariance
from pcafast.patches import Padding, PaddingMode, Patches, to_windows
from pcafast.statistics.statistic import Side, Sizes, State, Statistic, Total


@dataclasses.dataclass(kw_only=True)
class PatchCovariance(Statistic):
    """Mean and covariance of the patches that a layer multiplies its weight with, in float64.

    They are exactly those of the columns of ``torch.nn.functional.unfold``, zeros of the padding included, and no patch
    is ever formed. A linear layer's patch is one position of its input. ``collect`` takes the layer's own settings, so
    ``PatchCovariance()`` is all it needs. Both Kronecker factors of a layer's curvature, as K-FAC wants them (arXiv
    1503.05671, 1602.01407)::

        with pcafast.collect(
            model, a=pcafast.PatchCovariance(), g=pcafast.GradientCovariance(loss_reduction="mean")
        ) as stats:
            criterion(model(images), labels).backward()
        mean, covariance = stats["a"]["conv1"].compute()
        a = covariance + torch.outer(mean, mean)  # second moment of patches: (C * kh * kw) squared
        mean, covariance = stats["g"]["conv1"].compute()
        g = covariance + torch.outer(mean, mean)  # second moment of output gradients: (outputs) squared

    A bias adds a row to ``a``: ``mean``, and 1 in the corner. The state has a slot to each of the offsets between two
    taps of the kernel, cut at the border: 29 C^2 numbers for 3 x 3 instead of 81 C^2 (``pcafast.patches``).

    Attributes:
        kernel_size, stride, padding, dilation, padding_mode: as of ``pcafast.functional.patch_covariance``.
        groups: of the convolution; each has a covariance of its own.
        correction: what is taken from the number of patches in the divisor; 1 gives the unbiased estimate.
    """

    states: ClassVar[dict[str, State]] = {
        "patches": State(),
        "count": State(("slots",)),
        "left": State(("slots", "entries")),
        "right": State(("slots", "entries")),
        "comoment": State(("slots", "groups", "group entries", "group entries")),
        "members": State(("slots", "taps", "taps"), torch.uint8),
        "skipped": State(dtype=torch.int64),
    }
    side: ClassVar[Side] = "input"  # type: ignore[misc]

    kernel_size: int | Sequence[int] = 1
    stride: int | Sequence[int] = 1
    padding: Padding = 0
    dilation: int | Sequence[int] = 1
    padding_mode: PaddingMode = "zeros"
    groups: int = 1
    correction: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        cut = Patches.of(self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)
        self.kernel_size, self.stride, self.padding, self.dilation = (
            cut.kernel_size,
            cut.stride,
            cut.padding,
            cut.dilation,
        )
        self.cut = cut
        self._known_members: tuple[Tensor, Tensor] | None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer multiplies its weight with patches of one or two dimensions."""
        return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)

    @classmethod
    def settings_for(cls, layer: nn.Module) -> dict[str, Any]:
        """How the layer cuts patches."""
        if isinstance(layer, nn.Conv1d):
            padding = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
            return {
                "kernel_size": (1, *layer.kernel_size),
                "stride": (1, *layer.stride),
                "padding": padding,
                "dilation": (1, *layer.dilation),
                "padding_mode": layer.padding_mode,
                "groups": layer.groups,
            }
        if isinstance(layer, nn.Conv2d):
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
            return {name: getattr(layer, name) for name in names}
        return {}

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the patches are cut as the layer cuts them."""
        if not self.fits(layer):
            return False
        theirs = PatchCovariance(**self.settings_for(layer))
        return (theirs.cut, theirs.groups) == (self.cut, self.groups)

    def update(self, x: Tensor) -> None:
        """Take in one batch of inputs.

        Args:
            x: (N, C, H, W); (N, C, L), of which kernels have one row; or, for linear layers (``channel_dim`` is -1),
                (*, C).

        Raises:
            ArgumentError: not of these shapes, or no patch fits into it.
        """
        if not x.is_floating_point():
            raise ArgumentError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        maps = self._maps(x)
        channels = maps.shape[1]
        if self.groups < 1 or channels % self.groups:
            raise ArgumentError(f"groups: expected a divisor of the {channels} channels, got {self.groups}")
        layout = self.cut.layout(maps, self.groups)
        entries = channels * len(layout.taps)
        sizes = {
            "entries": entries,
            "groups": self.groups,
            "group entries": entries // self.groups,
            "taps": layout.members.shape[1],
        }
        self._check_sizes(sizes)  # before the state is touched
        if not (self.is_empty or torch.equal(layout.members, self._members())):
            # Maps of this size cut windows otherwise than those before.
            self._spread()
            layout = self.cut.layout(maps, self.groups, windows=True)
        sizes["slots"] = len(layout.slot_ends)
        is_new = self.is_empty
        state = self._ready(x.device, sizes)
        if is_new:
            state["members"].copy_(layout.members)
            self._known_members = (state["members"], layout.members)
        with self._noticing_nonfinite():
            add_patches(maps, layout, self.groups, state)

    def compute(self) -> MeanCovariance:
        """Mean (D,) and covariance (D, D) of the D = C * kh * kw entries of a patch, in ``unfold``'s order.

        With G > 1 groups the covariance is (G, D/G, D/G).
        """
        self._require_data()
        return finish_patch_covariance(self._state, self.correction)

    def merge(self, other: "PatchCovariance") -> None:
        """Take in all that ``other`` has seen, as if this statistic had seen it."""
        both = isinstance(other, PatchCovariance) and other.settings == self.settings
        if both and not (self.is_empty or other.is_empty or torch.equal(self._members(), other._members())):
            self._check_sizes(other._sizes())
            copy = dataclasses.replace(other)
            copy.load_state_dict(other.state_dict())
            copy._spread()
            self._spread()
            other = copy
        super().merge(other)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, forgetting the present one.

        Raises:
            ArgumentError: names, shapes or dtypes are not those of this statistic.
        """
        if "members" in state and "comoment" in state:
            expected = {(self.groups, 1), (self.groups, self.cut.size)}
            found = (*state["comoment"].shape[1:2], *state["members"].shape[1:2])
            if found not in expected:
                raise ArgumentError(
                    f"state: expected {self.groups} groups and a kernel of {self.cut.size} pixels, got {found}"
                )
        super().load_state_dict(state)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes into each of them. All must call it, once, at the end."""
        gathered: list[bytes | None] = [None] * dist.get_world_size(group)
        mine = None if self.is_empty else self._members().numpy().tobytes()
        dist.all_gather_object(gathered, mine, group)
        if len({one for one in gathered if one is not None}) > 1:
            self._spread()
        super().all_reduce(group)

    def _maps(self, x: Tensor) -> Tensor:
        """The input as (N, C, H, W)."""
        if self.channel_dim == -1 and x.ndim:
            return x.flatten(0, -2)[:, :, None, None] if x.ndim > 1 else x[None, :, None, None]
        if x.ndim not in (3, 4):
            raise ArgumentError(f"x: expected maps of shape (N, C, H, W) or (N, C, L), got shape {tuple(x.shape)}")
        channel_count(x, self.channel_dim)  # which refuses a dimension that x does not have
        x = x.movedim(self.channel_dim, 1)
        return x if x.ndim == 4 else x.unsqueeze(2)

    def _check_sizes(self, sizes: Sizes) -> None:
        """Refuse all that differs from the state but the number of slots, for which there is a way."""
        mine = {name: size for name, size in self._sizes().items() if name != "slots"}
        self._common_sizes([mine, {name: size for name, size in sizes.items() if name != "slots"}])

    def _members(self) -> Tensor:
        """Those of the state, on the CPU without asking the device every time."""
        if self._known_members is None or self._known_members[0] is not self._state["members"]:
            self._known_members = (self._state["members"], self._state["members"].cpu())
        return self._known_members[1]

    def _spread(self) -> None:
        """Give every window a slot of its own, as all sizes of maps can have."""
        if not self.is_empty and self._state["members"].shape[1] > 1:
            self._state = to_windows(self._state)

    def _has_data(self) -> bool:
        return bool(self._state["patches"] > 0)

    def _combined(self, parts: Sequence[Mapping[str, Tensor]], total: Total) -> dict[str, Tensor]:
        sums = {name: total([part[name] for part in parts]) for name in ("patches", "count", "skipped")}
        safe = sums["count"].clamp(min=1)[:, None]
        left, right = (
            total([part["count"][:, None] * part[side] for part in parts]) / safe for side in ("left", "right")
        )
        shape = parts[0]["comoment"].shape[:3]

        def about_common(part: Mapping[str, Tensor]) -> Tensor:
            a = (part["count"][:, None] * (part["left"] - left)).view(shape)
            return part["comoment"] + a.unsqueeze(3) * (part["right"] - right).view(shape).unsqueeze(2)

        comoment = total([about_common(part) for part in parts])
        members = total([part["members"] for part in parts]).clamp(max=1)
        return {**sums, "left": left, "right": right, "comoment": comoment, "members": members}

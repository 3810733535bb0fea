"""Covariance of convolution patches without patches: which pairs of pixels to add up, and how to put them together.

The covariance of two taps of a kernel sums products of pixels a fixed offset apart over a window of the map. The
windows of all pairs of taps with the same offset are shifts of each other, cut off at the border, so they are cut into
disjoint lattices of pixels ("rectangles"), over each of which products are summed once. A 3 x 3 kernel with stride 1
and padding 1 has 13 offsets and 29 rectangles where the covariance has 45 blocks of channels.

All that depends on sizes is in a ``Layout``, which the operator ``patch_covariance_update_`` takes; all it leaves
behind are the co-moments of pairs of pixels, a slot to each rectangle, from which ``assemble`` makes the covariance.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, SupportsIndex, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pcafast.errors import ArgumentError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Pair = tuple[int, int]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


class Layout(NamedTuple):
    """What ``patch_covariance_update_`` needs to know of one size of maps; all tensors int64 on the CPU.

    Attributes:
        source_rows, source_columns: of the map that pixels are counted in, which row or column of the input each is;
            -1 for zeros.
        taps: (T, 2) rows and columns from a pixel to those whose channels it stands for.
        steps: (2,) between the pixels of a rectangle.
        rectangles: (R, 6) top, left, rows, columns of the first pixels, and how far down and right their partners lie.
        slot_ends, slot_rectangles: (S,) and the numbers of the rectangles of slot after slot.
        patches: how many patches an example has.
        members: (S, K, K) uint8: which pairs of the K taps of the kernel a slot is part of the window of.
    """

    source_rows: Tensor
    source_columns: Tensor
    taps: Tensor
    steps: Tensor
    rectangles: Tensor
    slot_ends: Tensor
    slot_rectangles: Tensor
    patches: int
    members: Tensor


@dataclasses.dataclass(frozen=True)
class Patches:
    """How a convolution cuts patches: sizes along height and width, padding as ((top, bottom), (left, right))."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    padding_mode: PaddingMode = "zeros"

    @classmethod
    def of(
        cls,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
    ) -> "Patches":
        """From the arguments of a convolution.

        Args:
            kernel_size: one number, or that of rows and columns; so are stride and dilation.
            stride: at least 1.
            padding: one number; one for rows and one for columns; two for each, ((top, bottom), (left, right)); "same";
                or "valid".
            dilation: at least 1.
            padding_mode: "zeros", "reflect", "replicate" or "circular".

        Raises:
            ArgumentError: a value that no convolution has.
        """
        kernel = _pair("kernel_size", kernel_size, least=1)
        strides, dilations = _pair("stride", stride, least=1), _pair("dilation", dilation, least=1)
        if padding_mode not in get_args(PaddingMode):
            raise ArgumentError(
                f"padding_mode: expected one of {', '.join(get_args(PaddingMode))}, got {padding_mode!r}"
            )
        return cls(kernel, strides, _padding(padding, kernel, strides, dilations), dilations, padding_mode)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Pixels of a patch."""
        return math.prod(self.kernel_size)

    def takes_columns(self, channels: int, groups: int) -> bool:
        """Whether products of whole patches are cheaper than those of pairs of pixels.

        So it is where patches overlap little, or where there are too few channels to fill a vector. It does not
        depend on the size of the maps.
        """
        if self.size == 1:
            return False
        offsets = math.prod(
            len({((d * i) % s, d * (j - i)) for i in range(k) for j in range(k)})
            for k, s, d in zip(self.kernel_size, self.stride, self.dilation, strict=True)
        )
        # In multiplications, from measurements: looking up an element of a patch costs as much as 30 of them, once for
        # every block of channels; pixels at a stride cost half as much again; single channels wait for each other.
        entries = self.size * channels // groups
        look_ups = 30 * entries * math.ceil(entries / 96)
        of_columns = groups * (_products(entries) / 2 + look_ups)
        of_pixels = 4 * _round_up(channels, 16) if channels == groups else groups * _products(channels // groups)
        return of_columns < offsets * of_pixels / 2 * (1.5 if max(self.stride) > 1 else 1)

    def layout(self, x: Tensor, groups: int, *, windows: bool = False) -> Layout:
        """What to add up for maps (N, C, H, W): a slot to each rectangle, or to each window if told to or if fewer.

        Raises:
            ArgumentError: the kernel does not fit into the padded map, or the map is too small for its padding.
        """
        columns = self.takes_columns(x.shape[1], groups)
        return _layout(self, x.shape[2], x.shape[3], columns, windows)

    def output_size(self, size: int, axis: int) -> int:
        """Rows (axis 0) or columns (axis 1) of the convolution's output."""
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        padded = size + sum(self.padding[axis])
        if padded < reach:
            raise ArgumentError(
                f"kernel_size: expected at most the {padded} {('rows', 'columns')[axis]} of the padded input, "
                f"got {reach} (kernel {self.kernel_size[axis]}, dilation {self.dilation[axis]})"
            )
        return (padded - reach) // self.stride[axis] + 1


def assemble(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and co-moment (G, D/G, D/G) of all patches, in the order of ``torch.nn.functional.unfold``.

    Args:
        state: patches (), count (S,), left and right (S, C), comoment (S, G, C/G, C/G) and members (S, K, K).
    """
    total, comoment = state["patches"], state["comoment"]
    members = state["members"].bool()
    slots, groups, width, _ = comoment.shape
    taps = members.shape[1]
    left, right = (state[name].view(slots, groups, width) for name in ("left", "right"))
    weight = state["count"].view(slots, 1, 1)
    # Sums over the pixels of a tap that lie on the map, of all channels: (K, G, C/G).
    own = members.diagonal(dim1=1, dim2=2).T.to(comoment.dtype)
    mean = torch.einsum("ks,sgc->kgc", own, weight * left) / total
    blocks = comoment.new_zeros(groups, width, taps, width, taps)
    for i in range(taps):
        for j in range(i, taps):
            chosen = members[:, i, j].nonzero().flatten()
            # About the means of the taps; where a patch has only one of the two pixels the other is a zero.
            n, a, b = weight[chosen], left[chosen], right[chosen]
            block = comoment[chosen].sum(0) + _outer(n * (a - mean[i]), b - mean[j]).sum(0)
            rest_i, rest_j = total * mean[i] - (n * a).sum(0), total * mean[j] - (n * b).sum(0)
            block += (total - n.sum()) * _outer(mean[i], mean[j]) - _outer(rest_i, mean[j]) - _outer(mean[i], rest_j)
            blocks[:, :, i, :, j] = block
            blocks[:, :, j, :, i] = block.mT
    blocks = blocks.view(groups, width * taps, width * taps)
    # Rounding differs on both sides of the diagonal, within the blocks that lie on it.
    return mean.permute(1, 2, 0).flatten(), (blocks + blocks.mT) / 2


def to_windows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state, as for ``assemble``, with a slot to each window, which all sizes of maps have in common."""
    taps = state["members"].shape[1]
    tap_i, tap_j = torch.triu_indices(taps, taps, device=state["members"].device)
    inside = state["members"][:, tap_i, tap_j].T.to(state["count"].dtype)
    count = inside @ state["count"]
    safe = count.clamp(min=1)[:, None]
    left, right = (inside @ (state["count"][:, None] * state[name]) / safe for name in ("left", "right"))
    groups = state["comoment"].shape[1]
    comoment = state["comoment"].new_zeros(len(count), *state["comoment"].shape[1:])
    for window in range(len(count)):
        parts = inside[window].nonzero().flatten()
        a = state["count"][parts, None] * (state["left"][parts] - left[window])
        b = state["right"][parts] - right[window]
        spread = _outer(a.unflatten(1, (groups, -1)), b.unflatten(1, (groups, -1)))
        comoment[window] = (state["comoment"][parts] + spread).sum(0)
    members = state["members"].new_zeros(len(count), taps, taps)
    members[torch.arange(len(count), device=members.device), tap_i, tap_j] = 1
    return {**state, "count": count, "left": left, "right": right, "comoment": comoment, "members": members}


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _products(channels: int) -> int:
    """Products of all channels of a pixel with those of another, unused lanes of vectors included."""
    return _round_up(channels, 16) * (4 if channels <= 4 else _round_up(channels, 8))


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


class _Interval(NamedTuple):
    start: int
    length: int
    windows: tuple[Pair, ...]  # the pairs of taps in whose window it lies


# By the residue of the first pixel and the distance to the second.
_Offsets = dict[Pair, list[_Interval]]


def _axis(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> _Offsets:
    """The windows of all pairs of taps along one axis, cut into disjoint intervals of pixels of the map."""
    offsets: dict[Pair, dict[Pair, Pair]] = {}
    first = [dilation * tap - before for tap in range(kernel)]  # the pixel of output 0
    inside = [
        (max(0, -(start // stride)), min(outputs, (size - 1 - start) // stride + 1)) for start in first
    ]  # the outputs whose pixel lies on the map
    for i in range(kernel):
        for j in range(kernel):
            begin, end = max(inside[i][0], inside[j][0]), min(inside[i][1], inside[j][1])
            windows = offsets.setdefault((first[i] % stride, dilation * (j - i)), {})
            if begin < end:
                windows[i, j] = (begin + first[i] // stride, end + first[i] // stride)
    cut: _Offsets = {}
    for (phase, distance), windows in offsets.items():
        ends = sorted({end for window in windows.values() for end in window})
        pieces = [
            _Interval(a * stride + phase, b - a, tuple(w for w, (begin, end) in windows.items() if begin <= a < end))
            for a, b in itertools.pairwise(ends)
        ]
        cut[phase, distance] = [piece for piece in pieces if piece.windows]
    return cut


@functools.lru_cache(maxsize=256)
def _layout(patches: Patches, height: int, width: int, columns: bool, windows: bool) -> Layout:
    sizes = (height, width)
    outputs = [patches.output_size(size, axis) for axis, size in enumerate(sizes)]
    padded = columns or patches.padding_mode != "zeros"
    sources = [_source(patches, size, axis) if padded else torch.arange(size) for axis, size in enumerate(sizes)]
    taps, rectangles, members = (
        torch.zeros(1, 2, dtype=torch.int64),
        [(0, 0, *outputs, 0, 0)],
        torch.ones(1, 1, 1, dtype=torch.uint8),
    )
    slots: list[list[int]] = [[0]]
    if columns:
        down, across = (patches.dilation[axis] * torch.arange(patches.kernel_size[axis]) for axis in (0, 1))
        taps = torch.cartesian_prod(down, across)
    else:
        pieces = _rectangles(patches, [len(source) for source in sources], outputs, padded)
        rectangles = [rectangle for rectangle, _ in pieces]
        pairs = [(i, j) for i in range(patches.size) for j in range(i, patches.size)]
        slots, inside = [[index] for index in range(len(pieces))], [pairs_of for _, pairs_of in pieces]
        if windows or not 0 < len(pieces) <= len(pairs):
            slots = [[index for index, of in enumerate(inside) if pair in of] for pair in pairs]
            inside = [[pair] for pair in pairs]
        if len(slots) * patches.size**2 > 1 << 30:
            raise ArgumentError(
                f"kernel_size: expected a smaller kernel, got {patches.kernel_size}, of whose {len(pairs):,} pairs of "
                "pixels no account can be kept"
            )
        members = torch.zeros(len(slots), patches.size, patches.size, dtype=torch.uint8)
        for slot, pairs_of in enumerate(inside):
            for pair in pairs_of:
                members[slot][pair] = 1
    return Layout(
        source_rows=sources[0],
        source_columns=sources[1],
        taps=taps,
        steps=torch.tensor(patches.stride),
        rectangles=torch.tensor(rectangles, dtype=torch.int64).view(-1, 6),
        slot_ends=torch.tensor([len(slot) for slot in slots]).cumsum(0),
        slot_rectangles=torch.tensor([index for slot in slots for index in slot], dtype=torch.int64),
        patches=math.prod(outputs),
        members=members,
    )


def _rectangles(
    patches: Patches, sizes: Sequence[int], outputs: Sequence[int], padded: bool
) -> list[tuple[tuple[int, ...], list[Pair]]]:
    """Every rectangle, and the pairs of taps, counted through rows and columns, in whose window it lies."""
    before = [0 if padded else patches.padding[axis][0] for axis in (0, 1)]
    rows, columns = (
        _axis(sizes[a], outputs[a], patches.kernel_size[a], patches.stride[a], before[a], patches.dilation[a])
        for a in (0, 1)
    )
    width = patches.kernel_size[1]
    return [
        (
            (row.start, column.start, row.length, column.length, down, right),
            [(i * width + k, j * width + m) for i, j in row.windows for k, m in column.windows],
        )
        for (_, down), row_pieces in rows.items()
        for (_, right), column_pieces in columns.items()
        if (down, right) >= (0, 0)  # the others are transposes
        for row in row_pieces
        for column in column_pieces
    ]


def _source(patches: Patches, size: int, axis: int) -> Tensor:
    """Which row or column of the input each of the padded map is, -1 for zeros."""
    before, after = patches.padding[axis]
    most = {"zeros": math.inf, "replicate": math.inf, "reflect": size - 1, "circular": size}[patches.padding_mode]
    if max(before, after) > most:
        raise ArgumentError(
            f"padding: expected at most {most} of mode {patches.padding_mode!r} for "
            f"{size} {('rows', 'columns')[axis]}, got {max(before, after)}"
        )
    numbers = torch.arange(size, dtype=torch.float64).view(1, 1, -1)
    if patches.padding_mode == "zeros":
        return F.pad(numbers, (before, after), value=-1).flatten().long()
    return F.pad(numbers, (before, after), mode=patches.padding_mode).flatten().long()


def _pair(name: str, value: object, least: int) -> Pair:
    """One number for both axes, or one for each."""
    given = value if isinstance(value, Sequence) else (value, value)
    values = [operator.index(one) for one in given if isinstance(one, SupportsIndex)]
    if len(given) != 2 or len(values) != 2 or min(values) < least:
        raise ArgumentError(f"{name}: expected an integer of at least {least}, or two of them, got {value!r}")
    return values[0], values[1]


def _padding(padding: Padding, kernel: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ArgumentError(f"padding: 'same' goes with stride 1 alone, got stride {stride}")
        rows, columns = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
    if isinstance(padding, str):
        raise ArgumentError(f"padding: expected 'same', 'valid' or numbers, got {padding!r}")
    per_axis: Sequence[object] = padding if isinstance(padding, Sequence) else (padding, padding)
    if len(per_axis) != 2:
        raise ArgumentError(f"padding: expected one number or one (or two) for each of two axes, got {padding!r}")
    return _pair("padding", per_axis[0], least=0), _pair("padding", per_axis[1], least=0)

"""Which channels to remove: always the ones that matter least for what they save, until a budget holds."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from pcafast.errors import ArgumentError
from pcafast.plan.units import Place, Unit
from pcafast.plan.widths import Counts, Widths

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Rules:
    """How to remove.

    Attributes:
        scope: "global" compares all channels by their score for what they save; "layer" shrinks all layers alike.
        min_width: channels that every layer keeps at least.
        round_to: widths that shrink become multiples of it.
    """

    scope: Scope = "global"
    min_width: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ArgumentError(f"scope: expected one of {', '.join(get_args(Scope))}, got {self.scope!r}.")
        for name in ("min_width", "round_to"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise ArgumentError(f"{name}: expected a whole number of at least 1, got {number!r}.")


@dataclass(frozen=True)
class Chunk:
    """Units that are removed in one step.

    Attributes:
        units: their numbers.
        score: the sum of their scores.
        counts: their channels by place.
    """

    units: list[int]
    score: float
    counts: Counts


Block = list[Chunk]
"""The chunks of units that lie in the same places, in the order in which they would go."""


def blocks_of(units: Sequence[Unit], scores: Sequence[float | None], sized: set[str], round_to: int) -> list[Block]:
    """The units with scores, by the places they lie in, cut into chunks.

    Ties go to the last channel, so that of equal ones the first are kept.

    Args:
        units: all of them.
        scores: of each unit, or None if it must stay.
        sized: names of the layers whose widths are to be multiples.
        round_to: the widths' divisor; what cannot be brought to a multiple of it stays.
    """
    by_places: dict[tuple[Place, ...], list[int]] = defaultdict(list)
    for number, (unit, score) in enumerate(zip(units, scores, strict=True)):
        if score is not None:
            by_places[tuple(sorted(place for place in unit if place.name in sized))].append(number)
    blocks = []
    for members in by_places.values():
        # By score and from the last to the first; the order is the same whatever the sorting.
        ordered = sorted(members, key=lambda number: (scores[number], -number))
        width = max(len(indices) for place, indices in units[members[0]].items() if place.side == "output")
        step = round_to // math.gcd(round_to, width)
        bounds = [0, *range(len(ordered) % step or step, len(ordered) + 1, step)] if len(ordered) >= step else []
        blocks.append([_chunk(ordered[a:b], units, scores) for a, b in pairwise(bounds)])
    return blocks


def _chunk(members: list[int], units: Sequence[Unit], scores: Sequence[float | None]) -> Chunk:
    counts: Counter[Place] = Counter()
    for number in members:
        counts.update({place: len(indices) for place, indices in units[number].items()})
    return Chunk(members, sum(scores[number] or 0.0 for number in members), counts)


def remove(
    blocks: Sequence[Block], widths: Widths, allowance: int, *, sized: set[str], rules: Rules
) -> list[int] | None:
    """Remove chunks, the least valuable first, until the cost is within the allowance; ``widths`` are changed.

    Globally, a chunk's value is its score per cost saved, and by layer the share of its block that would be gone, so
    that all blocks shrink alike. What the last steps removed too much is put back where it fits.

    Returns:
        The numbers of the removed units, or None if the allowance cannot be met.
    """
    gone = [0] * len(blocks)

    def value(block: int, chunk: int) -> float:
        if rules.scope == "layer":
            return (chunk + 1) / len(blocks[block])
        one = blocks[block][chunk]
        return one.score / max(widths.saving(one.counts), 1e-9)

    waiting = [(value(block, 0), block) for block, chunks in enumerate(blocks) if chunks]
    heapq.heapify(waiting)
    while widths.cost > allowance:
        if not waiting:
            return None
        _, block = heapq.heappop(waiting)
        now = value(block, gone[block])
        if waiting and now > waiting[0][0]:
            # What it saves has shrunk since.
            heapq.heappush(waiting, (now, block))
            continue
        chunk = blocks[block][gone[block]]
        if not _leaves(widths, chunk.counts, sized, rules.min_width):
            continue
        widths.remove(chunk.counts)
        gone[block] += 1
        if gone[block] < len(blocks[block]):
            heapq.heappush(waiting, (value(block, gone[block]), block))
    _put_back(blocks, gone, widths, allowance)
    return [
        unit for chunks, count in zip(blocks, gone, strict=True) for chunk in chunks[:count] for unit in chunk.units
    ]


def _leaves(widths: Widths, counts: Counts, sized: set[str], min_width: int) -> bool:
    outputs = ((place.name, count) for place, count in counts.items() if place.side == "output" and place.name in sized)
    return all(widths.outputs(name) - count >= min_width for name, count in outputs)


def _put_back(blocks: Sequence[Block], gone: list[int], widths: Widths, allowance: int) -> None:
    def last(block: int) -> Chunk:
        return blocks[block][gone[block] - 1]

    candidates: Iterable[int] = sorted((b for b, count in enumerate(gone) if count), key=lambda b: -last(b).score)
    for block in candidates:
        while gone[block]:
            back = {place: -count for place, count in last(block).counts.items()}
            if widths.cost - widths.saving(back) > allowance:
                break
            widths.remove(back)
            gone[block] -= 1

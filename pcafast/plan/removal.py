"""Which channels to remove: always the ones that matter least for what they save, until a budget holds."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from pcafast.errors import ArgumentError
from pcafast.plan.ties import Place
from pcafast.plan.units import Unit
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


def blocks_of(
    units: Sequence[Unit], scores: Sequence[float | None], widths: Mapping[str, int], round_to: int
) -> list[Block]:
    """The units with scores, by the places they lie in, cut into chunks.

    Ties go to the last channel, so that of equal ones the first are kept.

    Args:
        units: all of them.
        scores: of each unit, or None if it must stay.
        widths: output channels of the layers whose widths are to be multiples.
        round_to: the widths' divisor; what cannot be brought to a multiple of it stays.
    """
    by_places: dict[tuple[tuple[Place, int], ...], list[int]] = defaultdict(list)
    for number, (unit, score) in enumerate(zip(units, scores, strict=True)):
        if score is not None:
            places = sorted((place, len(indices)) for place, indices in unit.items() if place.name in widths)
            by_places[tuple(places)].append(number)
    outputs = [{place.name: count for place, count in places if place.side == "output"} for places in by_places]
    sharing = Counter(name for one in outputs for name in one)
    blocks = []
    for counts, members in zip(outputs, by_places.values(), strict=True):
        # By score and from the last to the first; the order is the same whatever the sorting.
        ordered = sorted(members, key=lambda number: (scores[number], -number))
        step = math.lcm(*(round_to // math.gcd(round_to, count) for count in counts.values()))
        firsts = (n for n in range(1, step + 1) if all((widths[c] - n * counts[c]) % round_to == 0 for c in counts))
        first = next(firsts, 0)
        # A first chunk that makes widths even would make them odd again after that of another block.
        fits = first == step or (first and all(sharing[name] == 1 for name in counts))
        bounds = [0, *range(first, len(ordered) + 1, step)] if fits else []
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
    _put_back(blocks, gone, widths, allowance, at_most=1 if rules.scope == "layer" else None)
    return [
        unit for chunks, count in zip(blocks, gone, strict=True) for chunk in chunks[:count] for unit in chunk.units
    ]


def _leaves(widths: Widths, counts: Counts, sized: set[str], min_width: int) -> bool:
    outputs = ((place.name, count) for place, count in counts.items() if place.side == "output" and place.name in sized)
    return all(widths.outputs(name) - count >= min_width for name, count in outputs)


def _put_back(blocks: Sequence[Block], gone: list[int], widths: Widths, allowance: int, *, at_most: int | None) -> None:
    """Those with the highest scores first; of each block at most so many chunks, if that is given."""

    def last(block: int) -> Chunk:
        return blocks[block][gone[block] - 1]

    candidates: Iterable[int] = sorted((b for b, count in enumerate(gone) if count), key=lambda b: -last(b).score)
    for block in candidates:
        for _ in range(gone[block])[:at_most]:
            back = {place: -count for place, count in last(block).counts.items()}
            if widths.cost - widths.saving(back) > allowance:
                break
            widths.remove(back)
            gone[block] -= 1

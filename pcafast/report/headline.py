"""The figures before and after, and what has changed, in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pcafast.report.numbers import Shown, byte_size, count, finite, percent, plain, seconds
from pcafast.report.words import words


@dataclass(frozen=True)
class Figure:
    """One measure before and after.

    Attributes:
        change: such as "50.1 % fewer"; empty where there is nothing to compare.
        phrase: the same as part of a sentence, such as "50.1 % fewer MACs".
        bars: lengths for before and after in percent; None where no scale is known.
        note: what else belongs to it, such as "9,241 of 10,000 images".
    """

    name: str
    before: Shown | None
    after: Shown | None
    change: str = ""
    phrase: str = ""
    bars: tuple[float, float] | None = None
    note: str = ""


def figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures there are, by their key in the report."""
    makers = {
        "accuracy": _accuracy,
        "score": _score,
        "macs": _macs,
        "params": _params,
        "latency_seconds": _latency,
        "file_bytes": _file_size,
    }
    return {
        key: make(before, after)
        for key, make in makers.items()
        if before.get(key) is not None or after.get(key) is not None
    }


def sentence(figures: Mapping[str, Figure]) -> str:
    """The outcome in one sentence; empty if nothing can be compared."""

    def first_of(*keys: str) -> list[str]:
        return [figures[key].phrase for key in keys if key in figures and figures[key].phrase][:1]

    speed, size = first_of("latency_seconds"), first_of("macs", "params")
    slower = any("slower" in phrase for phrase in speed)
    costs = " but ".join(size + speed) if slower else " with ".join(speed + size)
    text = "; ".join([costs] * bool(costs) + first_of("accuracy", "score"))
    return f"{text[0].upper()}{text[1:]}." if text else ""


def exact(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Every figure there is, unrounded."""

    def text(value: object) -> str:
        return plain(value).exact or plain(value).text

    return [(words(key), text(before.get(key)), text(after.get(key))) for key in dict.fromkeys([*before, *after])]


def _accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    old, new = finite(before.get("accuracy")), finite(after.get("accuracy"))
    change, bars = "", None
    if old is not None and new is not None:
        points = round(100 * (new - old), 2)
        change = f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}" if points else "unchanged"
        bars = (100 * old, 100 * new)
    correct, images = finite(after.get("correct")), finite(after.get("images"))
    note = f"{correct:,} of {images:,} images" if correct is not None and images is not None else ""
    shown = _both("accuracy", percent, before, after)
    return Figure("Accuracy", *shown, change, f"accuracy {change}" if change else "", bars, note)


def _score(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    old, new = finite(before.get("score")), finite(after.get("score"))
    change = ""
    if old is not None and new is not None:
        direction = "higher" if new > old else "lower"
        change = f"{plain(abs(new - old)).text} {direction}" if new != old else "unchanged"
    return Figure("Score", *_both("score", plain, before, after), change, f"score {change}" if change else "")


def _macs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    return _counted("MACs", "macs", before, after, "multiply-adds per input")


def _params(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    return _counted("Params", "params", before, after, "")


def _counted(name: str, key: str, before: Mapping[str, Any], after: Mapping[str, Any], note: str) -> Figure:
    share, bars = _compare(before.get(key), after.get(key))
    change = _amount(share, "fewer", "more")
    noun = "MACs" if name == "MACs" else "params"
    phrase = f"as many {noun} as before" if change == "unchanged" else f"{change} {noun}" if change else ""
    return Figure(name, *_both(key, count, before, after), change, phrase, bars, note)


def _latency(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    share, bars = _compare(before.get("latency_seconds"), after.get("latency_seconds"))
    change = ""
    if share:
        times, word = (1 / share, "faster") if share < 1 else (share, "slower")
        change = f"{times:.2f} times {word}" if f"{times:.2f}" != "1.00" else "unchanged"
    phrase = "as fast as before" if change == "unchanged" else change
    images = finite(after.get("latency_batch_size", before.get("latency_batch_size")))
    note = f"for {images:,} image{'s' if images != 1 else ''}" if images is not None else ""
    return Figure("Latency", *_both("latency_seconds", seconds, before, after), change, phrase, bars, note)


def _file_size(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    share, bars = _compare(before.get("file_bytes"), after.get("file_bytes"))
    shown = _both("file_bytes", byte_size, before, after)
    return Figure("File size", *shown, _amount(share, "smaller", "larger"), "", bars)


def _both(
    key: str, show: Callable[[object], Shown], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[Shown | None, Shown | None]:
    old, new = before.get(key), after.get(key)
    return (None if old is None else show(old), None if new is None else show(new))


def _compare(before: object, after: object) -> tuple[float | None, tuple[float, float] | None]:
    """The share that remains, and both as bars of which the longer is whole."""
    old, new = finite(before), finite(after)
    if old is None or new is None or old <= 0 or new < 0:
        return None, None
    return new / old, (100 * old / max(old, new), 100 * new / max(old, new))


def _amount(share: float | None, less: str, more: str) -> str:
    if share is None:
        return ""
    if round(share, 3) == 1:
        return "unchanged"
    return f"{percent(abs(1 - share), 1).text} {less if share < 1 else more}"

"""``report.html``: a compression to look at, in one file that needs nothing else."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from pcafast.report import facts, headline, layers, panels
from pcafast.report.check import check
from pcafast.report.steps import steps

__all__ = ["render"]

_SECTIONS = {
    *("format", "version", "name", "command", "environment", "data", "asked", "reached", "before", "after"),
    *("history", "layers", "spectra", "scores", "skipped", "warnings"),
}


def render(report: Mapping[str, Any]) -> str:
    """The page of a report as ``report.json`` holds it; what the report does not have is left out.

    Raises:
        ArgumentError: a part of the report is not of the kind it should be.
    """
    check(report)
    before, after, items = report.get("before") or {}, report.get("after") or {}, report.get("layers") or []
    figures = headline.figures(before, after)
    return _template().render(
        name=report.get("name") or "A compressed model",
        sentence=headline.sentence(figures),
        figures=list(figures.values()),
        exact=headline.exact(before, after),
        warnings=report.get("warnings") or [],
        reached=facts.reached(report),
        asked=facts.facts(report.get("asked")),
        steps=steps(report["history"]) if report.get("history") else None,
        width_title=layers.width_title(items),
        layers=layers.rows(items),
        spectra=panels.spectra(report.get("spectra") or []),
        scores=panels.scores(report.get("scores") or []),
        left_alone=facts.left_alone(report.get("skipped")),
        other=facts.facts({key: value for key, value in report.items() if key not in _SECTIONS}),
        data=facts.facts(report.get("data")),
        command=str(report.get("command") or ""),
        environment=facts.facts(report.get("environment")),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.jinja")


def _breakable(name: str) -> Markup:
    """A layer's name that may be broken after its dots."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))

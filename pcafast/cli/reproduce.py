"""``pcafast reproduce``: the predecessors' experiments, with the tables that they make."""

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pcafast.cli import options
from pcafast.cli.tables import console, notes_shown
from pcafast.errors import ArgumentError
from pcafast.loop.environment import write_results
from pcafast.recipes import RECIPES, Recipe

_OUT = "benchmarks/results in a clone of the repository, else pcafast-reproduce"


def command(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="One of the list.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of the data set that the recipe is for.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"The folder to write the results to. Default: {_OUT}.")] = None,
    device: options.Device = None,
    listed: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Run a predecessor's experiment, print its table and write the results.

    Without a name, list the recipes and the options that each has of its own, such as --epochs 3.
    """
    if name is None or listed:
        console.print(_list())
        return
    recipe = _recipe(name)
    if data is None:
        raise ArgumentError("--data: expected the folder of the data set that the recipe is for, got none.")
    given = _own_options(name, recipe, context.args) | ({} if device is None else {"device": device})
    folder = out or _results_folder()
    with notes_shown():
        results = recipe.run(data, **{**given, "device": options.choose_device(device)})
    titles, rows, notes = recipe.table(results)
    console.print(_table(titles, rows))
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    path = folder / f"{name.replace('-', '_')}.json"
    write_results(path, _command(name, given), results)
    console.print(f"written to {path}", soft_wrap=True)


def _list() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("recipe", "what it does, and its options"):
        table.add_column(title)
    for name, recipe in RECIPES.items():
        defaults = (f"{_flag(one.name)} {one.default}" for one in _parameters(recipe).values())
        table.add_row(name, recipe.SUMMARY)
        table.add_row("", Text("  ".join(defaults), style="dim"))
    return table


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ArgumentError(f"recipe: expected any of {', '.join(RECIPES)}, got {name!r}.")
    return RECIPES[name]


def _parameters(recipe: Recipe) -> dict[str, inspect.Parameter]:
    """The options that a recipe has of its own."""
    shared = ("data", "device")
    return {name: one for name, one in inspect.signature(recipe.run).parameters.items() if name not in shared}


def _own_options(name: str, recipe: Recipe, words: Sequence[str]) -> dict[str, Any]:
    """The recipe's options among the words of the command line: --epochs 3, or --refit alone."""
    parameters = {_flag(one): parameter for one, parameter in _parameters(recipe).items()}
    found: dict[str, Any] = {}
    rest = iter([part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for flag in rest:
        if flag not in parameters:
            raise ArgumentError(f"{flag}: the recipe {name} has no such option. It has {', '.join(parameters)}.")
        parameter = parameters[flag]
        found[parameter.name] = True if parameter.annotation is bool else _value(flag, parameter, next(rest, None))
    return found


def _value(flag: str, parameter: inspect.Parameter, text: str | None) -> Any:
    kind = parameter.annotation if parameter.annotation in (int, float) else Path
    try:
        if text is None:
            raise ValueError
        return kind(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number", Path: "a path"}[kind]
        raise ArgumentError(f"{flag}: expected {wanted} after it, got {text or 'nothing'}.") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _results_folder() -> Path:
    """Where the tables of the documents are rendered from, or a folder here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "benchmarks" / "render.py").exists():
            return folder / "benchmarks" / "results"
    return Path("pcafast-reproduce")


def _command(name: str, given: dict[str, Any]) -> str:
    """As to be repeated elsewhere: where the data lie is this machine's business."""
    settings = [
        word for option, value in given.items() for word in (_flag(option), *([] if value is True else [str(value)]))
    ]
    return shlex.join(["pcafast", "reproduce", name, "--data", "FOLDER", *settings])


def _table(titles: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table

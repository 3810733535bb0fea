"""``pcafast reproduce``: the predecessors' experiments, with the tables that they make."""

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pcafast.cli import options
from pcafast.cli.tables import console, notes_shown
from pcafast.errors import ArgumentError
from pcafast.loop.environment import write_results
from pcafast.recipes import RECIPES, Recipe

_OUT = "benchmarks/results in a clone of the repository, else pcafast-reproduce"


def command(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="One of the list.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of the data set that the recipe is for.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"The folder to write the results to. Default: {_OUT}.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every training, if not the recipe's number.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How often, if not as often as the recipe has it.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The first seed, if not the recipe's.")] = None,
    device: options.Device = None,
    listed: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Run a predecessor's experiment, print its table and write the results; without a name, list the recipes."""
    if name is None or listed:
        console.print(_list())
        return
    recipe = _recipe(name)
    if data is None:
        raise ArgumentError("--data: expected the folder of the data set that the recipe is for, got none.")
    given = {"epochs": epochs, "seeds": seeds, "seed": seed, "device": device}
    given = {option: value for option, value in given.items() if value is not None}
    _check_options(name, recipe, given)
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
    for title in ("recipe", "what it does"):
        table.add_column(title)
    for name, recipe in RECIPES.items():
        table.add_row(name, recipe.SUMMARY)
    return table


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ArgumentError(f"recipe: expected any of {', '.join(RECIPES)}, got {name!r}.")
    return RECIPES[name]


def _check_options(name: str, recipe: Recipe, given: dict[str, Any]) -> None:
    taken = [option for option in inspect.signature(recipe.run).parameters if option != "data"]
    for option in given:
        if option not in taken:
            raise ArgumentError(f"--{option}: the recipe {name} has no such option. It has --{', --'.join(taken)}.")


def _results_folder() -> Path:
    """Where the tables of the documents are rendered from, or a folder here."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "benchmarks" / "render.py").exists():
            return folder / "benchmarks" / "results"
    return Path("pcafast-reproduce")


def _command(name: str, given: dict[str, Any]) -> str:
    """As to be repeated elsewhere: where the data lie is this machine's business."""
    settings = (word for option, value in given.items() for word in (f"--{option}", str(value)))
    return shlex.join(["pcafast", "reproduce", name, "--data", "FOLDER", *settings])


def _table(titles: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table

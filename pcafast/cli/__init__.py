"""The ``pcafast`` command."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pcafast.cli import bench, compress, demo, doctor, evaluate, reproduce, sensitivity, stats
from pcafast.errors import PcafastError

app = typer.Typer(
    name="pcafast",
    help="Statistics of PyTorch models, and smaller models made from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")] = False,
) -> None: ...


_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.command,
    "doctor": doctor.command,
    "evaluate": evaluate.command,
    "stats": stats.command,
    "sensitivity": sensitivity.command,
    "compress": compress.command,
    "reproduce": reproduce.command,
    "bench": bench.command,
}
# The options of a recipe are its own.
_OPEN = {"reproduce": {"allow_extra_args": True, "ignore_unknown_options": True}}
for _name, _command in _COMMANDS.items():
    app.command(_name, context_settings=_OPEN.get(_name))(_command)


def main() -> None:
    """Run the command line. What the user can mend is one paragraph on standard error and exit status 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except (PcafastError, OSError, MemoryError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)

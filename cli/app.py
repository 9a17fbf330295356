"""The entry points ``latentstore`` and ``solve``. Importing this is quick: work imports what it needs."""

from __future__ import annotations

import os

import typer

from cli import (
    ablate_command,
    attack_command,
    commands,
    evaluate_command,
    import_command,
    index_command,
    match_command,
    report_command,
    store_commands,
    study_commands,
    translate_command,
)
from latentstore import __version__

_SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="latentstore",
    help="Find the original of an image that a text-guided diffusion model translated.",
    epilog="First: latentstore demo. Your own: latentstore encode FOLDER, then latentstore match PICTURE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"latentstore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    del version


COMMANDS = (
    *commands.COMMANDS,
    *index_command.COMMANDS,
    *match_command.COMMANDS,
    *study_commands.COMMANDS,
    *store_commands.COMMANDS,
    *import_command.COMMANDS,
    *ablate_command.COMMANDS,
    *report_command.COMMANDS,
    *attack_command.COMMANDS,
    *evaluate_command.COMMANDS,
    *translate_command.COMMANDS,
)
for _command in COMMANDS:
    app.command()(_command)

solve_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_SETTINGS)
solve_app.command(name="solve")(commands.solve)


def main() -> None:
    """Run ``latentstore``."""
    # Arrow's own allocator keeps a heap for each thread: tens of megabytes more with every list it reads.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    app()


def solve_main() -> None:
    """Run ``solve``, short for ``latentstore solve``."""
    solve_app()


if __name__ == "__main__":
    main()

"""Entry point of the ``patchkit`` command. Imports nothing heavy, so that help appears at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from patchkit.cli import commands, scaffold, show
from patchkit.cli.console import BAD_INPUT, INTERRUPTED
from typer.core import TyperGroup

_UsageError = typer.BadParameter.__mro__[1]  # typer names only its subclass in public


class _Group(TyperGroup):
    """Gives every way out of a command its exit code: 0 ok, 1 failed, 2 bad input, 130 interrupted."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:
        extra.pop("standalone_mode", None)
        try:
            result = super().main(args, prog_name or "patchkit", standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except _UsageError as error:
            code = BAD_INPUT
            _usage(error)
        if code == INTERRUPTED:
            typer.echo("\nstopped; no unfinished file is left", err=True)
        sys.exit(code)


def _usage(error: Any) -> None:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "patchkit"
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(f"{error.format_message()}\n  where: {command}\n  do:    see `{command} --help`", err=True)


app = typer.Typer(
    cls=_Group,
    name="patchkit",
    help="Training-free attention methods for diffusers and transformers models.",
    epilog="Exit codes: 0 ok, 1 failed at run time, 2 bad input, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import patchkit

        typer.echo(f"patchkit {patchkit.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("run")(commands.run)
app.command("compare")(commands.compare)
app.command("plan")(commands.plan)
app.command("list")(show.list_recipes)
app.command("info")(show.info)
app.command("doctor")(show.doctor)
app.command("schema")(show.schema)
app.command("new-recipe")(scaffold.new_recipe)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()

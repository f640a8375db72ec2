"""Entry point of the ``patchkit`` command. Imports nothing heavy, so that help appears at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from patchkit.cli import bench, commands, scaffold, show, verbs
from patchkit.cli.compare import compare
from patchkit.cli.console import BAD_INPUT, INTERRUPTED, TERMINATED

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer names only its subclass in public


class _Terminated(BaseException):
    """The process is asked to end; unwinding takes patches off and unfinished files away."""


def _on_termination() -> Any:
    """Make a request to end unwind like Ctrl-C; returns what was there before, None outside the main thread."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    return signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None


class _Group(TyperGroup):
    """Gives every way out of a command its exit code: 0 ok, 1 failed, 2 bad input, 130 interrupted."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        previous = _on_termination()
        try:
            result = super().main(args, prog_name or "patchkit", complete_var, False, windows_expand_args, **extra)
            code = result if isinstance(result, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except _Terminated:
            code = TERMINATED
        except _UsageError as error:
            code = BAD_INPUT
            _usage(error)
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        if code in (INTERRUPTED, TERMINATED):
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
app.command("compare")(compare)
app.command("plan")(commands.plan)
app.command("bench")(bench.bench)
app.command("list")(show.list_recipes)
app.command("info")(show.info)
app.command("doctor")(show.doctor)
app.command("schema")(show.schema)
app.command("new-recipe")(scaffold.new_recipe)
verbs.add_to(app)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make small models several times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()

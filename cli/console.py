"""What the commands share: where text goes, how errors look, and which exit code they give."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only results and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error, and patchkit's log.")]


class Output:
    """One command's way of talking: results to stdout, everything else to stderr."""

    def __init__(self, *, json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.json, self.quiet, self.debug = json, quiet, debug
        if not debug:  # what the libraries deprecate is no news for whoever runs a command
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
        else:
            import logging

            logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
            logging.getLogger("patchkit").setLevel(logging.DEBUG)

    @property
    def bars(self) -> bool:
        """Whether progress bars may be shown: on a terminal, and wanted."""
        return not self.quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Tell what is being done."""
        if not self.quiet:
            typer.secho(text, err=True, dim=True)

    def note(self, text: str) -> None:
        """Tell what the reader should know, also when quiet."""
        typer.echo(f"note: {text}", err=True)

    def failure(self, what: str, remedy: str = "") -> None:
        """Tell that something does not work, where a command goes on to tell more; the exit code is the command's."""
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(f"{what}\n  do:    {remedy}" if remedy else what, err=True)

    def text(self, text: str) -> None:
        """A result in words; not in JSON mode."""
        if not self.json:
            typer.echo(text)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A result as a table; not in JSON mode."""
        if self.json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*("" if cell is None else str(cell) for cell in row), style=None)
        width = None if sys.stdout.isatty() else 120  # a pipe has no width to fit into
        Console(width=width, markup=False, highlight=False).print(table)

    def data(self, data: Any) -> None:
        """A result as JSON; only in JSON mode."""
        if self.json:
            from patchkit.runs.writing import to_json

            self._stdout().write(to_json(data))

    def _stdout(self) -> Any:
        return getattr(self, "_real_stdout", sys.stdout)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something without a bar of its own goes on."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Output]:
        """Turn errors into a readable block and an exit code; keep stdout clean in JSON mode."""
        self._real_stdout = sys.stdout
        redirect = contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext()
        try:
            with redirect:
                yield self
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            code = report_error(error, debug=self.debug)
            self.data({"error": as_data(error), "exit_code": code})
            raise typer.Exit(code) from None


def heavy(out: Output) -> None:
    """Import the libraries that take seconds, behind a spinner."""
    with out.working("importing torch and the libraries"):
        import torch  # noqa: F401

        from patchkit import registry

        registry.all_recipes()


def report_error(error: BaseException, *, debug: bool) -> int:
    """Print the block for ``error`` on stderr; returns the exit code."""
    from patchkit import errors

    if debug:
        trace = io.StringIO()
        traceback.print_exception(error, file=trace)
        typer.echo(trace.getvalue(), err=True, nl=False)
    if isinstance(error, errors.PatchkitError):
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(str(error), err=True)
        bad_input = (
            errors.UnknownRecipe,
            errors.InvalidOption,
            errors.RecipeFileError,
            errors.NothingMatched,
            errors.UnsupportedModel,
            errors.MissingDependency,
            errors.Conflict,
        )
        return BAD_INPUT if isinstance(error, bad_input) else FAILED
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    if not debug:
        typer.echo("  do:    run again with --debug to see where it happened", err=True)
    return FAILED


def as_data(error: BaseException) -> dict[str, Any]:
    """An error for machines."""
    return {
        "type": type(error).__name__,
        "what": getattr(error, "what", str(error)),
        "where": getattr(error, "where", ""),
        "remedy": getattr(error, "remedy", ""),
    }

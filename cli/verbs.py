"""The commands of verbs that recipes bring with them, such as `patchkit headhunt FILE`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from patchkit.cli import flags as flag
from patchkit.cli import overrides
from patchkit.cli.commands import Source, read
from patchkit.cli.console import Debug, Json, Output, Quiet, heavy

if TYPE_CHECKING:
    from patchkit.jobs import JobProgress, Verb

EVERY_SECONDS = 10  # tell how far it is, where there is no terminal


class _Command(TyperCommand):
    """Imports its job when its own help is asked for, to show the options of its section."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from patchkit import jobs
        from patchkit.errors import PatchkitError

        options: list[tuple[str, Any, str]] = []
        name = str(self.callback.__name__)  # type: ignore[union-attr]
        try:
            job = jobs.get(name).load()
        except PatchkitError as error:
            self.epilog = str(error)
        else:
            fields = job.options.model_fields.items()
            options = [(field, _default(about), about.description or "") for field, about in fields]
            self.help = job.help
        super().format_help(ctx, formatter)
        if options:
            title = f"Options of the section, or --set {name}.OPTION=VALUE"
            Output().table(title, ("name", "default", "meaning"), options)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if default is None else str(default)


def add_to(app: typer.Typer) -> None:
    """Add a command for each verb that is known; imports none of them."""
    from patchkit import jobs

    groups: dict[str, typer.Typer] = {}
    for verb in jobs.verbs().values():
        *parents, word = verb.path
        group = app
        for parent in parents:
            if parent not in groups:
                groups[parent] = typer.Typer(help=f"{parent.capitalize()} something for a recipe.")
                app.add_typer(groups[parent], name=parent, no_args_is_help=True)
            group = groups[parent]
        group.command(word, help=verb.help, cls=_Command, rich_help_panel="Verbs of recipes")(_command(verb))


def _command(verb: Verb) -> Callable[..., None]:
    def command(
        source: Source,
        flags: dict[str, Any],
        json_: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
            heavy(out)
            from patchkit.runs import jobbing

            file = read(source, lambda document: overrides.apply(document, flags))
            with _bar(out) as progress:
                result = jobbing.run(file, verb.name, say=out.say, progress=progress, bars=out.bars)
            if result.text:
                out.text(result.text)
            if result.files:
                out.table("", ("written", ""), [(label, path) for label, path in result.files.items()])
            for note in result.notes:
                out.note(note)
            out.data(result.to_dict())

    command.__name__ = verb.name  # its help finds the verb by it
    return flag.shared(flag.TEXT if verb.model == "text" else flag.ALL)(command)


@contextlib.contextmanager
def _bar(out: Output) -> Iterator[Callable[[JobProgress], None]]:
    """A bar with the time that is left on a terminal, else a line now and then."""
    if not out.bars:
        yield _ticker(out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, description=str(p))


def _ticker(out: Output) -> Callable[[JobProgress], None]:
    import time

    last = -float(EVERY_SECONDS)

    def tell(progress: JobProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_SECONDS:
            last = now
            out.say(str(progress))

    return tell

"""The command that sets recipes against each other: one pair on one prompt, or many on many prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli import flags as flag
from patchkit.cli import overrides
from patchkit.cli.commands import read, show_run
from patchkit.cli.console import Debug, Json, Output, Quiet, heavy

if TYPE_CHECKING:
    from patchkit.evaluation.suite import Comparison, Progress
    from patchkit.recipe_files.files import RecipeFile

EVERY_SECONDS = 10.0  # between two lines that tell how far it is, where there is no terminal

Prompts = Annotated[
    str | None,
    typer.Option("--prompts", metavar="N|FILE", help="N of the model's fixed set, or a file with one prompt a line."),
]
Seeds = Annotated[int | None, typer.Option("--seeds", metavar="M", help="Samples a prompt; 1 if nobody says.")]
Clip = Annotated[str | None, typer.Option("--clip", help="CLIP model that scores results: folder or hub id.")]
Dino = Annotated[str | None, typer.Option("--dino", help="DINO model that scores smoothness: folder or hub id.")]


@flag.shared(flag.ALL)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A recipe file, a recipe's name, or `dense`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    flags: dict[str, Any],
    others: Annotated[list[str] | None, typer.Argument(metavar="[C ...]", help="Likewise, for a benchmark.")] = None,
    prompts: Prompts = None,
    seeds: Seeds = None,
    clip: Clip = None,
    dino: Dino = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run A and B with the same prompt and seed; show times and distances.

    Model and inputs are those of A (of B if A is `dense`); B is measured against A. Files go to out/A-vs-B/ unless
    --output says otherwise.

    With three and more, or with --prompts, --seeds, --clip or --dino, it becomes a benchmark: everything runs on many
    prompts and seeds, the unpatched model always among them, and out/compare-A-B-C/ gets a page to look at, a table
    and a row a sample. Stopped, it goes on where it was when called again.
    """
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        names = [first, second, *(others or ())]
        options = {"prompts": prompts, "seeds": seeds, "clip": clip, "dino": dino}
        if len(names) == 2 and all(value is None for value in options.values()):
            _pair(out, names, flags)
        else:
            _benchmark(out, names, flags, {n: v for n, v in options.items() if v is not None})


def _pair(out: Output, names: Sequence[str], flags: dict[str, Any]) -> None:
    from patchkit.runs import running

    labels = (_label(names[0]), _label(names[1]))
    first, second = _files(names, {"output": f"out/{labels[0]}-vs-{labels[1]}/", **flags})
    job = running.comparison(first, second, labels)
    show_run(out, running.run(job, say=out.say, bars=out.bars))


def _benchmark(out: Output, names: Sequence[str], flags: dict[str, Any], options: dict[str, Any]) -> None:
    from patchkit.evaluation import request, suite

    labels = [_label(name) for name in names]
    folder = "-".join(label for label in labels if label != "dense")
    files = _files(names, {"output": f"out/compare-{folder}/", **flags})
    wanted = request.make(list(zip(labels, files, strict=True)), **options)
    with _ticker(out) as progress:
        found = suite.run(wanted, say=out.say, progress=progress)
    _show(out, found, wanted.world)


def _files(names: Sequence[str], wanted: dict[str, Any]) -> list[RecipeFile | None]:
    used: set[str] = set()
    files = [
        None if n == "dense" else read(n, lambda d: used.update(overrides.apply(d, wanted, strict=False)))
        for n in names
    ]
    overrides.refuse_unused(wanted.get("set", ()), used)
    return files


def _label(name: str) -> str:
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace("/", "-")


@contextmanager
def _ticker(out: Output) -> Iterator[Any]:
    """Something that tells how far it is: a line that changes on a terminal, else a line now and then."""
    import time

    if out.bars:
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield lambda progress: status.update(str(progress))
        return
    last = -EVERY_SECONDS

    def tell(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_SECONDS:
            last = now
            out.say(str(progress))

    yield tell


def _show(out: Output, found: Comparison, world: Any) -> None:
    from patchkit.evaluation import table

    summary = found.summary
    head, rows = table.brief(summary, world)
    many = f"{summary['prompts']} prompts x {summary['seeds']} seeds"
    out.table(f"\n{summary['model']} on {summary['device']}, {many}; below each figure its 95 % interval", head, rows)
    out.table("", ("written", ""), [(label, path) for label, path in found.files.items()])
    for note in found.notes:
        out.note(note)
    out.data(found.to_dict())

"""The commands that load a model for one recipe file: run and plan; and what they share with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli import flags as flag
from patchkit.cli import overrides
from patchkit.cli.console import Debug, Json, Output, Quiet, heavy

if TYPE_CHECKING:
    from patchkit.recipe_files.files import RecipeFile
    from patchkit.recipe_files.yamlread import Document
    from patchkit.runs.running import RunResult

Source = Annotated[str, typer.Argument(metavar="FILE|NAME", help="A recipe file, or the name of a recipe.")]
Compare = Annotated[bool | None, typer.Option("--compare/--no-compare", help="Also run unpatched and measure both.")]


@flag.shared(flag.ALL)
def run(
    source: Source,
    flags: dict[str, Any],
    compare: Compare = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a recipe file, or a recipe's own example (patchkit run adaspa).

    Options given here win over the file.

    With `compare: dense` in the file, or --compare, the model also runs unpatched from the same seed, and a
    side-by-side video, a picture of frames and metrics.json are written.
    """
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit.runs import running

        wanted = flags | ({} if compare is None else {"compare": compare})
        file = read(source, lambda document: overrides.apply(document, wanted))
        show_run(out, running.run(running.job_of(file), say=out.say, bars=out.bars))


@flag.shared(flag.MODEL)
def plan(
    source: Source,
    flags: dict[str, Any],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe file would do to its model: sites, order, conflicts, predicted cost. Computes nothing."""
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit.runs import running

        file = read(source, lambda document: overrides.apply(document, flags))
        found = running.plan(file, say=out.say, bars=out.bars)
        out.text(str(found))
        out.data(found.to_dict())


def read(name: str, change: Callable[[Document], Any]) -> RecipeFile:
    """The recipe file behind what a user typed, with the command's options in it."""
    from patchkit.recipe_files import files

    document = files.locate(name)
    change(document)
    return files.parse(document)


def show_run(out: Output, result: RunResult) -> None:
    """Report, figures and files of a run."""
    for text in result.report.values():
        out.text(text)
    variants = result.metrics["variants"]
    if len(variants) > 1:
        rows = [(label, *_figures(row)) for label, row in variants.items()]
        head = ("", "seconds", "speed-up", "density", "recall", "PSNR", "SSIM", "as the prompt says")
        out.table(f"\n{result.metrics['model']} on {result.metrics['device']}", head, rows)
    else:
        ((label, row),) = variants.items()
        out.text(f"\n{label}: {row['seconds']:.2f} s on {result.metrics['device']}")
    out.table("", ("written", ""), [(label, path) for label, path in result.files.items()])
    for note in result.notes:
        out.note(note)
    out.data(result.to_dict())


def _figures(row: dict[str, Any]) -> list[str]:
    density = row.get("density") or {}
    several = any(isinstance(v, dict) for v in density.values())
    actual, recall = ("see report",) * 2 if several else (density.get("actual"), density.get("recall"))
    seen = row.get("detector")
    agreed = "" if seen is None else f"{sum(v for k, v in seen.items() if k != 'all')} of {len(seen) - ('all' in seen)}"
    psnr = "identical" if row.get("identical") else row.get("psnr")
    return [_number(v) for v in (row["seconds"], row.get("speed_up"), actual, recall, psnr, row.get("ssim"))] + [agreed]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 100 else str(value)

"""The command that measures: what sparse attention is worth on this machine, for these shapes or this model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchkit.cli import flags as flag
from patchkit.cli import overrides
from patchkit.cli.console import Debug, Json, Output, Quiet, heavy

File = Annotated[str | None, typer.Argument(metavar="[FILE|NAME]", help="A recipe file or a recipe; its model is run.")]
Count = Annotated[int | None, typer.Option()]


@flag.shared(("model", "dtype", "device", "set", "num_inference_steps"))
def bench(
    flags: dict[str, Any],
    source: File = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of the sequence, without text.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", help="Size of a head.")] = None,
    text: Annotated[int | None, typer.Option("--text", help="Text tokens, whose blocks are always kept.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="As in a language model's prefill.")] = False,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="Share of blocks to keep. May be repeated.")
    ] = None,
    block: Annotated[int | None, typer.Option("--block", help="Tokens of a block.")] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="random (the hardest) or video.")] = "random",
    seconds: Annotated[float, typer.Option("--seconds", help="How long each entry is timed, about.")] = 0.5,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure sparse attention on this machine, and what it is worth for a whole run. Writes nothing.

    With --tokens, --heads and --head-dim: these shapes. With a recipe file (or a recipe that has an example): the
    shapes of its model, the attention share of an unpatched run, the gain to expect, and the gain that is there.
    """
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit.runs import benching

        request = benching.Request(
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            text=text,
            causal=causal,
            dtype=flags.get("dtype"),
            device=flags.get("device"),
            density=tuple(density or ()),
            block=block,
            pattern=pattern,
            steps=flags.get("num_inference_steps") or 50,
            seconds=seconds,
        )
        if source is None and "model" not in flags:
            found = benching.attention(request, say=out.say)
        else:
            found = benching.model(_file(source or "adaspa", flags), request, say=out.say, bars=out.bars)
        _show(out, found)
        out.data(found)


def _file(source: str, flags: dict[str, Any]) -> Any:
    from patchkit.recipe_files import files

    document = files.locate(source)
    overrides.apply(document, flags)
    return files.parse(document)


def _show(out: Output, found: dict[str, Any]) -> None:
    first = found["attention"][0]
    kv = "" if first["kv_heads"] == first["heads"] else f" ({first['kv_heads']} KV)"
    title = (
        f"attention: {first['batch']} x {first['heads']} heads{kv} x {first['tokens']} + {first['text']} tokens x "
        f"{first['head_dim']}, {first['dtype']}, blocks of {first['block']}, {first['pattern']}, on {found['device']}"
    )
    head = ("density", "dense ms", "sparse ms", "speed-up", "retention", "search / dense", "error", "path")
    rows = [
        (
            f"{row['density']:.3f}",
            f"{row['dense_ms']:.4g} ({row['dense']})",
            f"{row['sparse_ms']:.4g}",
            f"{row['speed_up']:.2f}",
            f"{row['retention']:.2f}",
            f"{row['search_over_dense']:.2f}",
            f"{row['error']:.0e}" if row["passed"] else f"WRONG: {row['error']:.0e}",
            f"{row['path']}: {row['reason']}",
        )
        for row in found["attention"]
    ]
    out.table(title, head, rows)
    for name, reason in found["missing"].items():
        out.note(f"dense kernel {name}: {reason}")
    if any(not row["passed"] for row in found["attention"]):
        out.note("a sparse result is wrong: its times mean nothing; see `patchkit doctor`")
    if "share" in found:
        _show_model(out, found)
        return
    out.table(
        f"expected for a whole run of {found['steps']} steps (AdaSpa's schedule, by the attention's share of the time)",
        ("density", *(f"{share:.0%}" for share in sorted({e["attention_share"] for e in found["expected"]}))),
        _by_density(found["expected"]),
    )


def _by_density(expected: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: dict[float, list[str]] = {}
    for entry in sorted(expected, key=lambda e: (e["density"], e["attention_share"])):
        rows.setdefault(entry["density"], []).append(f"{entry['speed_up']:.2f} x")
    return [(f"{density:.3f}", *cells) for density, cells in rows.items()]


def _show_model(out: Output, found: dict[str, Any]) -> None:
    share = found["share"]
    out.text(
        f"\n{found['model']}: attention of these sites takes {share['of_denoiser']:.0%} of the denoiser and "
        f"{share['of_run']:.0%} of a run of {found['steps']} steps (measured over {share['measured_steps']} steps of "
        f"{share['step_seconds']:.3g} s)"
    )
    dense, patched = found["measured"]["variants"]["dense"], found["measured"]["variants"]["patched"]
    rows = [
        (f"expected at density {entry['density']:.3f}", "", f"{entry['speed_up']:.2f}", "", "")
        for entry in found["expected"]
    ]
    psnr = "identical" if patched.get("identical") else "" if patched.get("psnr") is None else f"{patched['psnr']:.1f}"
    ssim = "" if patched.get("ssim") is None else f"{patched['ssim']:.3f}"
    rows.append(("measured, dense", f"{dense['seconds']:.2f}", "", "", ""))
    rows.append(("measured, patched", f"{patched['seconds']:.2f}", f"{patched['speed_up']:.2f}", psnr, ssim))
    out.table("a whole run", ("", "seconds", "speed-up", "PSNR", "SSIM"), rows)
    for note in found["notes"]:
        out.note(note)

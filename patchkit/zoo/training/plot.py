"""Draw training logs: ``python -m patchkit.zoo.training.plot OUT.png LABEL=LOG.jsonl ...`` (extra ``viz``)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from patchkit.media import replacing


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log, one a step: a resumed run may have written some twice, and the later one counts."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("logs", nargs="+", metavar="LABEL=LOG.jsonl")
    args = parser.parse_args(argv)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for item in args.logs:
        label, _, path = item.partition("=")
        rows = read_log(Path(path))
        (line,) = axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=label, linewidth=1)
        for before, after in pairwise(rows):
            if before.get("frames") != after.get("frames"):  # a new stage
                axes.axvline(after["step"], color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(args.out) as part:
        figure.savefig(part, dpi=110)


if __name__ == "__main__":
    main()

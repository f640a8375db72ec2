"""Text that Gemma 3 270M writes itself: what `patchkit train` is given where recovery, not a new domain, is to be seen.

    python benchmarks/moh_text.py out/gemma-writes.txt --tokens 60000

Sampled at temperature 1 from nothing but a short opening each, so dense Gemma has little to learn from it, and a tuned
model that comes near its perplexity has recovered. Goes on where it was; one batch is one file beside the text until
all are there. The openings decide the batches' seeds; other versions of torch may write other texts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from patchkit import zoo

OPENINGS = [
    "The history of",
    "In a small town",
    "Scientists have found that",
    "To cook this dish",
    "Once upon a time",
    "The river",
    "A good way to learn",
    "In the year",
    "The company announced",
    "My grandmother",
    "The main difference between",
    "When the rain",
    "The city council",
    "In physics,",
    "He opened the door",
    "Many people believe",
]
LENGTH = 256


@torch.no_grad()
def batch_of(model: torch.nn.Module, tokenizer, number: int) -> list[str]:  # type: ignore[no-untyped-def]
    """One text for each opening."""
    torch.manual_seed(number)
    tokenizer.padding_side = "left"
    ids = tokenizer(OPENINGS, return_tensors="pt", padding=True)
    made = model.generate(**ids, max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=0.95)  # type: ignore[operator]
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = zoo.load("gemma")[:2]
    parts = args.out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    count = -(-args.tokens // (LENGTH * len(OPENINGS)))
    for number in range(count):
        part = parts / f"{number}.txt"
        if part.is_file():
            continue
        new = part.with_suffix(".new")
        new.write_text("\n\n".join(batch_of(model, tokenizer, number)), encoding="utf-8")
        new.replace(part)
        print(f"{number + 1} of {count}", flush=True)
    args.out.write_text(
        "\n\n".join((parts / f"{n}.txt").read_text(encoding="utf-8") for n in range(count)), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

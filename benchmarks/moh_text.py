"""Text that Gemma 3 270M writes itself: what `patchkit train` is given where recovery, not a new domain, is to be seen.

    python benchmarks/moh_text.py out/gemma-writes.txt --tokens 80000

Sampled at temperature 1 from the 128 likeliest tokens, after nothing but a short opening: dense Gemma has little to
learn from it, and a tuned model that comes near its perplexity has recovered. Goes on where it was; one batch is one
file beside the text until all are there. The number of a batch seeds its draws; other versions of torch may write other
texts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

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
LENGTH = 256  # tokens written after an opening
COPIES = 4  # texts of each opening in one batch
BEST = 128  # likeliest tokens that are drawn from: sorting a vocabulary of 262,144 would take longer than the model


@torch.no_grad()
def batch_of(model: Any, tokenizer: Any, number: int) -> list[str]:
    """One batch of texts; a text ends where the model ends it."""
    draws = torch.Generator().manual_seed(number)
    tokenizer.padding_side = "left"
    given = tokenizer(OPENINGS * COPIES, return_tensors="pt", padding=True)
    ids, mask, past = given.input_ids, given.attention_mask, None
    texts = ids
    for _ in range(LENGTH):
        out = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        best = out.logits[:, -1].topk(BEST)
        drawn = torch.multinomial(best.values.softmax(-1), 1, generator=draws)
        ids = best.indices.gather(1, drawn)
        texts = torch.cat([texts, ids], 1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return [tokenizer.decode(_until_end(row, tokenizer), skip_special_tokens=True).strip() for row in texts]


def _until_end(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    ends = (ids == tokenizer.eos_token_id).nonzero()
    return ids[: int(ends[0])] if len(ends) else ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = zoo.load("gemma")[:2]
    parts = args.out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    count = -(-args.tokens // (LENGTH * len(OPENINGS) * COPIES))
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

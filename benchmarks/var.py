"""VAR on the zoo's vision-language model: the share of right answers with and without it.

    python benchmarks/var.py                      zoo/vlm, 200 pictures, channels as the probe ranks them
    python benchmarks/var.py --planted 4          spikes planted on every fourth patch and on the first token
    python benchmarks/var.py --model tiny --pictures 2 --limit 4 --dry     a random LLaVA: whether it runs at all

The model is 128 wide, so |x| / RMS(x) is at most 11.3 and the method's tau of 20 can never be reached: tau is lowered
(``--tau``), and without planting there may be no sinks at all, which the row then says. Questions and right answers are
made from pictures drawn with a fixed seed; both variants answer the same ones, greedily.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions

import patchkit
from patchkit import zoo
from patchkit.intervals import share, share_difference
from patchkit.recipes.var import probe
from patchkit.zoo import stills
from patchkit.zoo.chat import VisionLanguage, chat_processor
from patchkit.zoo.questions import Question, View, ask_all, sample_still


def tiny() -> VisionLanguage:
    """A random LLaVA that reads what zoo/vlm reads."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    processor = chat_processor()
    words = len(processor.tokenizer)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": words, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=64)
    return VisionLanguage(LlavaForConditionalGeneration(config).eval(), processor)


@contextlib.contextmanager
def planted(model: Any, every: int, channel: int, size: float = 24.0) -> Iterator[None]:
    """A spike on the first token of each prompt and on every so many-th image token; 0 = none.

    ``size`` is in RMS of the token's other channels: a fixed number may be small beside what the model carries.
    """
    now: dict[str, Any] = {}

    def ids(module: Any, args: Any, kwargs: Any) -> None:
        now["ids"] = kwargs["input_ids"]

    def spike(module: Any, args: Any) -> Any:
        hidden, image = args[0].clone(), now["ids"] == model.config.image_token_id
        if hidden.shape[1] > 1:
            first = now["ids"] == model.config.get_text_config().bos_token_id
            spiked = first | (image & (image.cumsum(1) % every == 0))
            hidden[..., channel] += size * hidden.square().mean(-1).sqrt() * spiked
        return (hidden, *args[1:])

    if not every:
        yield
        return
    first_block = model.model.language_model.layers[0]
    hooks = [model.register_forward_pre_hook(ids, with_kwargs=True), first_block.register_forward_pre_hook(spike)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def questions(count: int, limit: int | None) -> tuple[list[Question], list[list[torch.Tensor]]]:
    rng = random.Random("var")
    shown = [sample_still(rng) for _ in range(count)]
    asked, pictures = [], []
    for still, picture in zip(shown, stills.render(shown), strict=True):
        for question in ask_all(View.of_still(still), rng):
            asked.append(question)
            pictures.append([picture])
    return asked[:limit], pictures[:limit]


def right(pair: VisionLanguage, asked: list[Question], pictures: list[list[torch.Tensor]]) -> list[bool]:
    found = []
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        told = pair.answers([q.text for q in part], pictures[start : start + 50])
        found += [q.right(a) for q, a in zip(part, told, strict=True)]
    return found


def channel_of(pair: VisionLanguage, asked: list[Question], pictures: list[list[torch.Tensor]], tau: float) -> int:
    """The channel that is largest at the first token."""
    texts = [pair.prompt(q.text) for q in asked[:16]]
    images = [p[0] for p in pictures[:16]]
    given = [
        dict(pair.processor(text=[t], images=[(i * 255).round().to(torch.uint8)], return_tensors="pt"))
        for t, i in zip(texts, images, strict=True)
    ]
    found = probe(pair.model, given, tau=tau, layers="1:-1")
    print(f"probe at tau {tau:g}: {found.candidates or 'no channel'}; {'; '.join(found.reasons) or 'accepted'}")
    return max(found.evidence.medians, key=lambda c: max(found.evidence.medians[c]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pair = tiny() if args.model == "tiny" else zoo.load(args.model.removeprefix("zoo/"))
    asked, pictures = questions(args.pictures, args.limit)
    channel = args.channel if args.channel is not None else channel_of(pair, asked, pictures, args.tau)
    options = {"tau": args.tau, "sink_dims": [channel], "layers": args.layers, "rho": args.rho, "recycle": args.recycle}
    with planted(pair.model, args.planted, channel):
        dense = right(pair, asked, pictures)
        with patchkit.apply(pair.model, "var", **options) as patch:
            edited = right(pair, asked, pictures)
            means = patch.report()["recipes"][0]["means"]
    both = {"dense": share([float(x) for x in dense]), "var": share([float(x) for x in edited])}
    change = share_difference([float(x) for x in edited], [float(x) for x in dense])
    return {
        "benchmark": "var",
        "model": args.model,
        "questions": len(asked),
        "planted": args.planted,
        **options,
        **{name: [round(float(v), 4) for v in interval] for name, interval in both.items()},
        "difference": [round(float(v), 4) for v in change],
        **{name: round(means.get(name, 0.0), 4) for name in ("visual_sinks", "selected_rate", "moved_mass")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/vlm", help="zoo/vlm or tiny")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--limit", type=int, help="questions at most")
    parser.add_argument("--planted", type=int, default=0, help="every so many-th image token; 0 = none")
    parser.add_argument("--channel", type=int, help="sink channel; default: the first token's largest")
    parser.add_argument("--tau", type=float, default=6.0)
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--recycle", type=float, default=0.6)
    parser.add_argument("--layers", default="1:-1")
    parser.add_argument("--dry", action="store_true", help="write no row")
    args = parser.parse_args()
    row = measure(args)
    for name, value in row.items():
        print(f"{name:14} {value}")
    if not args.dry:
        append(RESULTS / "var.jsonl", conditions("cpu") | row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

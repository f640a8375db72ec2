"""What DiTCtrl costs on zoo/video: computing segments once against pair after pair, and memory by the video's length.

python benchmarks/ditctrl.py --dedup
python benchmarks/ditctrl.py --memory
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import patchkit
from patchkit.recipes.ditctrl import DiTCtrl

COLOURS = ("red", "green", "blue", "orange", "purple", "yellow", "red", "green")
# what is shared: nothing, whole keys, keys by masks
OPTIONS: dict[str, dict[str, Any]] = {
    "blending": {"kv_steps": None},
    "sharing": {"mask_guided": False},
    "full": {"objects": "circle"},
}


def prompts(count: int) -> list[str]:
    """A circle that changes its colour."""
    return [f"a {COLOURS[i]} circle standing still on a white background" for i in range(count)]


def run(pipe: Any, recipes: Any, count: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """The latents of a long video, and what DiTCtrl counted."""
    with patchkit.apply(pipe, recipes) as patch:
        out = pipe(
            prompt=prompts(count),
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        return out, patch.report()["recipes"][-1]["counts"]


def dedup_rows(
    pipe: Any, steps: int, rounds: int, counts: tuple[int, ...] = (2, 3), labels: tuple[str, ...] = tuple(OPTIONS)
) -> Iterator[dict[str, Any]]:
    """Pair after pair and each segment once, taking turns; ratios of the medians of ``rounds``.

    Both times are given: of the wall, and of the processor, which other work on the machine disturbs less. Text and
    noise are in both; decoding is in neither.
    """
    for count in counts:
        for label in labels:
            transitions = 0 if label == "full" else 1  # the object stands elsewhere in a mixture
            recipe = DiTCtrl(overlap=6, transitions=transitions, zero_uncond=False, **OPTIONS[label])
            wall: dict[bool, list[float]] = {True: [], False: []}
            processor: dict[bool, list[float]] = {True: [], False: []}
            outs, blocks = {}, {}
            for _ in range(rounds):
                for once in (False, True):
                    with mock.patch.object(DiTCtrl, "deduplicates", once):
                        start = time.perf_counter(), time.process_time()
                        outs[once], counted = run(pipe, recipe, count, steps)
                        wall[once].append(time.perf_counter() - start[0])
                        processor[once].append(time.process_time() - start[1])
                    blocks[once] = counted["block forwards"]
            middle = {once: statistics.median(processor[once]) for once in (True, False)}
            yield {
                "label": label,
                "prompts": count,
                "segments": count + transitions * (count - 1),
                "steps": steps,
                "rounds": rounds,
                "block_forwards": blocks[True],
                "block_forwards_pairwise": blocks[False],
                "gain_blocks": round(blocks[False] / blocks[True], 3),
                "gain_processor": round(middle[False] / middle[True], 3),
                "gain_wall": round(statistics.median(wall[False]) / statistics.median(wall[True]), 3),
                "seconds_processor": round(middle[True], 2),
                "equal": torch.equal(outs[True], outs[False]),
            }


def memory_rows(pipe: Any, counts: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[dict[str, Any]]:
    """The most bytes of tensors that live at a time, beyond those before the run, by the number of segments.

    One step, in which keys are shared; everything from the texts to the latents. One segment is the pipeline's own.
    """
    softpag = patchkit.recipes()["softpag"](heads=[(3, 0)])
    own = DiTCtrl(overlap=6, transitions=0, kv_steps=(0, 1), objects="circle", zero_uncond=False)
    for label, recipes in {"full": [own], "full in softpag": [softpag, own]}.items():
        for count in counts:
            run(pipe, recipes, count, 1)  # what is built once and kept
            options: dict[str, Any] = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
            with torch.profiler.profile(**options) as profile:
                out, _ = run(pipe, recipes, count, 1)
            peak, largest = _peak(profile)
            yield {
                "label": label,
                "segments": count,
                "latent_frames": out.shape[1],
                "peak_bytes": peak,
                "largest_tensor_bytes": largest,
                "latents_bytes": out.nbytes,
            }


def _peak(profile: Any) -> tuple[int, int]:
    """The most bytes that were allocated at a time, and at once."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak, largest = max(peak, now), max(largest, event.nbytes())
    return peak, largest

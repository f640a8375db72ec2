"""DiTCtrl under other schedulers, on CogVideoX 1.5, and on compiled models."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import ditctrl_oracle as oracle
import pytest
import tiny
import torch
from ditctrl_tools import PROMPTS, SHORT, build, encoded, loud, run, tokens
from tiny import videos
from torch import Tensor

import patchkit
from patchkit import InvalidOption
from patchkit.recipe_files import files, yamlread
from patchkit.recipes.ditctrl import DiTCtrl
from patchkit.runs import running

TWO = ["a red circle", "a blu circle"]

# --- schedulers -----------------------------------------------------------------------------------------------

# what diffusers lists as compatible with a pipeline's scheduler and what the pipeline runs with; not DPMSolverSDE
# (needs torchsde) and PNDM (cannot take these few steps)
COGVIDEOX = (
    *("CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
    *("LMSDiscrete", "UniPCMultistep"),
)
WAN = (
    *("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
)


@pytest.mark.parametrize(
    ("name", "scheduler"), [*(("cogvideox2b", s) for s in COGVIDEOX), *(("wan21", s) for s in WAN)]
)
def test_every_scheduler_of_the_pipeline(name: str, scheduler: str) -> None:
    """One prompt: the pipeline's own call to the bit. Two: a long video, and no state is left."""
    entry, pipe = build(name, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(diffusers, f"{scheduler}Scheduler")
        pipe.scheduler = cls.from_config(pipe.scheduler.config)

    def made(**call: Any) -> Tensor:
        torch.manual_seed(0)  # FlowMatchLCM draws its noise from the global generator
        return tiny.run(entry, pipe, steps=3, **call)

    plain = made()
    recipe = DiTCtrl(overlap=1, kv_layers="1-", kv_steps=(0.1, 0.9), objects="circle")
    with patchkit.apply(pipe, recipe) as patch:
        assert torch.equal(made(), plain)
        long = made(prompt=TWO, negative_prompt=None)
        [report] = patch.report()["recipes"]
        assert not any(b.states or b.shared or b.carried for b in patch._bounds)
        assert torch.equal(made(), plain)
    assert type(pipe.scheduler) is cls
    assert torch.isfinite(long).all()
    assert long.numel() == plain.numel() // 3 * 7
    # two targets, one layer that shares keys; solvers of second order call the denoiser more often than they step
    assert report["counts"]["shared ops"] >= 2 * 2 * (2 if name == "wan21" else 1)


# --- CogVideoX 1.5 --------------------------------------------------------------------------------------------


def fifteen(layers: int = 4) -> tuple[Any, Any]:
    entry = dataclasses.replace(tiny.PIPELINES["cogvideox"], build=videos.cogvideox15)
    pipe = entry.build(layers=layers)
    loud(pipe)
    return entry, pipe


def noise(frames: int) -> Tensor:
    return torch.randn(1, frames, 4, 4, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("objects", [None, "circle"])
def test_two_latent_frames_a_token(objects: str | None) -> None:
    """Tiles of 4 latent frames, 2 in tokens, from latent frames 0, 3 and 6: positions begin anew in each."""
    entry, pipe = fifteen()
    count, frames = oracle.frames(2, 1, 0, 4, 1)
    words, embeds = tokens(pipe, TWO[0], "circle"), [encoded(pipe, p) for p in TWO]
    state = oracle.State(layers=(2, 3), threshold=0.3, grid=(2, 2, 3))
    z = noise(frames)
    shared: dict[str, Any] = {"steps": 5}
    expected = oracle.long_video(
        pipe,
        oracle.texts(embeds, 1, 0),
        torch.zeros_like(embeds[0]),
        z,
        length=4,
        overlap=1,
        guidance=4.0,
        sharing=lambda i: i in (1, 2),
        state=state,
        tokens=[words] * count if objects else None,
        generator=torch.Generator().manual_seed(9),
        **shared,
    )
    call = {"latents": z, "num_frames": 13, "guidance_scale": 4.0, "prompt": TWO}
    generator = torch.Generator().manual_seed(9)
    found = run(entry, pipe, DiTCtrl(**SHORT, objects=objects), **shared, **call, generator=generator)
    assert found.shape == expected.shape == (1, 10, 4, 4, 6)
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_segments_that_the_pipeline_pads_are_those_that_it_pads_alone() -> None:
    """9 frames are 3 latent ones, of which this model takes 2 at a time: it adds one in front and drops it again."""
    entry, pipe = fifteen(2)
    pipe.scheduler = build("cogvideox2b")[1].scheduler  # deterministic
    z = noise(8)
    recipe = DiTCtrl(overlap=0, transitions=0, kv_steps=None, zero_uncond=False)
    found = run(entry, pipe, recipe, 2, latents=z)
    for i, prompt in enumerate(PROMPTS[:2]):
        part = z[:, 4 * i : 4 * i + 4]
        alone = tiny.run(entry, pipe, steps=2, prompt=prompt, negative_prompt=None, latents=part)
        assert torch.equal(found[:, 4 * i : 4 * i + 4], alone)
    pictures = run(entry, pipe, DiTCtrl(**{**SHORT, "kv_layers": "1-"}), 2, output_type="pt")
    assert pictures.shape[1] == 4 * (10 - 1 - 1) + 1  # 10 latent frames, the first of which was added


def test_a_length_that_cannot_be_cut_into_tokens_is_refused() -> None:
    entry, pipe = fifteen(2)
    with pytest.raises(InvalidOption, match=r"7 latent frames, of which the denoiser takes 2 at a time"):
        run(entry, pipe, DiTCtrl(overlap=1, transitions=0), 2, num_frames=13)
    assert run(entry, pipe, DiTCtrl(overlap=2, transitions=0), 2, num_frames=13).shape[1] == 6


# --- torch.compile --------------------------------------------------------------------------------------------

LIMIT = 1e-5  # relative, against eager


@pytest.fixture
def _forget() -> Any:
    yield
    torch.compiler.reset()


def compile_it(pipe: Any, way: str) -> None:
    model = pipe.transformer
    if way == "regional":
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    elif way == "blocks":  # the same by hand: this class does not say which of its blocks repeat
        for block in model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
    elif way == "whole":
        model.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(model, backend="eager")


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    ("name", "way", "mode"),
    [
        ("cogvideox", "blocks", "longer"),
        ("cogvideox", "wrapped", "swap"),
        ("wan21", "whole", "longer"),
        ("wan21", "regional", "reweight"),
    ],
)
def test_compiled_is_eager(name: str, way: str, mode: str) -> None:
    options: dict[str, Any] = {**SHORT, "kv_layers": "1-", "kv_steps": (1, 2), "mode": mode, "objects": "circle"}
    call: dict[str, Any] = {"prompt": TWO}
    if mode == "reweight":
        options, call = {"mode": mode, "reweight": {"red": 2.0}}, {"prompt": TWO[0]}
    entry, pipe = build(name, 2)
    eager = run(entry, pipe, DiTCtrl(**options), 2, **call)
    compile_it(pipe, way)
    with patchkit.apply(pipe, DiTCtrl(**options)) as patch:
        found = tiny.run(entry, pipe, steps=2, **{"negative_prompt": None, **call})
        [report] = patch.report()["recipes"]
        text = str(patch.report())
    assert float((found - eager).norm() / eager.norm()) < LIMIT
    counts = report["counts"]
    assert counts["reweighted ops" if mode == "reweight" else "guided ops"] > 0
    # blocks do not come by in a model that is compiled whole: segments run in both roles in full, which is said
    whole = way in ("whole", "wrapped")
    assert ("could not stand around the blocks" in text) == whole
    assert ("block forwards" in counts) == (not whole)


# --- what one sees --------------------------------------------------------------------------------------------


def test_a_bar_counts_the_clips_of_each_step() -> None:
    """Beside the pipeline's own, and hidden where that is."""
    entry, pipe = build("cogvideox2b", 2)
    call = {**entry.arguments(), "prompt": TWO, "negative_prompt": None, "num_inference_steps": 2}
    for hidden in (False, True):
        shown = io.StringIO()
        pipe.set_progress_bar_config(disable=hidden, file=shown)
        with patchkit.apply(pipe, DiTCtrl(overlap=1, kv_steps=None)):
            pipe(**call, generator=torch.Generator().manual_seed(0))
        states = re.findall(r"clips of this step: .*?(\d)/(\d) ", shown.getvalue())
        assert [int(n) for n, total in states if total == "3" and n != "0"] == ([] if hidden else [1, 2, 3] * 2)


@pytest.mark.parametrize("name", ["ditctrl-swap", "ditctrl-reweight"])
def test_shipped_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single step. The long one is run by the test of its benchmark."""
    monkeypatch.chdir(tmp_path)
    text = files.examples()[name].replace("num_inference_steps: 20", "num_inference_steps: 1")
    job = running.job_of(files.parse(yamlread.read_text(text, f"{name}.yaml")))
    result = running.run(job, say=lambda _: None, bars=False)
    videos_of = sorted(p for p in tmp_path.rglob("*") if p.suffix == ".mp4")
    assert len(videos_of) == 2
    assert any("ditctrl" in text for text in result.report.values())

"""The packaged model: what it is, what it weighs, that it repeats itself, and that it was trained."""

import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch

from patchkit import zoo
from patchkit.errors import PatchkitError
from patchkit.zoo.detect import ATTRIBUTES, Attributes, detect
from patchkit.zoo.training.evaluate import draw_scenes, generate, untrained, wilson


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.load("video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_names_and_errors():
    assert [name for name in zoo.names() if zoo.shipped(name)] == ["dit", "flux", "image", "video", "vlm"]
    assert "frames" in zoo.describe("video")
    assert zoo.path("zoo/video") == zoo.path("video")
    with pytest.raises(zoo.UnknownZooModel, match="did you mean 'video'") as info:
        zoo.load("vidio")
    assert isinstance(info.value, PatchkitError)


def test_importing_the_zoo_is_light():
    code = "import sys, patchkit.zoo, patchkit.zoo.world, patchkit.zoo.text, patchkit.zoo.detect\n" + (
        "print([m for m in ('diffusers', 'transformers', 'PIL', 'imageio') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_weights_are_small_and_complete():
    files = [f for f in zoo.path("video").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 8_000_000
    assert len([f for f in files if f.suffix == ".safetensors"]) == 3


def test_it_is_the_real_pipeline(pipe):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5EncoderModel, T5Tokenizer

    assert type(pipe) is CogVideoXPipeline
    assert type(pipe.transformer) is CogVideoXTransformer3DModel
    assert type(pipe.vae) is AutoencoderKLCogVideoX
    assert type(pipe.scheduler) is CogVideoXDDIMScheduler
    assert type(pipe.text_encoder) is T5EncoderModel
    assert isinstance(pipe.tokenizer, T5Tokenizer)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in part.parameters())


def test_dtype_can_be_chosen():
    half = zoo.load("video", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_defaults_are_call_arguments(pipe):
    call = zoo.defaults("video")
    assert set(call) <= set(inspect.signature(type(pipe).__call__).parameters)
    Attributes.of_prompt(call["prompt"])
    call["guidance_scale"] = 99
    assert zoo.defaults("video")["guidance_scale"] != 99


def test_the_plain_call_has_the_right_shape(pipe):
    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: sizes.append((k["hidden_states"].shape, k["encoder_hidden_states"].shape)), with_kwargs=True
    )
    try:
        frames = pipe("a red circle moving right on a blue background", num_inference_steps=1).frames[0]
    finally:
        hook.remove()
    assert len(frames) == 17
    assert {f.size for f in frames} == {(64, 64)}
    assert sizes == [((2, 17, 3, 16, 16), (2, 20, 64))]  # 17 x 8 x 8 tokens of video, 20 of text


def test_the_tokenizer_copies_and_saves_as_what_it_is(pipe, tmp_path):
    prompt = "a red circle moving right on a blue background"
    again = copy.deepcopy(pipe.tokenizer)
    assert again(prompt, padding="max_length", max_length=226).input_ids == (
        pipe.tokenizer(prompt, padding="max_length", max_length=20).input_ids
    )
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "T5Tokenizer"]
    assert type(type(pipe).from_pretrained(tmp_path, local_files_only=True).tokenizer).__name__ == "T5Tokenizer"


def test_the_encoder_is_the_area_mean_and_the_decoder_inverts_it(pipe):
    from patchkit.metrics import psnr
    from patchkit.zoo import world

    scenes = draw_scenes(2, seed=8)
    video = world.render(scenes, torch.linspace(0, 1, 17)).transpose(1, 2)
    with torch.no_grad():
        code = pipe.vae.encode(video * 2 - 1).latent_dist.mode()
        back = (pipe.vae.decode(code).sample / 2 + 0.5).clamp(0, 1)
    means = torch.nn.functional.avg_pool3d(video * 2 - 1, (1, 4, 4))
    assert (code - means).abs().max() < 0.003
    assert psnr(back, video) > 29
    for scene, clip in zip(scenes, back.transpose(1, 2), strict=True):
        assert all(detect(clip).right(Attributes.of_scene(scene)).values())


def test_equal_seeds_give_equal_clips_in_any_batch(pipe):
    prompts = [s.caption for s in draw_scenes(2, seed=5)]
    call = {"num_inference_steps": 1, "guidance_scale": 3.0}
    together = generate(pipe, prompts, 7, batch=2, **call)
    assert torch.equal(together, generate(pipe, prompts, 7, batch=2, **call))
    assert (together - generate(pipe, prompts, 7, batch=1, **call)).abs().max() < 1e-3
    assert (together - generate(pipe, prompts, 8, batch=2, **call)).abs().max() > 0.05


@pytest.mark.slow
def test_the_model_draws_what_it_is_told_and_a_control_does_not(pipe):
    scenes = draw_scenes(6, seed=11)
    prompts = [s.caption for s in scenes]
    call = {"num_inference_steps": 6, "guidance_scale": zoo.defaults("video")["guidance_scale"]}
    clips = generate(pipe, prompts, 100, batch=6, **call)
    read = [detect(clip).right(Attributes.of_scene(s)) for s, clip in zip(scenes, clips, strict=True)]
    right = {name: sum(row[name] for row in read) for name in ATTRIBUTES}
    assert right["background"] >= 5, right
    assert right["colour"] >= 5, right
    assert right["motion"] >= 4, right
    assert right["shape"] >= 3, right
    control = generate(untrained(copy.copy(pipe)), prompts[:2], 100, batch=2, num_inference_steps=3, guidance_scale=3.0)
    for scene, clip in zip(scenes, control, strict=False):
        found = detect(clip).right(Attributes.of_scene(scene))
        assert not found["colour"]
        assert not found["shape"]


def test_wilson_interval():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)

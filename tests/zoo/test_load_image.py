"""The packaged image model: what it is and weighs, that it was trained, that inversion and word swaps work on it."""

import copy
import inspect

import pytest
import torch

from patchkit import zoo
from patchkit.metrics import psnr
from patchkit.zoo import stills
from patchkit.zoo.stills import Description
from patchkit.zoo.training.image_evaluate import draw_wanted, generate, summarise, untrained
from patchkit.zoo.training.inversion import decode, draw_stills, encode, round_trip, swaps

CALL = {"num_inference_steps": 10, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.load("image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_the_real_pipeline_small_and_complete(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    files = [f for f in zoo.path("image").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 7e6
    assert len([f for f in files if f.suffix == ".safetensors"]) == 3
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in part.parameters())
    attention = [name for name in pipe.unet.attn_processors if ".attn1." in name or ".attn2." in name]
    levels = {name.split(".attentions")[0] for name in attention if not name.startswith("mid")}
    assert len(levels) == 6  # three on the way down, three on the way up


def test_defaults_are_call_arguments(pipe):
    call = zoo.defaults("image")
    assert set(call) <= set(inspect.signature(type(pipe).__call__).parameters)
    assert Description.parse(call["prompt"]).held_out == ""


def test_dtype_can_be_chosen():
    half = zoo.load("image", torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_it_draws_what_it_is_told_and_a_control_does_not(pipe):
    wanted = draw_wanted(4, 11, "one") + draw_wanted(4, 11, "two")
    prompts = [w.caption for w in wanted]
    read = summarise(wanted, generate(pipe, prompts, 100, **CALL))
    right = {key: round(row["share"] * row["of"]) for key, row in read.items() if isinstance(row, dict)}
    assert right["background"] == 8, right
    assert min(right["count"], right["colour"]) >= 7, right
    assert right["position"] >= read["position"]["of"] - 1, right
    assert right["shape"] >= 5, right
    control = generate(untrained(copy.copy(pipe)), prompts, 100, **CALL | {"num_inference_steps": 2})
    assert summarise(wanted, control)["all"]["share"] == 0


def test_the_decoder_inverts_the_written_encoder(pipe):
    pictures = stills.render(draw_stills(3, 5))
    code = encode(pipe, pictures)
    mean = torch.nn.functional.avg_pool2d(pictures * 2 - 1, 4) * pipe.vae.config.scaling_factor
    assert (code - mean).abs().max() < 0.003 * pipe.vae.config.scaling_factor
    assert psnr(decode(pipe, code), pictures) > 29


@pytest.mark.parametrize("kind", ["ddim", "dpm++"])
def test_renders_come_back_from_the_noise_that_they_invert_to(pipe, kind):
    row = round_trip(pipe, draw_stills(3, 21), kind, 25, True)
    assert row["psnr_to_vae"] > 25, row
    assert row["right"] == 1, row
    assert abs(row["noise_neighbours"]) < 0.1, row  # it is noise, not a faint picture


def test_swapped_words_change_what_they_name_and_leave_the_place(pipe):
    row = swaps(pipe, draw_stills(4, 22), steps=20, guidance=2.0)
    assert row["edited"] >= 0.5, row
    assert row["kept_place"] >= 0.5, row


def test_equal_seeds_give_equal_pictures(pipe):
    prompts = [w.caption for w in draw_wanted(2, 5, "two")]
    call = CALL | {"num_inference_steps": 2}
    together = generate(pipe, prompts, 7, **call)
    assert torch.equal(together, generate(pipe, prompts, 7, **call))
    assert (together - generate(pipe, prompts, 8, **call)).abs().max() > 0.05

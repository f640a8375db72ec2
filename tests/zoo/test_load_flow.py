"""The packaged flow-matching models: what they are, what they weigh, and that they were trained."""

import copy
import inspect

import pytest
import torch

from patchkit import zoo
from patchkit.zoo import stills
from patchkit.zoo.stills import Description
from patchkit.zoo.training.flow_assemble import PIPELINES
from patchkit.zoo.training.flow_evaluate import options
from patchkit.zoo.training.image_evaluate import draw_wanted, generate, summarise, untrained

PACKAGED = [name for name in zoo.names() if name in PIPELINES]


@pytest.fixture(scope="module", params=PACKAGED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    pipe = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_small_and_complete(name):
    files = [f for f in zoo.path(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < {"dit": 7e6, "flux": 6e6}[name]
    assert len([f for f in files if f.suffix == ".safetensors"]) == {"dit": 5, "flux": 4}[name]


def test_all_weights_of_the_zoo_together_are_small():
    files = [f for name in zoo.names() for f in zoo.path(name).rglob("*.safetensors")]
    assert sum(f.stat().st_size for f in files) < 30e6


def test_it_is_the_real_pipeline_in_full_precision(name, pipe):
    assert type(pipe).__name__ == PIPELINES[name]
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in part.parameters())
    heads = {m.heads for n, m in pipe.transformer.named_modules() if n.endswith(".attn")}
    assert heads == {6}


def test_dtype_can_be_chosen(name):
    half = zoo.load(name, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_defaults_are_call_arguments(name, pipe):
    call = zoo.defaults(name)
    assert set(call) <= set(inspect.signature(type(pipe).__call__).parameters)
    assert Description.parse(call["prompt"]).held_out == ""


def test_the_decoder_inverts_the_written_encoder(pipe):
    from patchkit.metrics import psnr

    picture = stills.render([stills.Still(draw_wanted(1, 3, "two")[0], ((16, 32, 11), (48, 32, 11)), 5)])
    with torch.no_grad():
        code = pipe.vae.encode(picture * 2 - 1).latent_dist.mode()
        back = (pipe.vae.decode(code).sample / 2 + 0.5).clamp(0, 1)
    assert (code - torch.nn.functional.avg_pool2d(picture * 2 - 1, 4)).abs().max() < 0.003
    assert psnr(back, picture) > 29


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_model_draws_what_it_is_told_and_a_control_does_not(name, pipe, guidance):
    wanted = draw_wanted(4, 11, "one") + draw_wanted(4, 11, "two")
    prompts = [w.caption for w in wanted]
    read = summarise(wanted, generate(pipe, prompts, 100, **options(name, 10, guidance)))
    right = {key: round(row["share"] * row["of"]) for key, row in read.items() if isinstance(row, dict)}
    assert right["background"] == right["count"] == 8, right
    assert right["colour"] >= 7, right
    assert right["position"] >= read["position"]["of"] - 1, right
    assert right["shape"] >= 5, right
    if guidance == 1.0:
        control = generate(untrained(copy.copy(pipe)), prompts, 100, **options(name, 2, 1.0))
        assert summarise(wanted, control)["all"]["share"] == 0


def test_equal_seeds_give_equal_pictures(name, pipe):
    call = options(name, 1, 1.5)
    prompts = [w.caption for w in draw_wanted(2, 5, "two")]
    together = generate(pipe, prompts, 7, **call)
    assert torch.equal(together, generate(pipe, prompts, 7, **call))
    assert (together - generate(pipe, prompts, 8, **call)).abs().max() > 0.05

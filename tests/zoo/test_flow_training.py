"""The training of zoo/dit and zoo/flux runs, learns and resumes, and is about what the real pipelines ask for."""

import json

import pytest
import torch

from patchkit import zoo
from patchkit.zoo import stills
from patchkit.zoo.text import clip_tokenizer, t5_tokenizer
from patchkit.zoo.training import dit, flow, flow_assemble, flow_evaluate, flux, image_evaluate, image_vae
from patchkit.zoo.training.assemble import save
from patchkit.zoo.training.plot import read_log
from patchkit.zoo.training.stills_run import Stage

BOTH = pytest.mark.parametrize("name", ["dit", "flux"])
CAPTION = "a red circle left of a green square on a blue background"


STAGES = (Stage(2, 2, 0), Stage(1, 3, 100))


def _run(name, out, stages=STAGES):
    out.mkdir(exist_ok=True)
    run = flow_assemble.MODELS[name].Run(out, stages, lr=0.02, seed=0)
    run.resume()
    return run


@pytest.fixture(scope="module", params=["dit", "flux"])
def trained(request, tmp_path_factory):
    """(name, folder with a denoiser of a few steps, assembled pipeline folder, bytes)."""
    folder = tmp_path_factory.mktemp(request.param)
    _run(request.param, folder / "denoiser", (Stage(3, 2, 50),)).fit()
    return (
        request.param,
        folder,
        save(flow_assemble.assemble(request.param, folder / "denoiser", None), folder / "model"),
    )


@pytest.fixture(scope="module")
def pipe(trained):
    pipe = zoo.load_folder(trained[1] / "model", flow_assemble.PIPELINES[trained[0]])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@BOTH
def test_a_resumed_run_equals_an_unbroken_one(name, tmp_path):
    whole = _run(name, tmp_path / "whole")
    whole.fit()
    first = _run(name, tmp_path / "broken")
    first.train_step()
    first.checkpoint()
    second = _run(name, tmp_path / "broken")
    assert second.step == 1
    second.fit()
    for mine, theirs in ((whole.average, second.average), (whole.model, second.model)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert [r["step"] for r in read_log(tmp_path / "whole" / "log.jsonl")] == [3]


@BOTH
def test_training_lowers_the_loss_and_reaches_every_weight(name, tmp_path):
    run = _run(name, tmp_path / "run", (Stage(40, 4, 50),))
    start = {n: p.clone() for n, p in run.model.named_parameters()}
    run.warm = 4
    losses = [run.train_step() for _ in range(12)]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4]), losses
    owned = [id(p) for o in run.optimisers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in run.model.parameters())
    assert len(run.optimisers[0].param_groups[0]["params"]) > 50
    still = [n for n, p in run.model.named_parameters() if torch.equal(p, start[n])]
    # of the last joint block's text nothing comes out, so its queries do nothing
    assert all("blocks.5.attn" in n and ("add_q_proj" in n or "norm_added_q" in n) for n in still), still


def test_levels_cover_their_distribution_evenly():
    torch.manual_seed(0)
    sigma = flow.levels(1000)
    assert 0 < sigma.min() < 0.03
    assert 0.97 < sigma.max() < 1
    standard = (sigma.logit() - flow.LEVELS[0]) / flow.LEVELS[1]
    assert standard.mean().item() == pytest.approx(0, abs=0.01)
    assert standard.std().item() == pytest.approx(1, abs=0.02)
    quarters = torch.distributions.Normal(0.0, 1.0).cdf(standard) * 4
    assert [int((quarters.int() == n).sum()) for n in range(4)] == [250] * 4
    assert 0.55 < ((sigma > 0.1) & (sigma < 0.7)).float().mean() < 0.62


def test_the_scheduler_shifts_its_steps():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**flow.SCHEDULER)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    expected = torch.linspace(1, 0.1, 10)
    expected = flow.SHIFT * expected / (1 + (flow.SHIFT - 1) * expected)
    assert torch.allclose(scheduler.sigmas[:-1], expected, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, expected * 1000, atol=1e-3)


@pytest.mark.parametrize("level", [0.0, 0.05, 0.3, 1.0])
def test_the_target_is_the_expected_velocity(level):
    """Regression of sampled velocities on what can be seen of grain and noise gives the same."""
    generator = torch.Generator().manual_seed(0)
    grain, noise = torch.randn(2, 4_000_000, generator=generator)
    grain = grain * flow.GRAIN
    seen = (1 - level) * grain + level * noise
    slope = ((noise - grain) @ seen / (seen @ seen)).item()
    flat = torch.full((1, 3, 16, 16), 0.7)
    noisy, velocity = flow.noisy_and_velocity(flat, torch.tensor([level]))
    rest = noisy - (1 - level) * flat
    assert torch.allclose(velocity + flat, slope * rest, atol=0.03 * (velocity + flat).abs().max().item())
    assert rest.std().item() == pytest.approx(seen.std().item(), rel=0.1)


def test_the_pictures_of_a_perfect_model_have_the_grain():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**flow.SCHEDULER)
    scheduler.set_timesteps(200)
    latents, flat = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), -0.4
    for t in scheduler.timesteps:
        level = t / 1000
        power = ((1 - level) * flow.GRAIN) ** 2 + level**2
        share = (level - (1 - level) * flow.GRAIN**2) / power
        latents = scheduler.step(share * (latents - (1 - level) * flat) - flat, t, latents, return_dict=False)[0]
    assert latents.mean().item() == pytest.approx(flat, abs=0.01)
    assert latents.std().item() == pytest.approx(flow.GRAIN, rel=0.1)


def test_every_caption_fits_without_unknown_words():
    captions = {d.caption for n in (0, 1, 2) for d in stills.descriptions(n)}
    longest = sorted(captions, key=lambda c: -len(c.split()))[:50]
    assert len(longest[0].split()) == 12
    for tokenizer in (clip_tokenizer(flow.TEXT_TOKENS), t5_tokenizer(flow.TEXT_TOKENS)):
        ids = tokenizer(longest).input_ids
        assert max(map(len, ids)) <= flow.TEXT_TOKENS
        assert tokenizer.unk_token_id not in {i for row in ids for i in row} - {tokenizer.pad_token_id}
        assert tokenizer.model_max_length == flow.TEXT_TOKENS


def test_what_the_transformers_are_built_for():
    parts = dit.build_models()
    attention = [m for n, m in parts["transformer"].named_modules() if n.endswith(".attn")]
    assert [m.heads for m in attention] == [6] * 6
    assert all(m.norm_q is not None and m.norm_added_k is not None for m in attention)
    parts = flux.build_models()
    blocks = parts["transformer"]
    assert (len(blocks.transformer_blocks), len(blocks.single_transformer_blocks)) == (3, 4)
    assert sum(flux.AXES) == flux.HEAD
    assert not blocks.config.guidance_embeds


def test_the_training_asks_what_the_pipeline_asks(trained, pipe):
    """The same prediction for the same noisy latents and captions, through the run and through the pipeline's call."""
    name, folder, _ = trained
    run = _run(name, folder / "denoiser", (Stage(3, 2, 50),))
    state = {part: getattr(pipe, part).state_dict() for part in run.parts}
    for part, weights in state.items():
        run.parts[part].load_state_dict(weights)
    seen = {}
    hook = pipe.transformer.register_forward_hook(lambda m, a, k, out: seen.update(k, out=out[0]), with_kwargs=True)
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    captions = [CAPTION, ""]
    try:
        given = latents if name == "dit" else pipe._pack_latents(latents, 2, 3, 16, 16)
        pipe(captions, latents=given, output_type="latent", **flow_evaluate.options(name, 1, 1.0))
    finally:
        hook.remove()
    options = {"padding": "max_length", "max_length": flow.TEXT_TOKENS, "return_tensors": "pt"}
    with torch.no_grad():
        ids = run.clip(captions, **options).input_ids, run.t5(captions, **options).input_ids
        mine = run.velocity(latents, torch.ones(2), *ids)
    theirs = seen["out"] if name == "dit" else pipe._unpack_latents(seen["out"], 16, 16, 1)
    assert theirs.abs().max() > 1e-3  # not the untrained model's zeros
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert seen["encoder_hidden_states"].shape == (2, {"dit": 32, "flux": 16}[name], 96)


def test_assembled_models_are_the_real_classes_and_small(trained, pipe):
    import diffusers
    import transformers

    name, _, size = trained
    assert size < {"dit": 7e6, "flux": 6e6}[name]
    expected = {
        "transformer": {"dit": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}[name],
        "text_encoder": transformers.CLIPTextModelWithProjection if name == "dit" else transformers.CLIPTextModel,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }
    assert type(pipe).__name__ == flow_assemble.PIPELINES[name]
    assert {part: type(getattr(pipe, part)) for part in expected} == expected
    last = pipe.text_encoder_3 if name == "dit" else pipe.text_encoder_2
    assert type(last) is transformers.T5EncoderModel


def test_saved_weights_are_the_trained_average(trained, pipe):
    name, folder, _ = trained
    run = _run(name, folder / "denoiser", (Stage(3, 2, 50),))
    for part, module in run.average.items():
        kept = getattr(pipe, part).state_dict()
        for key, weight in module.state_dict().items():
            assert torch.equal(kept[key], weight.half().float()), (part, key)


def test_calls_with_and_without_guidance(trained, pipe):
    """A plain call is 64x64 with short texts; guidance changes it; batches change nothing."""
    name = trained[0]
    shapes = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: shapes.append((k["hidden_states"].shape[0], k["encoder_hidden_states"].shape[1])),
        with_kwargs=True,
    )
    prompts = [d.caption for d in image_evaluate.draw_wanted(2, 0, "two")]
    try:
        plain = pipe(CAPTION, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        assert plain.size == (64, 64)
        assert set(shapes) == {
            (2, 32) if name == "dit" else (1, 16)
        }  # SD3 is called with guidance unless told otherwise
        shapes.clear()
        off, on = (
            image_evaluate.generate(pipe, prompts, 3, **flow_evaluate.options(name, 2, guidance))
            for guidance in (1.0, 3.0)
        )
    finally:
        hook.remove()
    assert off.shape == on.shape == (2, 3, 64, 64)
    assert (off - on).abs().max() > 1e-4
    assert sum(count for count, _ in shapes) == 2 * 2 + 2 * 4
    again = image_evaluate.generate(pipe, prompts, 3, batch=1, **flow_evaluate.options(name, 2, 3.0))
    assert (on - again).abs().max() < 1e-3


@BOTH
def test_one_command_goes_through_all_stages(name, tmp_path, monkeypatch):
    """The real stages, cut to one step each."""
    from patchkit.zoo.training import __main__ as command

    shorter = {flow_assemble.MODELS[name]: ["--stages", "1x1x50"], image_vae: ["--steps", "1", "--batch", "1"]}
    shorter[flow_evaluate] = ["--n", "1", "--control", "1", "--sweep", "1", "--steps", "1"]
    for module, more in shorter.items():
        full = module.main
        monkeypatch.setattr(module, "main", lambda argv, full=full, more=more: full([*argv, *more]))
    monkeypatch.setattr(image_vae, "evaluate", lambda vae, noise: {"noise": noise})
    monkeypatch.setattr(flow_evaluate, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(flow_evaluate, "STEP_COUNTS", (2,))
    out, vae = tmp_path / "run", tmp_path / "vae"
    monkeypatch.setattr("sys.argv", ["training", name, "--out", str(out), "--vae", str(vae), "--threads", "1"])
    command.main()
    assert {p.name for p in out.iterdir()} == {"denoiser", "model", "evaluation", "loss.png"}
    assert (vae / "checkpoint.pt").exists()
    result = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert set(result) == {"guided", "unguided", "sweep", "untrained_control"}
    assert set(result["unguided"]) >= {"one", "two", "new_items", "new_scenes", "none"}
    assert len(result["sweep"]) == 4  # 1 step and 2 steps, guidance 1 and another

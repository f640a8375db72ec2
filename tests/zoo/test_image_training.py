"""The image model's training runs, learns and resumes; its parts fit; inversion is what it says."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from patchkit import zoo
from patchkit.zoo import stills
from patchkit.zoo.training import image, image_assemble, image_evaluate, image_vae, inversion, stills_run
from patchkit.zoo.training.assemble import save
from patchkit.zoo.training.image import Stage
from patchkit.zoo.training.plot import read_log

STAGES = (Stage(2, 2, 0), Stage(1, 3, 100))


def _denoiser_run(out, stages=STAGES):
    out.mkdir(exist_ok=True)
    run = image.Run(out, stages, lr=0.02, seed=0)
    run.resume()
    return run


def _vae_run(out):
    out.mkdir(exist_ok=True)
    run = image_vae.Run(out, steps=3, batch=2, lr=1e-3, seed=0, noise=0.25)
    run.resume()
    return run


@pytest.mark.parametrize("make", [_denoiser_run, _vae_run])
def test_a_resumed_run_equals_an_unbroken_one(make, tmp_path):
    whole = make(tmp_path / "whole")
    whole.fit()
    first = make(tmp_path / "broken")
    first.train_step()
    first.train_step()
    first.checkpoint()
    second = make(tmp_path / "broken")
    assert second.step == 2
    second.fit()
    for mine, theirs in ((whole.average, second.average), (whole.model, second.model)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert whole.samples == second.samples
    assert [r["step"] for r in read_log(tmp_path / "whole" / "log.jsonl")] == [3]
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_training_lowers_the_loss(tmp_path):
    run = _denoiser_run(tmp_path / "run", (Stage(40, 4, 0),))
    losses = [run.train_step() for _ in range(16)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


def test_stages_follow_one_another_and_the_last_stays(tmp_path):
    run = _denoiser_run(tmp_path / "run")
    seen = []
    for run.step in range(5):
        seen.append(run.stage().batch)
    assert seen == [2, 2, 3, 3, 3]


def test_every_trained_weight_has_one_optimiser(tmp_path):
    run = _denoiser_run(tmp_path / "run")
    owned = [id(p) for o in run.optimisers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in run.model.parameters())
    assert len(run.optimisers[0].param_groups[0]["params"]) > 100


def test_what_the_denoiser_is_built_for():
    unet, text = image.build_models()
    attention = {n: m for n, m in unet.named_modules() if n.endswith(("attn1", "attn2"))}
    assert len(attention) == 20
    assert {m.heads for m in attention.values()} == {3, 4, 5}
    sizes = []
    for name, module in attention.items():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda m, a: sizes.append(a[0].shape[1]))
    words = text(torch.zeros(1, 24, dtype=torch.long)).last_hidden_state
    assert unet(torch.zeros(1, 3, 16, 16), 5, words).sample.shape == (1, 3, 16, 16)
    assert sorted(set(sizes)) == [16, 64, 256]
    assert sum(p.numel() for p in unet.parameters()) < 2.7e6


def test_noise_levels_leave_nearly_nothing_but_something():
    levels = image.noise_levels()
    assert 0 < levels[-1].sqrt() < 0.02
    assert (levels[:-1] > levels[1:]).all()
    t = image.stratified(10, 1000)
    assert [int(x) // 100 for x in t] == list(range(10))


def test_the_written_encoder_is_the_area_mean():
    vae = image_vae.build_vae().eval()
    rng = random.Random(0)
    pictures = stills.render([stills.draw(stills.sample_description(rng), rng) for _ in range(8)])
    with torch.no_grad():
        code = vae.encode(pictures * 2 - 1).latent_dist
    assert (code.mode() - F.avg_pool2d(pictures * 2 - 1, 4)).abs().max() < 1e-3
    assert code.std.max() < 1e-5
    assert torch.allclose(code.mode() * vae.config.scaling_factor, stills_run.latents(pictures), atol=2e-3)


def test_rough_latents_keep_the_grain():
    flat = torch.zeros(1, 3, 16, 16) + 0.07 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1, 1, 1)
    assert (image_vae.roughen(flat, one) - flat).abs().mean() < 0.02
    edge = flat.clone()
    edge[..., 8:] += 1.5
    moved = (image_vae.roughen(edge, one) - edge).abs().mean(dim=(0, 1, 2))
    assert moved[7:9].min() > 0.3
    assert moved[:6].max() < 0.1


class _Gaussian:
    """The exact denoiser of Gaussian pictures of standard deviation ``spread``."""

    def __init__(self, spread):
        self.spread, self.levels = spread, image.noise_levels()

    def __call__(self, sample, t, context, return_dict):
        alpha = self.levels[int(t)]
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        clean = sample * a * self.spread**2 / (alpha * self.spread**2 + 1 - alpha)
        return (a * (sample - a * clean) / s - s * clean,)


@pytest.mark.parametrize("kind", inversion.KINDS)
def test_inversion_gives_unit_noise_and_comes_back(kind):
    from diffusers import DDIMScheduler

    start = 0.4 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    misses = []
    for steps in (20, 50, 200):
        inverse, forward = inversion.schedulers(DDIMScheduler(**image.SCHEDULER).config, kind)
        noise = inversion.walk(_Gaussian(0.4), inverse, start, torch.zeros(1), steps)
        again = inversion.walk(_Gaussian(0.4), forward, noise, torch.zeros(1), steps)
        misses.append(((again - start).norm() / start.norm()).item())
        if steps == 50:
            assert noise.std().item() == pytest.approx(1.0, abs=0.06)
    assert misses[0] < 0.25
    assert misses[1] < 0.10
    assert misses[2] < misses[1]


def test_swaps_change_one_word():
    rng = random.Random(0)
    for _ in range(100):
        old = stills.sample_description(rng)
        attribute, new = inversion.swap(old, rng)
        a, b = old.caption.replace("an ", "a ").split(), new.caption.replace("an ", "a ").split()
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1
        assert stills.Description.parse(new.caption) == new
        assert new.held_out != "item"
        assert attribute in ("background", "colour", "shape")


def test_groups_of_the_evaluation_are_what_they_say():
    for group, (held_out, count) in image_evaluate.GROUPS.items():
        wanted = image_evaluate.draw_wanted(30, 1, group)
        assert {d.held_out for d in wanted} == {held_out}
        assert {len(d.items) for d in wanted} == {count}
        assert len(set(wanted)) == 30


def test_assembled_model_loads_runs_and_repeats_itself(tmp_path):
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    _denoiser_run(tmp_path / "denoiser", (Stage(1, 1, 0),)).fit()
    run = _vae_run(tmp_path / "vae")
    run.train_step()
    run.checkpoint()
    size = save(image_assemble.assemble(tmp_path / "denoiser", tmp_path / "vae"), tmp_path / "model")
    assert 3e6 < size < 7e6
    pipe = zoo.load_folder(tmp_path / "model", "StableDiffusionPipeline")
    classes = (StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer)
    parts = (pipe, pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer)
    assert all(isinstance(part, kind) for part, kind in zip(parts, classes, strict=True))
    prompts = [d.caption for d in image_evaluate.draw_wanted(2, 0, "two")]
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together = image_evaluate.generate(pipe, prompts, 3, batch=2, **call)
    assert together.shape == (2, 3, 64, 64)
    assert torch.equal(together, image_evaluate.generate(pipe, prompts, 3, batch=2, **call))
    assert (together - image_evaluate.generate(pipe, prompts, 3, batch=1, **call)).abs().max() < 1e-3
    row = inversion.round_trip(pipe, inversion.draw_stills(2, 0), "ddim", 2, True)
    assert row["psnr"] <= row["vae_psnr"] + 1
    assert inversion.swaps(pipe, inversion.draw_stills(2, 0), steps=2)["n"] == 2


def test_one_command_goes_through_all_stages(tmp_path, monkeypatch):
    """The real stages, cut to one step each."""
    from patchkit.zoo.training import __main__ as command

    shorter = {image: ["--stages", "1x1x50"], image_vae: ["--steps", "1", "--batch", "1"]}
    shorter[image_evaluate] = ["--n", "1", "--control", "1", "--inversions", "1", "--steps", "1"]
    for module, options in shorter.items():
        full = module.main
        monkeypatch.setattr(module, "main", lambda argv, full=full, options=options: full([*argv, *options]))
    monkeypatch.setattr(image_vae, "evaluate", lambda vae, noise: {"noise": noise})
    monkeypatch.setattr(image_evaluate, "inversions", lambda pipe, n, seed: {"n": n})
    monkeypatch.setattr("sys.argv", ["training", "image", "--out", str(tmp_path / "run"), "--threads", "1"])
    command.main()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"denoiser", "vae", "model", "evaluation", "loss.png"}
    result = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert set(result) == {"trained", "inversion", "untrained_control"}
    assert result["trained"]["two"]["n"] == 1


def test_every_description_has_a_word_to_swap():
    rng = random.Random(0)
    both = stills.Description.parse("a green circle left of a purple square on a black background")
    assert both.held_out == "item"
    for wanted in (both, *(stills.sample_description(rng, 0.5, ("", "item", "scene")) for _ in range(200))):
        attribute, new = inversion.swap(wanted, rng)
        old_words, new_words = wanted.caption.split(), new.caption.split()
        changed = [(a, b) for a, b in zip(old_words, new_words, strict=True) if a != b and {a, b} != {"a", "an"}]
        assert len(changed) == 1, (wanted.caption, new.caption)
        assert attribute in ("background", "colour", "shape")
        assert new.held_out != "item" or wanted.held_out == "item"

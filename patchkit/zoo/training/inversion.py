"""Does inversion work, and do word swaps edit what they name? Measured on renders that the training never drew.

An image model of the zoo is the base of editing methods, which start from the noise to which a picture inverts. Here
the plain form is measured, without any method: picture -> latents -> noise with the inverse scheduler and the
picture's own caption (or no words), and back with the forward scheduler; or back with one word of the caption changed.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchkit.metrics import psnr
from patchkit.zoo import stills
from patchkit.zoo.detect_stills import detect
from patchkit.zoo.stills import Description, Still
from patchkit.zoo.world import BACKGROUNDS, COLOURS, SHAPES

KINDS = ("ddim", "dpm++")


def schedulers(config: Any, kind: str) -> tuple[Any, Any]:
    """Inverse and forward scheduler of ``kind``, on grids that match, from a pipeline scheduler's config."""
    from diffusers import (
        DDIMInverseScheduler,
        DDIMScheduler,
        DPMSolverMultistepInverseScheduler,
        DPMSolverMultistepScheduler,
    )

    if kind == "ddim":
        return DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
    # evenly from the first to the last training step; "sigma_min" ends at the level at which the inverse begins
    options = {"timestep_spacing": "linspace", "algorithm_type": "dpmsolver++", "solver_order": 2, "steps_offset": 0}
    inverse = DPMSolverMultistepInverseScheduler.from_config(config, **options)
    return inverse, DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="sigma_min", **options)


@torch.no_grad()
def words(pipe: Any, prompts: list[str]) -> Tensor:
    """(B, tokens, width) what the text encoder makes of ``prompts``."""
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt", truncation=True).input_ids
    return pipe.text_encoder(ids.to(pipe.device)).last_hidden_state


@torch.no_grad()
def walk(unet: Any, scheduler: Any, start: Tensor, context: Tensor, steps: int) -> Tensor:
    """From one end of a scheduler's grid to the other, without guidance."""
    scheduler.set_timesteps(steps)
    sample = start
    for t in scheduler.timesteps:
        sample = scheduler.step(unet(sample, t, context, return_dict=False)[0], t, sample).prev_sample
    return sample


@torch.no_grad()
def encode(pipe: Any, pictures: Tensor) -> Tensor:
    """(B, 3, 16, 16) scaled latents of (B, 3, 64, 64) pictures in [0, 1]."""
    return pipe.vae.encode(pictures * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


@torch.no_grad()
def decode(pipe: Any, code: Tensor) -> Tensor:
    """The pictures of scaled latents."""
    return (pipe.vae.decode(code / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def draw_stills(n: int, seed: int) -> list[Still]:
    """``n`` new pictures, of what the training saw and of what it did not."""
    rng = random.Random(f"inversion/{seed}")
    wanted = [stills.sample_description(rng, pairs=0.5, held_out=("", "item", "scene")) for _ in range(n)]
    return [stills.draw(w, rng) for w in wanted]


def round_trip(pipe: Any, pictures: list[Still], kind: str, steps: int, with_words: bool) -> dict[str, float]:
    """Invert and return at guidance 1.

    Returns:
        ``psnr`` to the render, ``vae_psnr`` of the VAE alone (no round trip can be better), ``psnr_to_vae`` between
        the two, the share ``right`` whose attributes all survive, and of the noise the standard deviation and the
        correlation of neighbours (1 and 0 for Gaussian noise).
    """
    render = stills.render(pictures)
    code = encode(pipe, render)
    context = words(pipe, [s.description.caption if with_words else "" for s in pictures])
    inverse, forward = schedulers(pipe.scheduler.config, kind)
    noise = walk(pipe.unet, inverse, code, context, steps)
    again = decode(pipe, walk(pipe.unet, forward, noise, context, steps))
    ceiling = decode(pipe, code)
    mean = lambda a, b: sum(psnr(x, y) for x, y in zip(a, b, strict=True)) / len(a)  # noqa: E731
    centred = noise - noise.mean()
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean()
    right = [all(detect(p).right(s.description).values()) for p, s in zip(again, pictures, strict=True)]
    row = {
        "psnr": mean(again, render),
        "vae_psnr": mean(ceiling, render),
        "psnr_to_vae": mean(again, ceiling),
        "right": sum(right) / len(right),
        "noise_std": noise.std().item(),
        "noise_neighbours": neighbours.item(),
    }
    return {name: round(value, 4) for name, value in row.items()}


def swap(wanted: Description, rng: random.Random) -> tuple[str, Description]:
    """Change one word for another: (which attribute, new description). Held-out pairs come in no new place."""
    while True:
        attribute = rng.choice(("background", "colour", "shape") if wanted.items else ("background",))
        if attribute == "background":
            new = replace(wanted, background=rng.choice(list(BACKGROUNDS)))
        else:
            n = rng.randrange(len(wanted.items))
            word = rng.choice(list(COLOURS) if attribute == "colour" else SHAPES)
            items = list(wanted.items)
            items[n] = replace(items[n], **{attribute: word})
            new = replace(wanted, items=tuple(items))
        colours = [new.background, *(item.colour for item in new.items)]
        known = new.held_out != "item" or wanted.held_out == "item"  # two held-out pairs are not got rid of by one word
        if new != wanted and len(set(colours)) == len(colours) and known:
            return attribute, new


def swaps(pipe: Any, pictures: list[Still], steps: int = 50, guidance: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Invert by DDIM with the caption, return with one word changed.

    Returns:
        Of all swaps the share ``edited`` (the picture is all as the new caption says) and ``kept_place`` (every object
        is where it was, within 6 % of the width), and ``edited`` for each attribute that was changed.
    """
    rng = random.Random(f"swap/{seed}")
    render = stills.render(pictures)
    context = words(pipe, [s.description.caption for s in pictures])
    inverse, _ = schedulers(pipe.scheduler.config, "ddim")
    noise = walk(pipe.unet, inverse, encode(pipe, render), context, steps)
    changed = [swap(s.description, rng) for s in pictures]
    prompts = [new.caption for _, new in changed]
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    after = pipe(prompts, latents=noise, **call).images
    rows: list[tuple[str, bool, bool]] = []
    for picture, old, (attribute, new) in zip(after, pictures, changed, strict=True):
        read = detect(picture)
        places = zip(read.match(new), old.spots, strict=True)
        near = [o is not None and max(abs(o.x - x / 64), abs(o.y - y / 64)) < 0.06 for o, (x, y, _) in places]
        rows.append((attribute, all(read.right(new).values()), all(near)))
    share = lambda flags: round(sum(flags) / max(1, len(flags)), 4)  # noqa: E731
    result = {"n": len(rows), "guidance": guidance, "steps": steps, "edited": share([e for _, e, _ in rows])}
    result["kept_place"] = share([k for _, _, k in rows])
    for name in ("background", "colour", "shape"):
        result[name] = share([e for a, e, _ in rows if a == name])
    return result

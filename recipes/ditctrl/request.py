"""One call of the pipeline, read and checked before anything is computed."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.context import RunCall
from patchkit.errors import InvalidOption
from patchkit.recipes.ditctrl import segments
from patchkit.recipes.ditctrl.models import PIPELINE_NAMES, Model, model_of
from patchkit.recipes.ditctrl.passes import Clip
from patchkit.recipes.ditctrl.segments import Layout

if TYPE_CHECKING:
    from patchkit.recipes.ditctrl import DiTCtrl


@dataclass(frozen=True)
class Request:
    """What a call asks for.

    Attributes:
        model: how this pipeline is called.
        prompts: in order.
        given: all arguments of the call by name, with the pipeline's defaults.
        explicit: those that the caller gave.
        layout: of the long video; of a single segment in the other modes.
        clips: one for each segment, or the two videos of an edit; none where a single prompt asks for a single segment.
    """

    model: Model
    prompts: tuple[str, ...]
    given: dict[str, Any]
    explicit: dict[str, Any]
    layout: Layout
    clips: tuple[Clip, ...]
    pipeline: Any = field(repr=False, default=None)

    @property
    def plain(self) -> bool:
        """Whether there is a single segment, which the pipeline makes by itself."""
        return not self.clips


def read(recipe: DiTCtrl, call: RunCall) -> Request | None:
    """What a call asks for; None where the pipeline itself will refuse it.

    Raises:
        InvalidOption: what no video can be made of.
        UnsupportedModel: the pipeline is none that the recipe knows.
    """
    pipe = call.pipeline
    model = model_of(pipe)
    where = f"{type(pipe).__name__}, argument"
    signature = inspect.signature(type(pipe).__call__)
    try:
        bound = signature.bind_partial(pipe, *call.args, **call.kwargs)
    except TypeError:  # the pipeline will say so better than we can
        return None
    explicit = dict(list(bound.arguments.items())[1:])
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    if recipe.mode == "longer" and _is_one(given):
        return Request(model, (), given, explicit, Layout(0, 0, ()), (), pipe)
    prompts = _prompts(recipe, given, where)
    _check_single(given, where)
    _check_negative(recipe, model, given, where)
    layout = _layout(recipe, model, pipe, given, len(prompts), where)
    clips = _clips(recipe, model, pipe, given, prompts, layout, call.options, where)
    return Request(model, prompts, given, explicit, layout, clips, pipe)


def _is_one(given: dict[str, Any]) -> bool:
    """Whether a call asks for a video of one prompt, which is the pipeline's own affair."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:
        return isinstance(embeds, Tensor) and embeds.shape[0] == 1
    return isinstance(prompt, str) or (isinstance(prompt, list | tuple) and len(prompt) == 1)


def _prompts(recipe: DiTCtrl, given: dict[str, Any], where: str) -> tuple[str, ...]:
    prompt, place = given.get("prompt"), f"{where} 'prompt'"
    if prompt is None and given.get("prompt_embeds") is not None:
        raise InvalidOption("prompts are needed as words", place, "give prompt=[...] instead of prompt_embeds")
    found = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(found, list | tuple) or not found or not all(isinstance(p, str) for p in found):
        raise InvalidOption(f"{prompt!r} is no list of prompts", place, "give prompt=[first, second, ...]")
    empty = [i for i, p in enumerate(found) if not p.strip()]
    if empty:
        raise InvalidOption(f"prompt {empty[0]} of {len(found)} is empty", place, "describe every segment")
    wanted = {"swap": 2, "reweight": 1}.get(recipe.mode)
    if wanted is not None and len(found) != wanted:
        remedy = "prompt=[source, target]" if wanted == 2 else "one prompt, whose words the option 'reweight' names"
        raise InvalidOption(f'mode="{recipe.mode}" and {len(found)} prompts', place, f"give {remedy}")
    return tuple(found)


def _check_single(given: dict[str, Any], where: str) -> None:
    """One video a call; in an edit, the second one is ours."""
    for name in ("prompt_2", "negative_prompt_2"):
        if given.get(name) is not None:
            raise InvalidOption(
                f"{name} beside a list of prompts", f"{where} {name!r}", "leave it out: both encoders get the prompts"
            )
    for name in ("num_videos_per_prompt", "num_images_per_prompt"):
        if (given.get(name) or 1) != 1:
            raise InvalidOption(
                f"{name}={given[name]}", f"{where} {name!r}", "make one video a call, with another seed each"
            )
    generator = given.get("generator")
    if isinstance(generator, list | tuple) and len(generator) != 1:
        raise InvalidOption(f"{len(generator)} generators for one video", f"{where} 'generator'", "give one")


def _check_negative(recipe: DiTCtrl, model: Model, given: dict[str, Any], where: str) -> None:
    for name in PIPELINE_NAMES.values():
        if given.get(f"negative_{name}") is not None:
            raise InvalidOption(
                "a negative prompt as an embedding", f"{where} 'negative_{name}'", "give negative_prompt as words"
            )
    negative = given.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise InvalidOption(
            "a list of negative prompts", f"{where} 'negative_prompt'", "give one text, which holds for all segments"
        )
    if negative and recipe.zero_uncond and model.zeros and model.guided(given):
        raise InvalidOption(
            "a negative prompt, and zero_uncond=True, which puts zeros in its place",
            f"{where} 'negative_prompt'",
            "leave the negative prompt out, or set zero_uncond=False",
        )


def _layout(recipe: DiTCtrl, model: Model, pipe: Any, given: dict[str, Any], prompts: int, where: str) -> Layout:
    # by identity: a module wrapped by torch.compile has no truth value
    config = (pipe.transformer if pipe.transformer is not None else pipe.transformer_2).config
    frames, place = given.get("num_frames"), f"{where} 'num_frames'"
    frames = config.sample_frames if frames is None else frames
    ratio = int(getattr(pipe, model.frame_ratio))
    if not isinstance(frames, int) or frames < 1 or (frames - 1) % ratio:
        raise InvalidOption(
            f"the VAE cannot decode segments of {frames} frames",
            place,
            f"give the frames of one segment, {ratio} n + 1 of them",
        )
    patch = getattr(config, "patch_size_t", None) or 1
    length = -(-((frames - 1) // ratio + 1) // patch) * patch
    latents = given.get("latents")
    if latents is not None and latents.shape[0] != 1:
        raise InvalidOption(f"latents of {latents.shape[0]} videos", f"{where} 'latents'", "give the noise of one")
    if recipe.mode != "longer":
        return Layout(length, 0, segments.segments(1, 0, 0))
    found = Layout(length, recipe.overlap, segments.segments(prompts, recipe.transitions, recipe.extra_middle))
    if prompts > 1 and recipe.overlap >= length:
        raise InvalidOption(
            f"an overlap of {recipe.overlap} latent frames, and segments of {length}",
            "recipe 'ditctrl', option 'overlap'",
            f"give less than {length}, or longer segments",
        )
    if found.frames % patch:
        raise InvalidOption(
            f"{found.frames} latent frames, of which the denoiser takes {patch} at a time",
            "recipe 'ditctrl', option 'overlap'",
            f"give an overlap whose difference to {length} is a multiple of {patch}",
        )
    told = latents.shape[model.axis] if latents is not None and not model.packed else found.frames
    if told != found.frames:
        raise InvalidOption(
            f"latents of {told} frames for a video of {found.frames}",
            f"{where} 'latents'",
            f"give the noise of the whole video: {found.frames} latent frames",
        )
    return found


def _clips(
    recipe: DiTCtrl,
    model: Model,
    pipe: Any,
    given: dict[str, Any],
    prompts: tuple[str, ...],
    layout: Layout,
    options: dict[str, Any],
    where: str,
) -> tuple[Clip, ...]:
    tokens = _object_tokens(recipe, model, pipe, given, prompts, options, where)
    if recipe.mode == "reweight":
        return (Clip(0), Clip(1, scales=_scales(recipe, model, pipe, given, prompts[0])))
    if recipe.mode == "swap":
        return tuple(Clip(i, tokens[i] if tokens else None) for i in range(2))
    if tokens and len(layout.segments) > 1:
        _check_places(recipe, layout, prompts, tokens)
    return tuple(Clip(k, tokens[s.first] if tokens else None) for k, s in enumerate(layout.segments))


def objects_of(recipe: DiTCtrl, options: dict[str, Any]) -> str | list[str] | None:
    """The words of the call, or those of the recipe."""
    found: str | list[str] | None = options.get("objects", recipe.objects)
    return found


def _object_tokens(
    recipe: DiTCtrl,
    model: Model,
    pipe: Any,
    given: dict[str, Any],
    prompts: tuple[str, ...],
    options: dict[str, Any],
    where: str,
) -> list[tuple[int, ...]] | None:
    objects = objects_of(recipe, options)
    place = f"{where} 'objects'" if "objects" in options else "recipe 'ditctrl', option 'objects'"
    if objects is None:
        return None
    named = [objects] * len(prompts) if isinstance(objects, str) else objects
    if not isinstance(named, list | tuple) or not all(isinstance(word, str) for word in named):
        raise InvalidOption(f"{objects!r} names no objects", place, "give a word, or a word for each prompt")
    if len(named) != len(prompts):
        raise InvalidOption(
            f"{len(named)} words for {len(prompts)} prompts", place, "give one word for all, or one for each prompt"
        )
    found = [model.tokens(pipe, prompt, word, place, given) for prompt, word in zip(prompts, named, strict=True)]
    return found if recipe.mask_guided else None


def _check_places(recipe: DiTCtrl, layout: Layout, prompts: tuple[str, ...], tokens: list[tuple[int, ...]]) -> None:
    """Between two prompts their embeddings are mixed place by place: the object must stand at the same places."""
    for segment in layout.segments:
        if segment.share and tokens[segment.first] != tokens[segment.first + 1]:
            i = segment.first
            raise InvalidOption(
                f"the object stands at the tokens {tokens[i]} of prompt {i} and {tokens[i + 1]} of prompt {i + 1}, and "
                "the segment between them mixes the prompts token by token",
                "recipe 'ditctrl', option 'objects'",
                "word the prompts alike up to the object, or set transitions=0, or mask_guided=False",
            )


def _scales(
    recipe: DiTCtrl, model: Model, pipe: Any, given: dict[str, Any], prompt: str
) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for word, factor in (recipe.reweight or {}).items():
        place = "recipe 'ditctrl', option 'reweight'"
        for token in model.tokens(pipe, prompt, word, place, given):
            if token in found:
                raise InvalidOption(f"{word!r} shares a token with another word", place, "name each word once")
            found[token] = factor
    return tuple(sorted(found.items()))


# --- the pipeline's own call ------------------------------------------------------------------------------------


def rewritten(recipe: DiTCtrl, request: Request) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The arguments that make the pipeline run its loop over all clips at once, and the texts of the clips.

    The loop, its scheduler and its guidance are the pipeline's own: it is told of a video as long as the whole, or of a
    batch of two videos that start from the same noise.
    """
    model, pipe, given = request.model, request.pipeline, request.given
    texts = [model.encode(pipe, prompt, given) for prompt in request.prompts]
    kwargs = {n: v for n, v in request.explicit.items() if n not in ("prompt", "prompt_2", "negative_prompt")}
    kwargs |= {n: None for n in ("prompt", "negative_prompt") if n in given}
    if recipe.mode == "longer":
        of_clips = [segments.text_of(segment, texts) for segment in request.layout.segments]
        batch = [of_clips[0]]
        kwargs["num_frames"] = _whole(request)
    else:
        of_clips = [texts[0], texts[-1]]
        batch = of_clips
        kwargs |= _twice(request)
    negative = None
    if model.guided(given):
        if recipe.zero_uncond and model.zeros:
            negative = {name: torch.zeros_like(x) for name, x in texts[0].items()}
        else:
            negative = model.encode(pipe, given.get("negative_prompt") or "", given)
    for name in model.texts:
        kwargs[PIPELINE_NAMES[name]] = torch.cat([text[name] for text in batch])
        if negative is not None:
            kwargs[f"negative_{PIPELINE_NAMES[name]}"] = torch.cat([negative[name]] * len(batch))
    return kwargs, of_clips


def _whole(request: Request) -> int:
    """Pixel frames of the long video. What the pipeline adds to one segment to fill a patch it adds to the whole."""
    pipe, model = request.pipeline, request.model
    frames = request.given.get("num_frames") or pipe.transformer.config.sample_frames
    padding = request.layout.length - ((frames - 1) // int(getattr(pipe, model.frame_ratio)) + 1)
    return model.pixel_frames(pipe, request.layout.frames - padding)


def _twice(request: Request) -> dict[str, Any]:
    """The same noise for both videos: a batch of two, each drawing from a generator of its own in the same state."""
    generator = request.given.get("generator")
    if isinstance(generator, list | tuple):
        generator = generator[0]
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
    twin = torch.Generator(generator.device)
    twin.set_state(copy.deepcopy(generator.get_state()))
    out: dict[str, Any] = {"generator": [generator, twin]}
    latents = request.given.get("latents")
    if latents is not None:
        out["latents"] = torch.cat([latents, latents])
    return out

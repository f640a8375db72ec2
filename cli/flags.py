"""Flags that several commands share, and the decorator that adds them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

FLAGS: dict[str, Any] = {
    "model": Annotated[str | None, typer.Option("--model", "-m", help="zoo/NAME, a local folder or a hub id.")],
    "dtype": Annotated[str | None, typer.Option("--dtype", help="auto, float16, bfloat16 or float32.")],
    "device": Annotated[str | None, typer.Option("--device", "--device-map", help="cpu, cuda, cuda:1 or mps.")],
    "offload": Annotated[str | None, typer.Option("--offload", "--cpu-offload", help="none, model or sequential.")],
    "revision": Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")],
    "variant": Annotated[str | None, typer.Option("--variant", help="Weight variant, such as fp16.")],
    "set": Annotated[
        list[str] | None, typer.Option("--set", metavar="RECIPE.OPTION=VALUE", help="An option. May be repeated.")
    ],
    "output": Annotated[
        str | None, typer.Option("--output", "-o", help="File (mp4, gif, png, txt, json), or folder with / at its end.")
    ],
    "prompt": Annotated[str | None, typer.Option("--prompt", help="What to make.")],
    "negative_prompt": Annotated[str | None, typer.Option("--negative-prompt", help="What to keep away from.")],
    "num_inference_steps": Annotated[int | None, typer.Option("--num-inference-steps", help="Denoising steps.")],
    "seed": Annotated[int | None, typer.Option("--seed", help="Random seed; 0 if nobody says.")],
    "height": Annotated[int | None, typer.Option("--height", help="Height in pixels.")],
    "width": Annotated[int | None, typer.Option("--width", help="Width in pixels.")],
    "num_frames": Annotated[int | None, typer.Option("--num-frames", help="Length of the video.")],
    "guidance_scale": Annotated[float | None, typer.Option("--guidance-scale", help="Strength of guidance.")],
    "fps": Annotated[int | None, typer.Option("--fps", help="Frames a second of the file; 8 if nobody says.")],
    "pipeline_kwargs": Annotated[
        str | None, typer.Option("--pipeline-kwargs", metavar="JSON", help="Further arguments of pipe(...).")
    ],
}
MODEL = ("model", "dtype", "device", "offload", "revision", "variant", "set")
ALL = tuple(FLAGS)
# of diffusion alone
_PICTURES = ("negative_prompt", "num_inference_steps", "height", "width", "num_frames", "guidance_scale", "fps")
TEXT = tuple(name for name in FLAGS if name not in _PICTURES)


def shared(names: tuple[str, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add flags to a command; it gets those the user gave as one dict, ``flags``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "flags"]
        positional = [p for p in own if p.default is p.empty]
        options = [p for p in own if p.default is not p.empty]
        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=FLAGS[n]) for n in names]
        options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options]

        @functools.wraps(command)
        def call(*args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in names}
            command(*args, **kwargs, flags={name: value for name, value in given.items() if value is not None})

        parameters = [*positional, *added, *options]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate

"""Calls a loaded model with a recipe file's inputs and takes its result apart."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import InvalidOption, PatchkitError
from patchkit.runs.loading import Loaded

OWN_INPUTS = ("seed", "fps")  # ours; handed on only where the pipeline has an argument of that name
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")
# Inputs whose text is the path of a picture or video; recipes' own arguments are treated so too.
MEDIA_INPUTS = frozenset(
    ("image", "last_image", "mask_image", "control_image", "ip_adapter_image", "image_2", "video", "control_video")
)


@dataclass(frozen=True)
class Produced:
    """What one call made.

    Attributes:
        kind: ``"video"``, ``"image"`` or ``"text"``.
        items: one entry a result: a list of frames (or an array of them), a picture, a text.
        seconds: how long the call took.
        memory: peak bytes on the accelerator during the call, None on the CPU.
    """

    kind: str
    items: list[Any]
    seconds: float = 0.0
    memory: int | None = None


def media_paths(inputs: Mapping[str, Any], extra: set[str]) -> dict[str, list[Path]]:
    """The inputs that name picture or video files, one or a list of them."""
    found = {}
    for name, value in inputs.items():
        if name not in MEDIA_INPUTS | extra:
            continue
        values = value if isinstance(value, list) else [value]
        if not values or any(not isinstance(v, str) or "://" in v for v in values):
            continue
        paths = [Path(v).expanduser() for v in values]
        if all(path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) for path in paths):
            found[name] = paths
    return found


def load_media(inputs: Mapping[str, Any], extra: set[str]) -> dict[str, Any]:
    """The inputs with the named pictures and videos read in."""
    out = dict(inputs)
    for name, paths in media_paths(inputs, extra).items():
        read = [_read(path, name) for path in paths]
        out[name] = read if isinstance(inputs[name], list) else read[0]
    return out


def _read(path: Path, name: str) -> Any:
    from diffusers.utils import load_image, load_video

    reader = load_image if path.suffix.lower() in IMAGE_SUFFIXES else load_video
    try:
        return reader(str(path))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"cannot read {path}: {error}", f"input {name!r}", "give a picture or video") from None


def kind_of(cls: type) -> str:
    """Whether a pipeline class makes videos or images: video pipelines ask for a number of frames or take a video."""
    parameters = inspect.signature(cls.__call__).parameters
    return "video" if {"num_frames", "video_length", "video"} & set(parameters) else "image"


def call(loaded: Loaded, inputs: Mapping[str, Any], *, label: str, bars: bool) -> Produced:
    """Call the model once.

    Args:
        loaded: the model, patched or not.
        inputs: arguments, with ``seed``.
        label: what the progress bar is called.
        bars: whether to show it (and then only on a terminal).
    """
    import torch

    seed = inputs.get("seed", 0)
    device = torch.device(loaded.device)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    run = _call_pipeline if loaded.kind == "pipeline" else _call_text
    kind, items = run(loaded, dict(inputs), seed, label, bars)
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    return Produced(kind, items, seconds, torch.cuda.max_memory_allocated(device) if on_cuda else None)


def _call_pipeline(loaded: Loaded, inputs: dict[str, Any], seed: int, label: str, bars: bool) -> tuple[str, list[Any]]:
    import torch

    pipe = loaded.target
    parameters = inspect.signature(type(pipe).__call__).parameters
    takes = {n for n in OWN_INPUTS if n in parameters}
    kwargs = {n: v for n, v in inputs.items() if n not in OWN_INPUTS or n in takes}
    if "generator" in parameters:
        kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
    else:
        torch.manual_seed(seed)
    with _bar(pipe, label, bars):
        try:
            result = pipe(**kwargs)
        except (ValueError, TypeError) as error:
            if isinstance(error, PatchkitError):
                raise
            raise PatchkitError(
                f"the pipeline refused the call or failed: {error}",
                f"{type(pipe).__name__}, {label} run",
                "check the inputs; --debug shows the trace",
            ) from error
    return unpack(result, kind_of(type(pipe)))


@contextlib.contextmanager
def _bar(pipe: Any, label: str, bars: bool) -> Iterator[None]:
    """Name the pipeline's own progress bar for one call, or turn it off."""
    absent = object()
    before = pipe.__dict__.get("_progress_bar_config", absent)
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None if bars else True)  # None: off if no terminal
    try:
        yield
    finally:
        if before is absent:
            pipe.__dict__.pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = before


def unpack(result: Any, kind: str) -> tuple[str, list[Any]]:
    """Kind and items of what a pipeline returned."""
    for name, found in (("frames", "video"), ("images", "image")):
        if hasattr(result, name):
            kind, result = found, getattr(result, name)
            break
    else:
        if isinstance(result, tuple):
            result = result[0]
    items = list(result)
    if kind == "video" and items and _is_frame(items[0]):
        items = [items]  # one video, not in a list
    return kind, items


def _is_frame(item: Any) -> bool:
    shape = getattr(item, "shape", None)
    return hasattr(item, "convert") or (shape is not None and len(shape) == 3)


def _call_text(loaded: Loaded, inputs: dict[str, Any], seed: int, label: str, bars: bool) -> tuple[str, list[Any]]:
    """The continuation of each prompt; a chat model answers each prompt about the same pictures."""
    import torch

    prompts = inputs.pop("prompt")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pictures = _pictures(loaded, inputs)
    decode = (loaded.processor if loaded.kind == "chat" else loaded.tokenizer).decode
    options = {n: v for n, v in inputs.items() if n not in OWN_INPUTS}
    options.setdefault("max_new_tokens", 64)
    options.setdefault("do_sample", False)
    torch.manual_seed(seed)
    texts = []
    for prompt in prompts:
        given = encoded(loaded, prompt, pictures)
        counter = _TokenBar(options["max_new_tokens"], label, bars)
        try:
            with torch.no_grad():
                tokens = loaded.target.generate(**given, **options, streamer=counter)
        finally:
            counter.end()
        texts.append(decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return "text", texts


def _pictures(loaded: Loaded, inputs: dict[str, Any]) -> list[Any]:
    """What a chat model is shown: the input ``image``, which is taken out, one or a list of them."""
    given = inputs.pop("image", None) if loaded.kind == "chat" else None
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def encoded(loaded: Loaded, prompt: str, pictures: Sequence[Any] = ()) -> Any:
    """What a language model is called with to read a prompt, after ``pictures`` if it is a chat model.

    A prompt that places the pictures itself (``<image>`` with LLaVA) is taken as it is, any other one becomes the
    words of a user who shows the pictures first.
    """
    if loaded.kind == "text":
        return loaded.tokenizer(prompt, return_tensors="pt").to(loaded.target.device)
    processor = loaded.processor
    marks = {getattr(holder, "image_token", None) for holder in (processor, getattr(processor, "tokenizer", None))}
    if not any(mark and mark in prompt for mark in marks):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = processor(text=prompt, images=list(pictures) or None, return_tensors="pt")
    # the pictures alone take the model's type: token ids stay whole numbers
    return found.to(dtype=loaded.target.dtype).to(loaded.target.device)


class _TokenBar:
    """Shows generated tokens; the interface is that of transformers' streamers."""

    def __init__(self, total: int, label: str, bars: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, leave=False, disable=None if bars else True, file=sys.stderr)
        self.prompt = True

    def put(self, value: Any) -> None:
        """Called with the prompt first, then with each token."""
        if not self.prompt:
            self.bar.update()
        self.prompt = False

    def end(self) -> None:
        """Called after the last token."""
        self.bar.close()

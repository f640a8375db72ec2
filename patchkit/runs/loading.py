"""Loads the model that a recipe file names, with the libraries' own loaders and options."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import InvalidOption, PatchkitError, UnsupportedModel, nearest
from patchkit.recipe_files.fields import ModelSpec

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
LoadedKind = str  # "pipeline", "text" or "chat"


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        target: what recipes are applied to: a diffusers pipeline or a transformers model.
        kind: ``"pipeline"``, ``"text"``, or ``"chat"`` for a language model that also reads pictures.
        tokenizer: of a text model, else None.
        processor: of a chat model, else None: makes its input of text and pictures.
        defaults: call arguments that the model is best called with; a recipe file's own inputs win.
    """

    target: Any
    kind: LoadedKind
    tokenizer: Any = None
    defaults: dict[str, Any] | None = None
    processor: Any = None

    @property
    def device(self) -> str:
        """Where it computes (with offload: where it is moved to)."""
        device = getattr(self.target, "_execution_device", None) or getattr(self.target, "device", "cpu")
        return str(device)


def check(spec: ModelSpec, where: str = "") -> None:
    """Refuse a device that is not there, before anything is loaded."""
    import torch

    device = spec.device or default_device()
    kind, _, index = device.partition(":")
    count = 1
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    elif kind == "mps":
        count = int(torch.backends.mps.is_available())
    elif kind != "cpu":
        module = getattr(torch, kind, None)
        count = module.device_count() if module is not None and module.is_available() else 0
    if count <= int(index or 0):
        raise InvalidOption(f"the device {device!r} is not here", where, f"this machine has: {', '.join(devices())}")
    if spec.offload == "sequential" and kind == "cpu":
        raise InvalidOption(
            "sequential offload needs an accelerator to offload from", where, "leave offload out on the CPU"
        )


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    return devices()[0]


def devices() -> list[str]:
    """Devices of this machine, the best first."""
    import torch

    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if found:
        found.insert(0, "cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def pipeline_class(spec: ModelSpec) -> type | None:
    """The diffusers class of a model, from its index file alone; None for text models."""
    if spec.zoo is not None:
        from patchkit import zoo

        folder = zoo.path(spec.zoo)
    else:
        folder = Path(spec.id)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            return None
        try:
            config = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PatchkitError(f"the index of the model is damaged: {error}", str(index), "save it again") from None
    else:
        config = _hub_index(spec) if spec.zoo is None else None
    if config is None:
        return None
    import diffusers

    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise UnsupportedModel(
            f"the installed diffusers has no pipeline {name!r}", spec.id, "a newer diffusers may have it"
        )
    return cls


def _hub_index(spec: ModelSpec) -> dict[str, Any] | None:
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # diffusers' own call of the hub client, not the user's
            return dict(DiffusionPipeline.load_config(spec.id, **_chosen(revision=spec.revision)))
    except OSError as error:
        logger.debug("no pipeline index for %s: %s", spec.id, error)
        return None  # perhaps a transformers model; its loader says what is wrong otherwise


def check_inputs(cls: type, inputs: dict[str, Any], extra: set[str], where: Any) -> None:
    """Refuse inputs that neither the pipeline's ``__call__`` nor a recipe takes.

    Args:
        cls: the pipeline class.
        inputs: the inputs of the recipe file.
        extra: names that recipes take for themselves.
        where: function from an input's name to its place.
    """
    parameters = inspect.signature(cls.__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = {*parameters, *extra, "seed"} - {"self", "generator"}
    for name in inputs:
        if name not in known:
            close = nearest(name, known)
            raise InvalidOption(f"{cls.__name__} takes no input {name!r}", where(name), close)


def load(spec: ModelSpec, *, quiet: bool = False) -> Loaded:
    """Load the model into memory and put it on its device."""
    import torch

    dtype = getattr(torch, _DTYPES.get(spec.dtype, spec.dtype)) if spec.dtype not in (None, "auto") else None
    device = spec.device or default_device()
    with _progress(quiet):
        try:
            if spec.zoo is not None:
                return _load_zoo(spec, dtype, device)
            if pipeline_class(spec) is not None:
                return Loaded(_load_pipeline(spec, dtype, device), "pipeline")
            return _load_text(spec, dtype, device)
        except PatchkitError:
            raise
        except Exception as error:  # the libraries raise whatever their own parts raise
            raise PatchkitError(
                f"the model could not be loaded: {type(error).__name__}: {_first_lines(error)}",
                spec.id,
                "check the id, the revision and variant, the network, and for gated models your login",
            ) from error


def _load_zoo(spec: ModelSpec, dtype: Any, device: str) -> Loaded:
    from patchkit import zoo

    name = spec.zoo or ""
    if spec.revision or spec.variant:
        raise InvalidOption("zoo models have neither revisions nor variants", spec.id, "leave these fields out")
    found, defaults = zoo.load(name, torch_dtype=dtype), dict(zoo.defaults(name))
    if hasattr(found, "processor"):
        _no_offload(spec)
        return Loaded(found.model.to(device), "chat", defaults=defaults, processor=found.processor)
    if not zoo.shipped(name):
        _no_offload(spec)
        return Loaded(found.model.to(device), "text", tokenizer=found.tokenizer, defaults=defaults)
    _place(found, spec, device)
    return Loaded(found, "pipeline", defaults=defaults)


def _load_pipeline(spec: ModelSpec, dtype: Any, device: str) -> Any:
    from diffusers import DiffusionPipeline

    options = _chosen(**{_dtype_argument(): dtype}, revision=spec.revision, variant=spec.variant)
    target = DiffusionPipeline.from_pretrained(spec.id, **options)
    _place(target, spec, device)
    return target


def _dtype_argument() -> str:
    """Newer releases of diffusers call it ``dtype`` and warn about ``torch_dtype``; older ones know only that."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def _place(target: Any, spec: ModelSpec, device: str) -> None:
    if spec.offload == "model":
        target.enable_model_cpu_offload(device=device)
    elif spec.offload == "sequential":
        target.enable_sequential_cpu_offload(device=device)
    else:
        target.to(device)


def _load_text(spec: ModelSpec, dtype: Any, device: str) -> Loaded:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    _no_offload(spec)
    revision = _chosen(revision=spec.revision)
    options = revision | _chosen(variant=spec.variant, dtype=dtype)
    if _reads_pictures(AutoConfig.from_pretrained(spec.id, **revision)):
        processor = AutoProcessor.from_pretrained(spec.id, **revision)
        model: Any = AutoModelForImageTextToText.from_pretrained(spec.id, **options)
        return Loaded(model.to(device).eval(), "chat", processor=processor)
    tokenizer = AutoTokenizer.from_pretrained(spec.id, **revision)
    model = AutoModelForCausalLM.from_pretrained(spec.id, **options)
    return Loaded(model.to(device).eval(), "text", tokenizer=tokenizer)


def _reads_pictures(config: Any) -> bool:
    """Whether a model is one for pictures and text; those that transformers also knows as text models count as such."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def _no_offload(spec: ModelSpec) -> None:
    if spec.offload != "none":
        raise InvalidOption("offload is for diffusers pipelines", spec.id, "leave it out for a text model")


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[None]:
    """Turn the libraries' loading bars off for the time of loading, if asked."""
    if not quiet:
        yield
        return
    import diffusers.utils.logging as bars
    import transformers.utils.logging as text_bars

    previous = [(m, m.is_progress_bar_enabled()) for m in (bars, text_bars)]
    try:
        for module, _ in previous:
            module.disable_progress_bar()
        yield
    finally:
        for module, enabled in previous:
            if enabled:
                module.enable_progress_bar()


def _chosen(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""Diffusers pipelines and bare denoisers."""

from __future__ import annotations

import re
from typing import Any

import torch

from patchkit import instance, rebind
from patchkit.adapters.base import Adapter, unwrap
from patchkit.adapters.table import DENOISERS, Denoiser
from patchkit.context import AttentionCall, Grid, Span
from patchkit.errors import UnsupportedModel
from patchkit.journal import Journal
from patchkit.sites import Kind, Side, Site, execution_order, number_layers
from patchkit.tracker import Frame, GridRule

_DENOISER_NAME = re.compile(r"(unet|transformer|denoiser|dit)(_\w+)?")


class DiffusersAdapter(Adapter):
    """A ``DiffusionPipeline`` or one of its denoisers alone."""

    family = "diffusers"

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self._pipeline = not isinstance(target, torch.nn.Module)
        if self._pipeline and not hasattr(target, "components"):
            raise UnsupportedModel(
                f"{type(target).__name__} is no pipeline and no denoiser", remedy="give the loaded pipeline"
            )

    @property
    def is_pipeline(self) -> bool:
        return self._pipeline

    def holders(self) -> dict[str, torch.nn.Module]:
        if not self._pipeline:
            return {"model": self.outer}
        return {
            name: module
            for name, module in self.target.components.items()
            if isinstance(module, torch.nn.Module) and _DENOISER_NAME.fullmatch(name)
        }

    def components(self) -> dict[str, torch.nn.Module]:
        found = self.holders()
        if not found:
            raise UnsupportedModel(
                f"{self.name} has no component called transformer, unet or the like",
                f"its components: {', '.join(self.target.components)}",
                "give the denoiser itself",
            )
        return found

    def sites(self) -> list[Site]:
        sites: list[Site] = []
        for component, module in self.components().items():
            sites.extend(_sites_of(component, unwrap(module)))
        return sites

    def block_name(self, name: str) -> str:
        return _block(name)

    def root(self, component: str) -> torch.nn.Module:
        inner: torch.nn.Module = unwrap(self.components()[component])
        return inner

    def chained(self, component: str) -> bool:
        facts = DENOISERS.get(_class_name(self.root(component)))
        return facts is not None and facts.chained

    def install(self, site: Site, journal: Journal, owner: object, slot: rebind.Slot) -> None:
        processor = site.module.processor
        site.terminal = rebind.terminal(site, processor)
        journal.set(owner, site.module, "processor", rebind.rebound(processor, site, slot))

    def is_taken(self, site: Site) -> bool:
        slot = instance.mark_of(site.module.processor)
        return isinstance(slot, rebind.Slot) and not slot.closed

    def close(self) -> None:
        """Nothing is shared between installations."""

    def grid_rules(self) -> dict[str, GridRule]:
        return {
            name: DENOISERS[facts].grid
            for name, module in self.components().items()
            if (facts := _class_name(unwrap(module))) in DENOISERS
        }

    def place(self, call: AttentionCall, frame: Frame, memory: dict[str, Any]) -> None:
        site, grid = call.site, frame.grid
        queries, keys = call.q.shape[2], call.k.shape[2]
        if grid is not None and "sample" in frame.inputs:
            grid = _level(grid, queries)
        if site.kind == "cross":
            call.text = Span(0, keys) if call.index == _text_call(site) else None
        elif site.kind == "joint" and grid is not None:
            text = queries - grid.tokens
            if text < 0 or queries != keys:
                return  # not the sequence that the table speaks of
            call.text = Span(0, text) if site.text_side == "first" else Span(grid.tokens, queries)
        call.grid = grid

    def scheduler(self) -> Any:
        return getattr(self.target, "scheduler", None) if self._pipeline else None

    def foreign(self) -> list[str]:
        found = []
        for name, outer in self.holders().items():
            module = unwrap(outer)
            hooks = hook_names(module)
            if hooks:
                found.append(f"{name}: diffusers hooks {', '.join(sorted(hooks))}")
            kinds = {type(m.processor).__name__ for m in module.modules() if hasattr(m, "processor")}
            for word, meaning in _FOREIGN_PROCESSORS:
                if any(word in kind for kind in kinds):
                    found.append(f"{name}: {meaning}")
            if any(getattr(m, "fused_projections", False) for m in module.modules()):
                found.append(f"{name}: fused QKV projections")
            if getattr(module, "encoder_hid_proj", None) is not None:
                found.append(f"{name}: IP-Adapter image projection")
        guider = getattr(self.target, "guider", None)
        if guider is not None:
            found.append(f"guider {type(guider).__name__}")
        return found

    def blockers(self) -> list[str]:
        found = []
        for name, outer in self.components().items():
            module = unwrap(outer)
            processors = [m.processor for m in module.modules() if hasattr(m, "processor")]
            if any(getattr(p, "_parallel_config", None) is not None for p in processors):
                found.append(f"{name}: context parallelism (a patch would see a part of the sequence)")
        return found

    def tokens(self) -> int | None:
        for outer in self.components().values():
            config: Any = getattr(unwrap(outer), "config", None)
            size = getattr(config, "sample_size", None)
            height = getattr(config, "sample_height", None) or (size if isinstance(size, int) else None)
            width = getattr(config, "sample_width", None) or (size if isinstance(size, int) else None)
            patch = getattr(config, "patch_size", 1)
            if not height or not width or not isinstance(patch, int):
                continue
            frames = 1
            if getattr(config, "sample_frames", None):
                frames = (config.sample_frames - 1) // (getattr(config, "temporal_compression_ratio", 1) or 1) + 1
            return frames * (height // patch) * (width // patch)
        return None


_FOREIGN_PROCESSORS = (
    ("PAG", "perturbed-attention guidance processors"),
    ("IPAdapter", "IP-Adapter processors"),
    ("Fused", "fused QKV processors"),
    ("Sliced", "attention slicing"),
    ("XFormers", "xformers processors"),
)


def hook_names(module: torch.nn.Module) -> set[str]:
    """Names of diffusers' own hooks on a model and its parts."""
    names: set[str] = set()
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        names.update(getattr(registry, "hooks", {}))
    return names


def _class_name(module: torch.nn.Module) -> str:
    for cls in type(module).__mro__:  # a subclass of a known denoiser is built like it
        if cls.__name__ in DENOISERS:
            return cls.__name__
    return type(module).__name__


def _sites_of(component: str, module: torch.nn.Module) -> list[Site]:
    facts = DENOISERS.get(_class_name(module))
    found = {name: m for name, m in module.named_modules() if _is_attention(m)}
    if facts is not None:
        found = {n: m for n, m in found.items() if not any(re.fullmatch(p, n) for p in facts.ignore)}
    sites = []
    for name in execution_order(list(found), facts.blocks if facts else ()):
        part = found[name]
        kind, side = _kind(name, part, facts)
        heads = int(getattr(part, "heads", 0) or getattr(part, "num_heads", 0) or 0)
        sites.append(Site(component, name, part, kind, 0, heads, side, rebind.probe(part.processor)))
    number_layers(sites, _block)
    return sites


def _block(name: str) -> str:
    return name.rpartition(".")[0]


def _is_attention(module: torch.nn.Module) -> bool:
    """By type where the library has one for it: Mochi's model has no list of processors."""
    if not hasattr(module, "processor") or not callable(module.processor):
        return False
    return any(cls.__module__.startswith("diffusers.") and "Attention" in cls.__name__ for cls in type(module).__mro__)


def _kind(name: str, module: torch.nn.Module, facts: Denoiser | None) -> tuple[Kind, Side | None]:
    if facts is not None:
        for pattern, kind, side in facts.rules:
            if re.fullmatch(pattern, name):
                return kind, side
    if getattr(module, "add_q_proj", None) is not None:  # a class that is not in the table
        return "joint", None
    return ("cross" if getattr(module, "is_cross_attention", False) else "self"), None


def _text_call(site: Site) -> int:
    """Which op call of a cross-attention has the text as keys: image-to-video Wan attends to the image first."""
    return 1 if getattr(site.module, "add_k_proj", None) is not None else 0


def _level(full: Grid, tokens: int) -> Grid | None:
    """The level of a UNet that has this many tokens: each level halves both sides, rounding up."""
    height, width = full.height, full.width
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
        if height * width == 1:
            break
    return Grid(1, height, width) if height * width == tokens else None

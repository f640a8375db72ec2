"""A plan: the order of tokens of every head, and the blocks it computes in every time bucket."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import PatchkitError
from patchkit.kernels.reorder import NAMES
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.packing import pack, unpack

FORMAT = 1
KEY = "patchkit.paro"  # of the file's metadata


class PlanError(PatchkitError, ValueError):
    """A plan that cannot be read, or that was made for something else."""


@dataclass(frozen=True)
class Facts:
    """What a plan was made for and how; it serves nothing else.

    Args:
        sites: full names of the attention modules, one a row of the plan; empty in an imported plan, whose rows are
            the blocks of the denoiser in order.
        models: component -> class of the denoiser.
        layers: component -> number of its blocks.
        grid: (F, H, W) in tokens.
        text: text tokens of each row's sequence; None where their number varied from call to call.
        text_first: whether text stands before the image.
        block: tokens of a block.
        masks: for each time bucket the number of its mask.
        steps: denoising steps; None if unknown.
        scheduler: class of the scheduler; None if unknown.
        name: where the model was loaded from.
        options: how the plan was chosen: density, select, alpha, scope, eps, sigma ...
        prompts: fingerprints of the calibration prompts.
    """

    sites: tuple[str, ...]
    models: dict[str, str]
    layers: dict[str, int]
    grid: tuple[int, int, int]
    text: tuple[int | None, ...]
    text_first: bool
    block: int
    masks: tuple[int, ...]
    steps: int | None = None
    scheduler: str | None = None
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PermutePlan:
    """Orders and masks of L attention modules with H heads (PAROAttention, arXiv 2506.16054).

    Attributes:
        order: uint8 [L, H], codes 0 to 5 of the six orders FHW, FWH, HWF, HFW, WHF, WFH.
        bits: int32 [M, L, H, n, ceil(n / 32)], the kept blocks as bits: M masks over the n blocks that hold nothing
            but image; see :attr:`masks`.
        kept_mass: fp32 [M, L, H], the share of the attention mass of these blocks that is kept.
        density: fp32 [M, L, H], the share of these blocks that is kept.
        empty: bool [L, H], heads whose image tokens hardly attend to image tokens.
        facts: what the plan was made for.
    """

    order: Tensor
    bits: Tensor
    kept_mass: Tensor
    density: Tensor
    empty: Tensor
    facts: Facts
    path: str | None = None

    def __post_init__(self) -> None:
        L, H = self.order.shape
        M, n = max(self.facts.masks) + 1, self.bits.shape[-2]
        wanted = {"bits": (M, L, H, n, -(-n // 32)), "kept_mass": (M, L, H), "density": (M, L, H), "empty": (L, H)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                found = tuple(getattr(self, name).shape)
                raise PlanError(f"{name} is {found}, not {shape}", self.where, "calibrate again")
        if self.order.dtype != torch.uint8 or int(self.order.max()) >= len(NAMES):
            raise PlanError("orders are codes 0 to 5 in uint8", self.where, "calibrate again")
        if len(self.facts.text) != L or len(self.facts.sites) not in (0, L):
            raise PlanError(f"{L} rows, but facts of {len(self.facts.sites)} sites", self.where, "calibrate again")

    @property
    def where(self) -> str:
        """For messages."""
        return f"plan {self.path}" if self.path else "plan"

    @property
    def blocks(self) -> int:
        """n: image blocks along each side of a mask."""
        return self.bits.shape[-2]

    @property
    def masks(self) -> Tensor:
        """Bool [M, L, H, n, n]: the kept blocks, unpacked anew at each access (:meth:`mask` gives those of a layer).

        Of a long video this is gigabytes.
        """
        return unpack(self.bits, self.blocks)

    def mask(self, bucket: int, row: int) -> Tensor:
        """Bool [H, n, n]: kept image blocks of one row in a time bucket."""
        return unpack(self.bits[self.facts.masks[bucket], row], self.blocks)

    @property
    def buckets(self) -> int:
        """T: time buckets."""
        return len(self.facts.masks)

    def row_of(self, site: str, layer: int) -> int | None:
        """The row of a site by its full name, or of an imported plan by the number of its block."""
        if self.facts.sites:
            return self.facts.sites.index(site) if site in self.facts.sites else None
        return layer if layer < self.order.shape[0] else None

    # --- fit ------------------------------------------------------------------------------------------------------

    def refuse(self, what: str, site: str, remedy: str = "calibrate a plan for this") -> None:
        """Raise :class:`PlanError`."""
        raise PlanError(f"the plan does not fit: {what}", f"{self.where}, {site}", remedy)

    def check_call(self, geometry: Geometry, row: int, total: int | None, site: str) -> None:
        """Refuse a sequence or a schedule that the plan was not made for."""
        facts = self.facts
        if tuple(geometry.grid) != facts.grid:
            self.refuse(f"it was made for a grid of {facts.grid}, this one is {tuple(geometry.grid)}", site)
        if geometry.block != facts.block:
            self.refuse(f"its blocks have {facts.block} tokens, not {geometry.block}", site)
        wanted = facts.text[row]
        if wanted is not None and geometry.text != wanted:
            self.refuse(f"it was made for {wanted} text tokens, here are {geometry.text}", site)
        if geometry.text and geometry.text_first != facts.text_first:
            self.refuse("text stands at the other end of the sequence", site)
        if geometry.count != self.blocks:
            self.refuse(f"its masks have {self.blocks} blocks a side, this sequence has {geometry.count}", site)
        if total is not None and facts.steps is not None and total != facts.steps:
            self.refuse(
                f"it was made for {facts.steps} steps, this run has {total}",
                site,
                f"run {facts.steps} steps, or calibrate with num_inference_steps={total}",
            )

    def check_target(self, models: dict[str, tuple[str, int]], scheduler: str | None) -> None:
        """Refuse another model (class and number of blocks by component) or another scheduler."""
        facts = self.facts
        for component, (name, layers) in models.items():
            wanted, deep = facts.models.get(component), facts.layers.get(component)
            if wanted is not None and wanted != name:
                self.refuse(f"it was made for a {wanted}, this is a {name}", component)
            if deep is not None and deep != layers:
                self.refuse(f"it was made for {deep} blocks, this {name} has {layers}", component)
        if scheduler is not None and facts.scheduler is not None and scheduler != facts.scheduler:
            self.refuse(
                f"it was made for steps of {facts.scheduler}, the pipeline has a {scheduler}",
                "scheduler",
                "set the scheduler that it was calibrated with, or calibrate again",
            )

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the plan as safetensors, with bit-packed masks; the file appears whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        text = json.dumps({"format": FORMAT, **asdict(self.facts)})
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata={KEY: text})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        object.__setattr__(self, "path", str(path))
        return path

    @classmethod
    def load(cls, path: str | Path) -> PermutePlan:
        """Read a plan; raises :class:`PlanError` for a file that holds none."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise PlanError(f"there is no file {path}", "option 'plan'", "make one: patchkit calibrate paro FILE")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(KEY)
                tensors = {name: file.get_tensor(name) for name in TENSORS} if text else {}
        except SafetensorError as error:
            raise PlanError(f"{path} cannot be read: {error}", "option 'plan'", "calibrate again") from None
        if not text:
            raise PlanError(f"{path} holds no plan", "option 'plan'", "make one: patchkit calibrate paro FILE")
        data = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise PlanError(f"{path} has another format than {FORMAT}", "option 'plan'", "calibrate again")
        known = {f.name for f in fields(Facts)}
        facts: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if n in known}
        return cls(**tensors, facts=Facts(**facts), path=str(path))

    @classmethod
    def from_masks(
        cls, order: Tensor, masks: Tensor, facts: Facts, kept_mass: Tensor | None = None, empty: Tensor | None = None
    ) -> PermutePlan:
        """From bool masks [M, L, H, n, n]. A kept mass that nobody measured is NaN."""
        density = masks.float().mean((-1, -2))
        mass = torch.full_like(density, float("nan")) if kept_mass is None else kept_mass
        nothing = torch.zeros_like(order, dtype=torch.bool) if empty is None else empty
        return cls(order, pack(masks), mass, density, nothing, facts)

    def histogram(self) -> Tensor:
        """Int [L, 6]: how many heads of each row have each order."""
        return torch.stack([(self.order == code).sum(-1) for code in range(len(NAMES))], -1)

    def __repr__(self) -> str:
        L, H = self.order.shape
        mass = float(self.kept_mass.mean())
        return (
            f"<PermutePlan {L} x {H} heads, grid {self.facts.grid}, {self.buckets} buckets, density "
            f"{float(self.density.mean()):.3f}, kept mass {mass:.3f}>"
        )


TENSORS = ("order", "bits", "kept_mass", "density", "empty")

"""Making a plan: dense runs that are watched, once for the orders and once for the masks. No map is ever held.

What the paper (arXiv 2506.16054) leaves open, and what is done here (*ours*): figures are averaged over prompts,
sampled steps and guidance branches before the orders are compared; the probabilities are those of the whole row, text
included; one threshold a layer is found by bisection; the heaviest block of a row and the diagonal one are always kept;
the shared mask is made of the mean masses of the later part of the run.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patchkit.errors import Conflict, InvalidOption
from patchkit.recipes.paro import assembling, scoring
from patchkit.recipes.paro.buckets import mask_numbers
from patchkit.recipes.paro.figures import FIGURES, MassFigures, OrderFigures, Seen, mass_file, mass_shape
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.observing import Observe
from patchkit.recipes.paro.plan import Facts, PermutePlan
from patchkit.recipes.paro.settings import Scope, Settings, described, refuse

Progress = Callable[[int, int, str], None]


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    density: float = 0.3,
    num_inference_steps: int | None = None,
    buckets: int = 10,
    share_from: float = 0.5,
    select: scoring.Select = "score",
    alpha: float = 0.5,
    scope: Scope = "layer",
    *,
    eps: float | Literal["rel"] = 1e-3,
    sigma: float = 0.9,
    block_size: int = 64,
    order_steps: int = 4,
    query_stride: int = 1,
    empty_below: float = 0.01,
    seed: int = 0,
    codes: Sequence[int] | None = None,
    layers: str | int | list[int] | None = None,
    exclude: str | list[str] | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    **call_kwargs: Any,
) -> PermutePlan:
    """Make a plan for a loaded pipeline at one size and number of steps (PAROAttention, arXiv 2506.16054).

    Every prompt is generated twice, dense: once for the orders, once for the masses of blocks in these orders. The
    orders cost, at each of ``order_steps`` steps, one attention and half a one for each of the six candidates (divided
    by ``query_stride``); the masses cost half an attention a step. No attention map is held.

    Args:
        pipe: a diffusers pipeline, without patches.
        prompts: one or two usually do: the masks of different prompts are alike.
        density: share of image blocks that is kept, over ``scope``.
        num_inference_steps: denoising steps; None = the pipeline's own default. The plan serves this number only.
        buckets: parts of the run, T. Those before ``share_from`` have masks of their own, those after it share one.
        share_from: share of the run.
        select: ``"score"``: skippable blocks and incoherence, weighed by ``alpha``; ``"kept_mass"``: the order whose
            heaviest blocks hold most.
        alpha: 1 = skippable blocks only, 0 = incoherence only (for plans that are to be quantised, not sparse).
        scope: over which blocks one threshold is found: those of a ``"head"``, a ``"layer"``, a ``"timestep"`` (bucket)
            or ``"global"``.
        eps: probability below which an entry counts as small; ``"rel"``: 17.5 / image tokens.
        sigma: a block with this share of small entries is skippable.
        block_size: tokens of a block.
        order_steps: steps at which the orders are compared.
        query_stride: compare orders on every such query block; 4 is plenty for long videos.
        empty_below: heads whose image tokens give less than this share of their mass to image tokens count as empty.
        seed: of the first prompt; the next ones count up.
        codes: the orders to choose from; None = all that differ on the grid. ``[0]``: masks without reordering.
        layers: as the recipe's option.
        exclude: as the recipe's option.
        folder: where figures are kept; a stopped calibration goes on there with the prompts that are missing, and
            another ``scope`` (with ``select="score"`` another ``density`` too) needs no new run. None: a temporary one.
        progress: called as ``progress(done, total, what)`` with the runs that are done.
        call_kwargs: further arguments of the pipeline's call: height, width, num_frames, guidance_scale ...

    Returns:
        The plan; ``plan.save(path)`` keeps it.

    Raises:
        InvalidOption: options out of range, or a folder that holds another calibration.
        Conflict: the pipeline is patched.
        UnsupportedModel: sequences that one plan cannot serve.
    """
    settings = Settings(
        density, buckets, share_from, select, alpha, scope, eps, sigma, block_size, order_steps, query_stride,
        empty_below, seed, None if codes is None else tuple(codes),
    )  # fmt: skip
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        refuse("prompts", texts, "one prompt or more")
    call = dict(call_kwargs)
    if num_inference_steps is not None:
        call["num_inference_steps"] = num_inference_steps
    with ExitStack() as stack:
        where = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="patchkit-paro-")))
        selection = {"layers": layers, "exclude": exclude}
        work = Calibration(pipe, texts, settings, call, selection, where, progress)
        return work.run()


class Calibration:
    """One calibration in its folder."""

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        settings: Settings,
        call: dict[str, Any],
        selection: dict[str, Any],
        folder: Path,
        progress: Progress | None,
    ) -> None:
        import patchkit

        if patchkit.status(pipe)["patched"]:
            raise Conflict(
                "the pipeline is patched", "calibrate", "remove the patch first: plans are made of dense runs"
            )
        self.pipe, self.prompts, self.settings, self.call = pipe, prompts, settings, call
        self.selection, self.folder, self.progress = selection, folder, progress
        self.seen = Seen()
        self.names: tuple[str, ...] = ()
        self.layers: dict[str, int] = {}
        self.done = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def run(self) -> PermutePlan:
        """Orders, masses, masks."""
        order, share = self._orders()
        geometry = self.seen.geometry
        assert geometry is not None
        numbers = mask_numbers(self.settings.buckets, self.settings.share_from)
        parts = self._masses(order, numbers, geometry)
        masks = assembling.assemble(parts, self.settings.density, self.settings.scope)
        empty = share < self.settings.empty_below if geometry.text else torch.zeros_like(order, dtype=torch.bool)
        return PermutePlan(order, masks.bits, masks.kept_mass, masks.density, empty, self._facts(numbers, geometry))

    # --- runs -----------------------------------------------------------------------------------------------------

    def _watch(self, watcher: OrderFigures | MassFigures, number: int) -> None:
        """One dense run of a prompt."""
        import patchkit

        generator = torch.Generator().manual_seed(self.settings.seed + number)
        call = {"output_type": "latent", "generator": generator} | self.call
        with patchkit.apply(self.pipe, Observe(watcher=watcher, **self.selection)), torch.no_grad():
            self.pipe(prompt=self.prompts[number], **call)
        self.names = tuple(site.full_name for site in watcher.sites)
        self.layers = {site.component: site.layers for site in watcher.sites}

    def _step(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, 2 * len(self.prompts), what)

    def _orders(self) -> tuple[Tensor, Tensor]:
        """uint8 [L, H] and the share of each head's mass that image tokens give to image tokens."""
        from safetensors.torch import load_file, save_file

        gathered: dict[str, Tensor] = {}
        for number in range(len(self.prompts)):
            path = self.folder / f"orders-{number}.safetensors"
            if path.is_file():
                self._recall(number)
                self._step(f"prompt {number + 1} was watched before")
            else:
                watcher = self._compare(number)
                self._remember(number)
                part = path.with_suffix(".part")
                save_file(watcher.to_tensors(), part)
                part.replace(path)
            tensors = load_file(path)
            codes = tuple(tensors.pop("codes").tolist())
            gathered = {n: gathered[n] + x if n in gathered else x for n, x in tensors.items()}
        means = {n: gathered[n] / gathered["count"][:, None, None] for n in (*FIGURES, "share")}
        settings = self.settings
        order = scoring.choose(means["sparse"], means["quant"], means["kept"], codes, settings.select, settings.alpha)
        return order, means["share"][..., 0]

    def _compare(self, number: int) -> OrderFigures:
        """The figures of all orders on one prompt. A denoiser that works in a part of the run only may have been missed
        by the steps that were looked at; then the prompt is watched again at more of them.
        """
        settings = dict(vars(self.settings))
        while True:
            watcher = OrderFigures(self.settings.block_size, self.seen, settings)
            self._watch(watcher, number)
            if not watcher.missing() or settings["order_steps"] >= self.seen.total:
                self._step(f"prompt {number + 1} of {len(self.prompts)}: orders")
                return watcher
            settings["order_steps"] *= 2

    def _masses(self, order: Tensor, numbers: tuple[int, ...], geometry: Geometry) -> assembling.Masses:
        """Mean block masses, from the files of all prompts."""
        files, counts = [], []
        for number in range(len(self.prompts)):
            path = self.folder / f"mass-{number}.f32"
            if path.with_suffix(".json").is_file():
                self._step(f"prompt {number + 1} was watched before")
            else:
                watcher = MassFigures(self.settings.block_size, self.seen, order, numbers, path)
                self._watch(watcher, number)
                self._remember(number)
                watcher.finish()
                self._step(f"prompt {number + 1} of {len(self.prompts)}: masses")
            files.append(mass_file(path, mass_shape(order, numbers, geometry.count)))
            counts.append(torch.tensor(json.loads(path.with_suffix(".json").read_text())))
        return assembling.Masses(files, torch.stack(counts).sum(0))

    # --- the folder -----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write down what is calibrated, or refuse a folder in which something else is.

        Density and scope are left out where the orders do not depend on them: they cut the same masses elsewhere.
        """
        path = self.folder / "calibration.json"
        free = {"density", "scope"} if self.settings.select == "score" else {"scope"}
        mine = {
            "settings": {n: v for n, v in vars(self.settings).items() if n not in free},
            "prompts": self.prompts,
            "call": {n: described(v) for n, v in sorted(self.call.items())},
            "selection": self.selection,
            "pipeline": type(self.pipe).__name__,
        }
        mine = json.loads(json.dumps(mine))
        if not path.is_file():
            path.write_text(json.dumps(mine, indent=1))
            return
        there = json.loads(path.read_text())
        other = [n for n in mine if mine[n] != there.get(n)]
        if other:
            raise InvalidOption(
                f"the folder holds a calibration with other {', '.join(other)}",
                str(self.folder),
                "give another folder, or delete this one",
            )

    def _remember(self, number: int) -> None:
        """What the sequences looked like, for a run that goes on from here."""
        geometry = self.seen.geometry
        assert geometry is not None
        facts = {
            "names": self.names,
            "layers": self.layers,
            "geometry": [geometry.tokens, list(geometry.grid), geometry.start, geometry.block],
            "total": self.seen.total,
            "text": {str(row): sorted(found) for row, found in self.seen.text.items()},
        }
        (self.folder / f"seen-{number}.json").write_text(json.dumps(facts))

    def _recall(self, number: int) -> None:
        from patchkit.context import Grid

        facts = json.loads((self.folder / f"seen-{number}.json").read_text())
        tokens, grid, start, block = facts["geometry"]
        self.names, self.layers, self.seen.total = tuple(facts["names"]), facts["layers"], facts["total"]
        self.seen.geometry = Geometry(tokens, Grid(*grid), start, block)
        for row, found in facts["text"].items():
            self.seen.text.setdefault(int(row), set()).update(found)

    def _facts(self, numbers: tuple[int, ...], geometry: Geometry) -> Facts:
        from patchkit.adapters.base import unwrap

        components = dict.fromkeys(name.partition(".")[0] for name in self.names)
        scheduler = getattr(self.pipe, "scheduler", None)
        lengths = [sorted(self.seen.text[row]) for row in range(len(self.names))]
        return Facts(
            sites=self.names,
            models={name: type(unwrap(getattr(self.pipe, name, self.pipe))).__name__ for name in components},
            layers=self.layers,
            grid=(geometry.grid.frames, geometry.grid.height, geometry.grid.width),
            text=tuple(found[0] if len(found) == 1 else None for found in lengths),
            text_first=geometry.text_first,
            block=geometry.block,
            masks=numbers,
            steps=self.seen.total,
            scheduler=None if scheduler is None else type(scheduler).__name__,
            name=str(getattr(getattr(self.pipe, "config", None), "_name_or_path", "") or ""),
            options=dict(vars(self.settings)),
            prompts=tuple(hashlib.sha256(p.encode()).hexdigest()[:16] for p in self.prompts),
        )

"""AdaSpa: search the blocks of attention that matter in this very video a few times, and compute only those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption
from patchkit.recipe_base import Recipe
from patchkit.recipes.adaspa import compute, conditions
from patchkit.recipes.adaspa.schedule import Schedule, plan
from patchkit.recipes.adaspa.selection import Geometry, choose
from patchkit.registry import recipe
from patchkit.selection import Indices, StepWindow
from patchkit.sites import Site

Next = Callable[[AttentionCall], Tensor]
Step = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Block = Annotated[int, Field(ge=1, le=1024)]

SECOND_SEARCH = 0.6  # of the run: step 30 of the paper's 50
WORTH_IT = 4096  # tokens from which a sparse output has to be the faster one
MASS_BYTES = 64 << 20  # of block masses at a time


@recipe("adaspa")
@dataclass(frozen=True, kw_only=True)
class AdaSpa(Recipe):
    """Block-sparse attention for video diffusion transformers whose blocks are searched in the running video.

    The first steps run dense. The last of them adds up the true softmax mass of every block; each row of blocks then
    keeps its heaviest ones, heads that lose little giving budget to heads that lose much. Later steps compute these
    blocks only, and one or two of them search anew with the row sums (LSE) of the dense step. Text is always kept.

    Paper: Training-free and Adaptive Sparse Attention for Efficient Long Video Generation, arXiv 2502.21079. There
    is no public code; what the paper leaves open is marked *ours*.

    Steps count from 0 here and from 1 in the paper: its searches {10, 30} of 50 are the steps 9 and 29, and its ten
    dense steps are 0 to 9. A fraction names the last step of that part of the run.

    Args:
        density: mean share of video blocks that a row keeps; the paper's sparsity is 1 - density.
        warmup_steps: dense outputs at the start, as a share of the run (float) or their number (int). With 0 the
            first step is still dense, because the search needs a dense pass.
        search_steps: steps with a search, as shares or step numbers. The last warm-up step always searches; None adds
            0.6 of the run. An empty list means no further search.
        block_size: tokens of a block, one number or (query, key).
        recall_threshold: a head that keeps more than this share of its mass can give half of its blocks away.
        head_adaptive: budgets d/2, d and 3d/2 by recall; their mean stays d. Off: all heads keep d.
        selection: ``"rows"``: every row keeps equally many blocks; ``"global"``: the heaviest of the whole head (an
            ablation: rows may be left with next to nothing).
        min_tokens: shorter sequences run dense (*ours*: nothing is gained there). Below 4,096 a sparse output may be
            slower than a dense one; the report then says so.
        refresh_lse: correct the cached LSE at each further search, from the row sums which that search sees anyway
            (*ours*; of use only with three or more searches).
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    warmup_steps: Step | Share = 0.2
    search_steps: list[Step | Share] | None = None
    block_size: Block | tuple[Block, Block] = 64
    recall_threshold: Annotated[float, Field(ge=0, le=1)] = 0.8
    head_adaptive: bool = True
    selection: Literal["rows", "global"] = "rows"
    min_tokens: Annotated[int, Field(ge=0)] = 4096
    refresh_lse: bool = False

    summary: ClassVar[str] = "computes only the attention blocks that a search in this video found to matter"
    paper: ClassVar[str] = (
        "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (arXiv 2502.21079)"
    )
    effect: ClassVar[Literal["replaces", "adjusts"]] = "replaces"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    families: ClassVar[tuple[str, ...]] = ("diffusers",)
    models: ClassVar[tuple[str, ...]] = ("hunyuanvideo", "cogvideox", "wan", "mochi", "ltx", "flux", "sd3", "qwenimage")
    uses_heads: ClassVar[bool] = True

    # --- options ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """A search before the end of the warm-up has no dense LSE to lean on, and nobody would use its mask."""
        warm_up = self.warmup_steps
        for step in self.search_steps or ():
            if isinstance(step, float) != isinstance(warm_up, float):
                continue  # comparable only once the length of the run is known: see Schedule.ignored
            if step < (warm_up if isinstance(warm_up, float) else warm_up - 1):
                raise InvalidOption(
                    f"the search at {step} lies inside the warm-up ({warm_up})",
                    f"recipe {self.name!r}, option 'search_steps'",
                    "searches begin at the last warm-up step; leave this one out or shorten warmup_steps",
                )

    def accepts(self, site: Site) -> str | None:
        """Every self- and joint attention that has one of the selected heads."""
        if site.heads and not Indices.parse(self.heads, "heads").resolve(site.heads):
            return f"none of the heads {self.heads} among its {site.heads}"
        return None

    def schedule(self, total: int | None) -> Schedule | None:
        """What happens when in a run of ``total`` steps; None if that cannot be said without ``total``."""
        return plan(self.warmup_steps, self.search_steps, SECOND_SEARCH, total)

    def attention_cost(self, tokens: int, total: int) -> float:
        """Dense steps, half a dense attention a search (it needs no values), density afterwards; text is ignored."""
        schedule = self.schedule(total)
        if tokens < self.min_tokens or schedule is None or total < 1:
            return 1.0
        window = StepWindow.parse(self.steps, "steps")
        cost, found = 0.0, False
        for step in range(total):
            if not window.contains(step, total) or step < schedule.first:
                cost += 1
            elif not found:
                found = self._sparse_follows(schedule, step)
                cost += 1.5 if found else 1
            else:
                cost += self.density + (0.5 if step in schedule.searches else 0)
        return cost / total

    @property
    def blocks(self) -> tuple[int, int]:
        """(query block, key block)."""
        return self.block_size if isinstance(self.block_size, tuple) else (self.block_size, self.block_size)

    # --- one attention op -------------------------------------------------------------------------------------

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """Dense, dense with a search behind it, a search and sparse, or sparse: as the schedule says."""
        schedule = self.schedule(call.total)
        obstacle = conditions.obstacle(call, schedule, self.min_tokens)
        if obstacle is not None:
            return _dense(call, next, obstacle)
        assert schedule is not None
        assert call.step is not None
        state, step = call.state, call.step
        if step < state.get("step", 0):
            state.clear()  # a new run: the mechanism clears as well, but a stale mask would go unseen
        if not state:
            conditions.announce(call, schedule)
        state["step"] = step
        if step < schedule.first:
            return _dense(call, next, "warm-up")
        geometry = conditions.geometry_of(call, self.blocks)
        if isinstance(geometry, str):
            return _dense(call, next, geometry)
        reason = conditions.why_search(call, geometry, schedule)
        if reason is not None:
            if not self._sparse_follows(schedule, step):
                return _dense(call, next, reason)  # nobody would use the mask
            return self._fused_search(call, next, geometry, schedule, reason)
        if step < schedule.warm_up:
            return _dense(call, next, "warm-up")  # the op is called more than once in this step
        if step in schedule.searches and step > state["searched"] and "lse" in state:
            self._search(call, geometry, schedule, refresh=self.refresh_lse)
            call.ledger.count("cached_search")
        if state["instead"]:
            return _dense(call, next, state["instead"])
        call.ledger.count("sparse")
        with call.ledger.time("sparse", call.q.device):
            return compute.sparse(call, geometry, state["layout"])

    def _sparse_follows(self, schedule: Schedule, step: int) -> bool:
        """Whether this recipe will be asked for a sparse output after ``step``."""
        if schedule.total is not None and step + 1 >= schedule.total:
            return False
        return StepWindow.parse(self.steps, "steps").contains(step + 1, schedule.total)

    def _search_follows(self, schedule: Schedule, step: int) -> bool:
        """Whether the cached LSE will be needed again."""
        window = StepWindow.parse(self.steps, "steps")
        return any(s > step and window.contains(s, schedule.total) for s in schedule.searches)

    # --- searches ---------------------------------------------------------------------------------------------

    def _fused_search(
        self, call: AttentionCall, next: Next, geometry: Geometry, schedule: Schedule, reason: str
    ) -> Tensor:
        """Dense output, its LSE, and the first mask."""
        heads = compute.pick_heads(Indices.parse(self.heads, "heads").resolve(call.q.shape[1]), call)
        with call.ledger.time("dense", call.q.device):
            out, lse = compute.dense_with_lse(call, next, geometry)
        call.state.update(heads=heads, key=conditions.sequence(call, geometry), lse=lse[:, heads].clone())
        self._search(call, geometry, schedule)
        call.ledger.ran_dense(reason)
        call.ledger.count("fused_search")
        return out

    def _search(self, call: AttentionCall, geometry: Geometry, schedule: Schedule, refresh: bool = False) -> None:
        """A new layout from today's queries and keys and the cached LSE.

        The cached LSE is always that of a dense pass: a sparse one lacks what it dropped. It goes with the last search.
        """
        state, ledger = call.state, call.ledger
        heads = state["heads"]
        with ledger.time("search", call.q.device):
            choice = choose(
                self._masses(call, geometry, refresh),
                geometry,
                self.density,
                threshold=self.recall_threshold,
                adaptive=self.head_adaptive,
                mode=self.selection,
            )
            layout = compute.make_layout(choice, geometry, call, heads)
        state.update(layout=layout, k_h=choice.k, searched=call.step)
        if not self._search_follows(schedule, state["step"]):
            del state["lse"]
        ledger.count("searches")
        ledger.note(
            density=compute.all_heads(choice.density, call, heads),
            actual_density=compute.actual_density(layout),
            recall=compute.all_heads(choice.recall, call, heads),
            k=choice.k,
            layout_bytes=layout.nbytes(),
            lse_bytes=state["lse"].nbytes if "lse" in state else 0,
        )
        state["instead"] = _judge(call, layout)
        if self.heads is not None:
            ledger.note(dense_heads=call.q.shape[1] - choice.k.shape[1])

    def _masses(self, call: AttentionCall, geometry: Geometry, refresh: bool) -> Iterator[Tensor]:
        """Masses of some heads after others, (B, h, Nq, Nk). With ``refresh`` the LSE is corrected on the way."""
        heads, lse = call.state["heads"], call.state["lse"]
        if refresh:  # a new tensor: one made in inference mode must not be written outside of it
            lse = call.state["lse"] = lse.clone()
        q, k = call.q[:, heads], compute.keys(call.k, geometry, call.q.shape[1])[:, heads]
        lengths = compute.lengths_tensor(geometry, q.device)
        padding = None if lengths is None else ~compute.real_queries(geometry, q.device)[:, None]
        rows, columns = geometry.counts
        chunk = max(1, MASS_BYTES // (4 * q.shape[0] * rows * columns))
        for start in range(0, q.shape[1], chunk):
            part = slice(start, start + chunk)
            # rows of padding have no mass: exp(s - inf) is 0
            used = lse[:, part] if padding is None else lse[:, part].masked_fill(padding, torch.inf)
            mass, sums = kernels.block_mass(
                q[:, part], k[:, part], used, *geometry.block, scale=call.scale, kv_lens=lengths, return_row_sum=True
            )
            if refresh:  # the sum of exp(s - LSE_old) over a row is exp(LSE_new - LSE_old)
                lse[:, part] += torch.where(sums > 0, sums, torch.ones_like(sums)).log()
            yield mass


def _dense(call: AttentionCall, next: Next, reason: str) -> Tensor:
    """The rest of the chain, with the reason written down."""
    call.ledger.ran_dense(reason)
    with call.ledger.time("dense", call.q.device):
        return next(call)


def _judge(call: AttentionCall, layout: kernels.BlockLayout) -> str:
    """Note which path the kernel takes. Returns why the sparse steps had better run dense; empty if they should not.

    A kernel that would lose to dense attention is not worth its error. But who lowers ``min_tokens`` asks for sparse
    outputs of short sequences, whatever they cost: that is granted, and the report says that it costs.
    """
    path = kernels.choose_path(layout, call.q.shape[-1], call.q.dtype, call.q.device)
    call.ledger.note(path=f"{path.name}: {path.reason}")  # which may be a dense one
    loses = path.name != "dense" and not path.pays
    granted = loses and call.q.shape[2] < WORTH_IT
    call.ledger.caution(
        "slower than dense expected", f"{path.reason}; min_tokens lets it run sparse anyway" if granted else ""
    )
    return f"dense is faster: {path.reason}" if loses and not granted else ""

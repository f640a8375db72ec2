"""Plans that the authors published as torch files: permute_plan.pth and sparse_plan.pth."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.recipes.paro.plan import Facts, PermutePlan, PlanError


def import_plan(
    permute: str | Path,
    sparse: str | Path,
    *,
    model: str,
    grid: tuple[int, int, int],
    text: int = 0,
    text_first: bool = True,
    block: int = 64,
    steps: int | None = None,
    component: str = "transformer",
) -> PermutePlan:
    """Read the authors' plan files; nothing in them is executed.

    Args:
        permute: file with ``permute`` int [L, H] (codes 0 to 5) and ``empty`` bool [L, H].
        sparse: file with ``sparse`` bool [T, L, H, n, n] over image blocks, or a bare tensor of that form over all
            blocks. Blocks of text in front and the ragged block at the end are always computed here: they are cut off.
        model: class of the denoiser, for instance ``"CogVideoXTransformer3DModel"``.
        grid: (F, H, W) in tokens.
        text: text tokens of the sequence.
        text_first: whether they stand before the image.
        block: tokens of a block.
        steps: denoising steps that it was made for; None = unknown, any are taken.
        component: which denoiser of the pipeline.

    Raises:
        PlanError: files that hold something else, or masks that do not fit to the grid.
    """
    orders, kept = _read(permute), _read(sparse)
    order = _tensor(orders, "permute", permute)
    masks = kept if isinstance(kept, Tensor) else _tensor(kept, "sparse", sparse)
    empty = orders.get("empty") if isinstance(orders, dict) else None
    tokens = grid[0] * grid[1] * grid[2]
    start = text if text_first else 0
    before, last = -(-start // block), (start + tokens) // block
    count = last - before
    front = before if isinstance(kept, Tensor) else 0  # a bare tensor is over all blocks
    sizes = {front + count, front + count + ((start + tokens) % block > 0)}
    alike = masks.dim() == 5 and order.dim() == 2 and masks.shape[1:3] == order.shape
    if not alike or count < 1 or masks.shape[-1] not in sizes or masks.shape[-2] != masks.shape[-1]:
        raise PlanError(
            f"orders {tuple(order.shape)} and masks {tuple(masks.shape)} are none of {count} whole image blocks",
            f"{permute}, {sparse}",
            f"check grid, text and block: masks are [T, L, H, n, n] with n = {' or '.join(map(str, sorted(sizes)))}",
        )
    L, T = order.shape[0], masks.shape[0]
    facts = Facts(
        sites=(),
        models={component: model},
        layers={component: L},
        grid=grid,
        text=(text,) * L,
        text_first=text_first and text > 0,
        block=block,
        masks=tuple(range(T)),
        steps=steps,
        options={"imported": [Path(permute).name, Path(sparse).name]},
    )
    here = slice(front, front + count)
    image = masks[..., here, here].bool()
    return PermutePlan.from_masks(
        order.to(torch.uint8), image, facts, empty=None if empty is None else torch.as_tensor(empty).bool()
    )


def _read(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain containers, no code
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"{path} cannot be read: {told}", "import_plan", "give the authors' .pth file") from None


def _tensor(data: Any, name: str, path: str | Path) -> Tensor:
    found = data.get(name) if isinstance(data, dict) else None
    if found is None:
        raise PlanError(f"{path} has no entry {name!r}", "import_plan", "give the authors' .pth file")
    return torch.as_tensor(found)

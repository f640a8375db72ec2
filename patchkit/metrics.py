"""How far two videos (or pictures) are apart. In double precision, so that nothing but the videos decides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.errors import InvalidOption

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of two (F, 3, H, W) videos in [0, 1]; inf if they are equal."""
    _check(a, b)
    error = (a.double() - b.double()).square().mean()
    return float(-10 * torch.log10(error))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of two (F, 3, H, W) videos in [0, 1]; 1 if they are equal.

    Gaussian window of 11 pixels and sigma 1.5, each channel by itself, averaged over all places where the whole window
    fits, channels and frames.
    """
    _check(a, b)
    if min(a.shape[-2:]) < _WINDOW:
        raise InvalidOption(f"pictures of {tuple(a.shape[-2:])} are smaller than the {_WINDOW}-pixel window of SSIM")
    x, y = (v.double().reshape(-1, 1, *v.shape[-2:]) for v in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    cov = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    return float((luminance * structure).mean())


def outside(a: Tensor, b: Tensor, mask: Tensor) -> dict[str, float]:
    """How well ``b`` keeps what ``a`` shows outside a mask: PSNR in dB (inf if equal there) and mean absolute error.

    Args:
        a: (F, 3, H, W) in [0, 1].
        b: the same shape.
        mask: (F, H, W) or (1, H, W), true where a change is wanted; ``share`` tells how much lies outside it.
    """
    _check(a, b)
    if mask.ndim != 3 or mask.shape[0] not in (1, a.shape[0]) or mask.shape[1:] != a.shape[2:]:
        raise InvalidOption(
            f"a mask of shape {tuple(mask.shape)} does not fit videos of {tuple(a.shape)}",
            remedy="give (F, H, W) or (1, H, W) with the size of the pictures",
        )
    kept = (~mask.bool()).unsqueeze(1).expand_as(a)
    if not kept.any():
        raise InvalidOption("the mask covers everything, so nothing is outside it")
    error = (a.double() - b.double())[kept]
    return {
        "psnr": float(-10 * torch.log10(error.square().mean())),
        "mae": float(error.abs().mean()),
        "share": float(kept.double().mean()),
    }


def _blur(pictures: Tensor) -> Tensor:
    """Gaussian means of (n, 1, H, W) pictures, only where the window fits."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=pictures.device) - _WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(pictures, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InvalidOption(f"the videos differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise InvalidOption(
            f"expected floating point pixels in [0, 1], not {a.dtype} and {b.dtype}",
            remedy="patchkit.media.as_tensor converts pictures, arrays and lists of them",
        )

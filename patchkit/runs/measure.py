"""The figures beside a run: distances to the reference, detector scores, density, versions."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from patchkit.errors import InvalidOption
from patchkit.runs.calls import Produced
from patchkit.runs.loading import Loaded

PACKAGES = ("patchkit", "torch", "diffusers", "transformers", "accelerate", "triton", "numpy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """The device in words: the card's name, or the processor's."""
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(torch.device(device))})"
    threads = torch.get_num_threads()
    return f"{device} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def distances(reference: Produced, other: Produced) -> dict[str, Any]:
    """PSNR and SSIM of ``other`` against ``reference``, and how many items were compared."""
    if reference.kind == "text":
        same = [a == b for a, b in zip(reference.items, other.items, strict=False)]
        return {"same_text": sum(same), "of": len(same)}
    from patchkit import metrics
    from patchkit.media import as_tensor

    pairs = list(zip(reference.items, other.items, strict=False))
    shapes = {(tuple(as_tensor(a).shape), tuple(as_tensor(b).shape)) for a, b in pairs}
    if not pairs or len(reference.items) != len(other.items) or any(a != b for a, b in shapes):
        return {"psnr": None, "ssim": None, "note": "results differ in number or shape: not compared"}
    psnr, ssim = [], []
    for a, b in ((as_tensor(a), as_tensor(b)) for a, b in pairs):
        psnr.append(metrics.psnr(a, b))
        with contextlib.suppress(InvalidOption):  # smaller than the window of SSIM
            ssim.append(metrics.ssim(a, b))
    out: dict[str, Any] = {"psnr": _mean(psnr), "ssim": _mean(ssim), "identical": False}
    if out["psnr"] == math.inf:
        out |= {"psnr": None, "identical": True}  # JSON has no infinity
    return out


def detect(produced: Produced, loaded_from_zoo: bool, prompt: Any) -> dict[str, bool] | None:
    """What the zoo's detectors read back, if the prompt is one of the zoo's captions."""
    if not loaded_from_zoo or produced.kind != "video" or not isinstance(prompt, str) or not produced.items:
        return None
    from patchkit.zoo import detect

    try:
        return dict(detect.score(produced.items[0], prompt))
    except ValueError:  # a free prompt: nothing to score it by
        return None


def shape(produced: Produced) -> dict[str, int]:
    """Number and size of the results."""
    if produced.kind == "text":
        return {"results": len(produced.items)}
    from patchkit.media import as_tensor

    first = as_tensor(produced.items[0])
    sizes = {"results": len(produced.items), "height": first.shape[-2], "width": first.shape[-1]}
    return sizes | ({"frames": first.shape[0]} if produced.kind == "video" else {})


def densities(report: Mapping[str, Any]) -> dict[str, Any]:
    """Density asked for and measured, and recall, of the recipes that have them; by recipe if there are several."""
    found = {}
    for entry in report["recipes"]:
        means, options = entry.get("means", {}), entry.get("options", {})
        row = {
            "nominal": options.get("density"),
            "actual": means.get("actual_density", means.get("density")),
            "recall": means.get("recall"),
        }
        if any(value is not None for value in row.values()):
            found[entry["recipe"]] = row
    return next(iter(found.values())) if len(found) == 1 else found


def circumstances(loaded: Loaded) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": device_name(loaded.device),
        "dtype": str(getattr(loaded.target, "dtype", "")).removeprefix("torch."),
        "versions": versions(),
        "date": now.isoformat(timespec="seconds"),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

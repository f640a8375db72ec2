"""What ``patchkit doctor`` shows: versions, devices, and which path each kernel takes. Writes nothing."""

from __future__ import annotations

import importlib
import platform
from typing import Any

from patchkit import zoo
from patchkit.runs import loading, measure

OPTIONAL = ("peft", "imageio", "imageio-ffmpeg", "scikit-image", "matplotlib")


def diagnose() -> dict[str, Any]:
    """Everything as plain data; ``problems`` are sentences for the reader, ``failures`` kernels that do not work."""
    problems: list[str] = []
    failures: list[str] = []
    versions = measure.versions((*measure.PACKAGES, *OPTIONAL))
    found: dict[str, Any] = {
        "versions": versions,
        "platform": platform.platform(),
        "devices": {device: _describe(device) for device in loading.devices()},
        "kernels": _kernels(problems, failures),
        "zoo": {f"zoo/{name}": zoo.describe(name) for name in zoo.names()},
        "problems": problems,
        "failures": failures,
    }
    for name in ("imageio", "imageio-ffmpeg"):
        if versions[name] is None:
            problems.append(f'{name} is not installed, so no mp4 can be written: pip install "patchkit[video]"')
    for name in filter(zoo.shipped, zoo.names()):
        if not any((zoo.path(name) / index).is_file() for index in ("model_index.json", "config.json")):
            problems.append(f"the weights of zoo/{name} are missing from this installation")
    return found


def _describe(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return platform.processor() or platform.machine()
    facts = torch.cuda.get_device_properties(torch.device(device))
    return f"{facts.name}, compute {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def _kernels(problems: list[str], failures: list[str]) -> dict[str, dict[str, Any]]:
    """Operator -> device -> path, reason and checks. The kernels say so themselves; this core knows none by name."""
    kernels = importlib.import_module("patchkit.kernels")
    survey = getattr(kernels, "survey", None)
    if survey is None:
        problems.append("the installed kernels do not say which path they take")
        return {}
    out: dict[str, dict[str, Any]] = {}
    for device in dict.fromkeys(_numbered(d) for d in loading.devices()):
        try:
            found = survey(device)
        except Exception as error:  # a broken kernel is what a doctor is for
            failures.append(f"the kernels cannot say which path they take on {device}: {error}")
            continue
        for finding in found:
            checks = {dtype: check._asdict() for dtype, check in finding.checks.items()}
            entry = {"path": finding.path, "reason": finding.reason, "checks": checks}
            out.setdefault(finding.operator, {})[device] = entry
            for dtype, failure in finding.failures.items():
                failures.append(f"{finding.operator} on {device} in {dtype} ({finding.path}): {failure}")
    return out


def _numbered(device: str) -> str:
    """``cuda`` is the first card, which has a number as well."""
    return "cuda:0" if device == "cuda" else device

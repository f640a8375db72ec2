"""What a sample depends on, as one short key.

A sample is computed again when its key has changed, and only then. What its figures depend on is a key of its own:
where only that has changed, finished samples are measured again and not computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from patchkit.recipe_base import Recipe
from patchkit.runs import measure

_PROBED = 64  # numbers at both ends of each weight


def of(content: Mapping[str, Any]) -> str:
    """The key of plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """Of the packages that decide what a model computes."""
    return measure.versions(("torch", "diffusers", "transformers", "patchkit"))


@cache
def calling_code() -> str:
    """Of the code that loads and calls every model, patched or not."""
    return _hash([_root() / name for name in ("runs/calls.py", "runs/loading.py", "evaluation/counting.py")])


@cache
def measuring_code() -> str:
    """Of the code that measures finished samples."""
    own = [_root() / "evaluation" / f"{name}.py" for name in ("measures", "temporal", "learned")]
    return _hash(own, [_root() / "metrics.py", _root() / "media.py"], sorted((_root() / "zoo").glob("*.py")))


@cache
def mechanism_code() -> str:
    """Of the code that every patched sample goes through besides."""
    kernels = _package_folder("kernels")
    folders = [_root() / "adapters", *([kernels] if kernels else [])]
    return _hash(sorted(_root().glob("*.py")), *(sorted(folder.rglob("*.py")) for folder in folders))


def recipe_code(recipe: Recipe) -> str:
    """Of the code of one recipe: its file, or of a shipped one that has a folder, all in it."""
    module = sys.modules.get(type(recipe).__module__)
    name = getattr(module, "__file__", None)
    if name is None or not Path(name).is_file():
        return ""  # defined in a session; its options still tell
    path, shipped = Path(name).resolve(), _package_folder("recipes")
    if shipped is not None and shipped in path.parents and path.parent != shipped:
        folder = shipped / path.relative_to(shipped).parts[0]
        return _hash(sorted(folder.rglob("*.py")))
    return _hash([path])


def weights(target: Any) -> str:
    """Of a loaded model, wherever it came from: names, shapes and some numbers of each weight, and its settings."""
    digest = hashlib.sha256()
    for name, part in sorted(_parts(target).items()):
        config: Any = getattr(part, "config", None)
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        plain = {k: v for k, v in plain.items() if not k.startswith("_")}
        digest.update(f"{name} {type(part).__qualname__} {json.dumps(plain, sort_keys=True, default=str)}".encode())
        if isinstance(part, torch.nn.Module):
            for key, value in (*part.named_parameters(), *part.named_buffers()):
                digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode() + _probe(value))
    return digest.hexdigest()[:16]


def _parts(target: Any) -> dict[str, Any]:
    components = getattr(target, "components", None)
    if isinstance(components, dict):
        return {name: part for name, part in components.items() if part is not None}
    return {"model": target}


def _probe(value: torch.Tensor) -> bytes:
    if value.is_meta:
        return b""  # offloaded: waits elsewhere
    flat = value.detach().reshape(-1)
    ends = torch.cat([flat[:_PROBED], flat[-_PROBED:]]).cpu()
    return ends.contiguous().view(torch.uint8).numpy().tobytes()


def file_digest(path: Path) -> str:
    """Of a picture or video that is an input."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _root() -> Path:
    import patchkit

    assert patchkit.__file__ is not None
    return Path(patchkit.__file__).resolve().parent


def _package_folder(name: str) -> Path | None:
    """Where a sub-package of patchkit lies, installed or in a checkout, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec(f"patchkit.{name}")
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _hash(*groups: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in (path for group in groups for path in group):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

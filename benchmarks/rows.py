"""What every benchmark row carries, and how it is written."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Conditions that move from minute to minute: they stand in a row, but do not make it another measurement.
MOMENTARY = frozenset(("clock_mhz", "memory_clock_mhz", "temperature_c", "load_before", "load_after"))
_SMI = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
}


def conditions(device: str | None = None) -> dict[str, Any]:
    """Device and versions.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None = a GPU if there is one.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if not device.startswith("cuda"):
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": _processor(), "capability": capability, "threads": torch.get_num_threads()} | found
    facts = torch.cuda.get_device_properties(torch.device(device))
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        **found,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
        **_smi(torch.device(device).index or 0),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _smi(index: int) -> dict[str, Any]:
    """What the driver's own tool says of one card; nothing where it is not installed."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(_SMI.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_SMI, (_number(cell.strip()) for cell in done.stdout.strip().split(",")), strict=False))


def _number(text: str) -> Any:
    try:
        return float(text) if text.count(".") < 2 else text
    except ValueError:
        return text


@functools.cache
def kernels_hash() -> str:
    """Of the kernels' source: a row holds for the code that it was measured with."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """The conditions among a row's entries that tell whether it was measured under the same ones."""
    return {k: v for k, v in row.items() if k not in MOMENTARY}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, at once: what is measured stays when a run is cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Replace ``results/NAME.jsonl``; the conditions stand in every row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    shared = conditions()
    path.write_text("".join(json.dumps(shared | row) + "\n" for row in rows))
    return path

"""Checks that need patchkit as users have it: built as a wheel and installed, away from the checkout.

Types (mypy), import rules (import-linter), no stray top-level packages, and ``patchkit run adaspa`` in an empty folder.

The environment it makes reads the heavy dependencies of the environment that runs this script, through one .pth file,
instead of installing them a second time. patchkit itself is found first in the new one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename=sys.argv[1]))"
STRAY = """
import importlib.util, patchkit, sys
found = [n for n in ("kernels", "recipes", "cli") if importlib.util.find_spec(n)]
sys.exit(f"top-level packages that should not be there: {found}" if found else 0)
"""


def main() -> None:
    """Make the environment, then run every check in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment to make anew")
    parser.add_argument("--run", action="store_true", help="also run the demo recipe in an empty folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = install(build(folder), arguments.venv.absolute())
        empty = folder / "empty"
        empty.mkdir()
        step("types", [python, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "patchkit"], empty)
        step("import rules", [python, "-I", "-c", LINT, rules(folder / "rules.ini")], empty)
        step("no stray packages", [python, "-I", "-c", STRAY], empty)
        if arguments.run:
            run_demo(python, empty)


def build(folder: Path) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    step("wheel", [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", source], folder, capture=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    return wheel


def install(wheel: Path, venv: Path) -> Path:
    """An environment with the wheel in it and the rest behind a .pth file. Returns its interpreter."""
    shutil.rmtree(venv, ignore_errors=True)
    step("environment", [sys.executable, "-m", "venv", venv], wheel.parent)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    place = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", place], check=True, capture_output=True, text=True).stdout.strip())
    (site / "heavy-dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--ignore-installed"]
    step("install", [python, "-m", "pip", "install", *options, wheel], wheel.parent)
    return python


def rules(path: Path) -> Path:
    """The import rules, with every module of the core among those that kernels may not import."""
    parts = sorted({entry.stem for entry in (ROOT / "patchkit").iterdir() if entry.suffix in ("", ".py")})
    core = [f"    patchkit.{name}\n" for name in parts if not name.startswith("_")]
    text = (ROOT / ".importlinter").read_text(encoding="utf-8")
    marker = "forbidden_modules =\n"
    path.write_text(text.replace(marker, marker + "".join(core)), encoding="utf-8")
    return path


def run_demo(python: Path, folder: Path) -> None:
    """Few steps: whether the result is good is for the tests to say, here it must only appear."""
    command = [python.parent / "patchkit", "run", "adaspa", "--num-inference-steps", "6", "--json"]
    done = step("patchkit run adaspa", command, folder, capture=True)
    result = json.loads(done)
    missing = [f for f in result["files"].values() if not (folder / f).is_file()]
    if missing or "metrics" not in result["files"]:
        sys.exit(f"patchkit run adaspa did not write {missing or 'metrics.json'}")
    print("wrote", ", ".join(result["files"].values()), flush=True)


def step(name: str, command: list[str | Path], folder: Path, *, capture: bool = False) -> str:
    """Run one check away from the checkout; the first that fails ends everything."""
    print(f"--- {name}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout or "", done.stderr or "", flush=True)
        sys.exit(f"{name}: failed with exit code {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    main()

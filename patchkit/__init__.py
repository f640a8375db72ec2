"""patchkit."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "recipes").is_dir() and (_here.parent / "recipes").is_dir():
    __path__.append(str(_here.parent))  # a plain checkout: the folders beside this one are our subpackages

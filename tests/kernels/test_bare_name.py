"""In a script started in the checkout `kernels` is importable, and transformers does so: no operator may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, "")
import torch
import patchkit.kernels
from transformers.utils import is_kernels_available
available = is_kernels_available()
print(available, [n for n in sys.modules if n.startswith("kernels.")], torch.ops.patchkit.block_mass is not None)
"""


def test_transformers_looks_for_a_library_of_that_name():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "False [] True"

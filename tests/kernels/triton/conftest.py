"""Triton's interpreter for the kernel tests of this folder, and buffers in which an unwritten lane shows."""

from __future__ import annotations

import os

# Read when a kernel is decorated, so it must be set before any module with kernels is imported.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def nan_buffers(monkeypatch):
    """Every freshly allocated floating buffer is NaN: what a kernel fails to write cannot pass for a result."""

    def poisoned(make):
        def allocate(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def on_triton(monkeypatch):
    """CPU tensors take the Triton path, interpreted."""
    from patchkit.kernels.sparse.triton import table as triton_table

    monkeypatch.setattr("patchkit.kernels.gpu.obstacle", lambda device: None)
    # fp32 stands in for the 16-bit types here, so it must go nearly as far as they do.
    monkeypatch.setitem(triton_table.LARGEST_D, 4, 128)

from __future__ import annotations

import pytest
import torch

from patchkit.kernels import paths, survey


def test_every_operator_says_its_path_and_agrees_with_its_reference() -> None:
    found = paths()
    assert set(found) == {"dense_attention", "block_sparse_attention", "block_mass", "merge_states"}
    assert "blocked" in found["block_sparse_attention"]
    for text in found.values():
        assert float(text.rpartition("relative error ")[2].rstrip(")")) < 1e-5


def test_a_wrong_operator_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torch.zeros(1, 2, 1000, 64)
    monkeypatch.setattr(survey, "block_sparse_attention", lambda *a: wrong)
    assert "1e+00" in paths()["block_sparse_attention"]

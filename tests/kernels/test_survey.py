from __future__ import annotations

import importlib

import pytest
import torch

from patchkit.kernels import paths

survey = importlib.import_module("patchkit.kernels.survey")  # the package has a function of that name

OPERATORS = {
    "dense_attention",
    "block_sparse_attention",
    "block_sparse_attention, backward",
    "block_mass",
    "merge_states",
    "row_topk",
    "dead_band",
    "find_runs",
    "pack_runs",
    "packed_attention",
    "class_attention",
    "redistribute",
    "redistribute, decoding",
    "routed_attention",
    "routed_attention, backward",
}


def test_every_operator_says_its_path_and_agrees_with_its_reference_in_three_dtypes() -> None:
    found = {finding.operator: finding for finding in survey.survey()}
    assert set(found) >= OPERATORS
    for finding in found.values():
        assert finding.failures == {}
        for name, check in finding.checks.items():
            limit = survey.TOLERANCE[getattr(torch, name)] * survey.BACKWARD
            assert check.error is not None
            assert check.error <= limit
    assert set(found["block_mass"].checks) == {"float32", "float16", "bfloat16"}
    assert (found["block_mass"].path, found["block_mass"].reason) == ("blocked", "Triton needs a GPU")
    assert found["block_sparse_attention"].path == "blocked"


def test_one_line_each() -> None:
    lines = paths()
    assert set(lines) >= OPERATORS
    assert "Triton needs a GPU" in lines["block_sparse_attention"]
    for text in lines.values():
        assert float(text.rpartition("relative error ")[2].rstrip(")")) < 1e-5


def test_a_wrong_operator_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q, k, v, layout, return_lse=False):
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(survey, "block_sparse_attention", wrong)
    found = {finding.operator: finding for finding in survey.survey()}
    assert "relative error 1.0e+00, allowed is" in found["block_sparse_attention"].failures["float16"]
    assert found["block_mass"].failures == {}


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "merge_states", lambda o1, lse1, o2, lse2: (o1 * float("nan"), lse1))
    found = {finding.operator: finding for finding in survey.survey()}
    assert "relative error inf" in found["merge_states"].failures["float32"]


def test_an_operator_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("out of\n registers")

    monkeypatch.setattr(survey, "block_mass", broken)
    found = {finding.operator: finding for finding in survey.survey()}
    assert found["block_mass"].failures["bfloat16"] == "RuntimeError: out of registers"
    assert found["block_mass"].checks["bfloat16"].error is None
    assert "failed" in str(found["block_mass"])

"""How dense attention with LSE calls torch's CUDA kernels, on meta tensors: arguments, shapes, no needless copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from patchkit.kernels.dense.library import CUDNN, EFFICIENT, FLASH, _aligned, _cuda

NAMES = {FLASH: "flash", EFFICIENT: "efficient", CUDNN: "cudnn"}


class Recorder(TorchDispatchMode):
    """Notes the arguments of the one attention kernel that is called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_scaled_dot_product" in func.name():
            names = [a.name for a in func._schema.arguments]
            self.calls.append((func.name(), dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))


def call(choice, D=64, heads=8, kv_heads=8, mask=None, scale=None, causal=False, N=200, M=333):
    q = torch.empty(2, N, heads, D, device="meta", dtype=torch.float16).transpose(1, 2)
    k, v = (torch.empty(2, M, kv_heads, D, device="meta", dtype=torch.float16).transpose(1, 2) for _ in range(2))
    with Recorder() as seen:
        out, lse = _cuda(choice, q, k, v, mask, scale, causal)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    [(name, arguments)] = seen.calls
    assert name == f"aten::_scaled_dot_product_{NAMES[choice]}_attention"
    return arguments


@pytest.mark.parametrize("choice", [FLASH, EFFICIENT, CUDNN], ids=NAMES.get)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_the_lse_is_asked_for_and_cut_to_the_rows(choice, D):
    given = call(choice, D, causal=True, scale=0.3)
    assert (given["scale"], given["is_causal"], given["dropout_p"]) == (0.3, True, 0.0)
    assert given["query"].stride() == (200 * 8 * D, D, 8 * D, 1)  # as the model made it
    if choice != FLASH:
        assert given["compute_log_sumexp"] is True
        assert given["attn_bias"] is None


@pytest.mark.parametrize("choice", [FLASH, CUDNN], ids=NAMES.get)
def test_grouped_heads_are_not_repeated(choice):
    given = call(choice, kv_heads=2)
    assert given["key"].shape == given["value"].shape == (2, 2, 333, 64)


def test_flash_gets_a_head_size_it_can_take_and_the_scale_of_the_true_one():
    given = call(FLASH, D=60)
    assert given["query"].shape[-1] == given["key"].shape[-1] == given["value"].shape[-1] == 64
    assert given["scale"] == 60**-0.5


@pytest.mark.parametrize("shape", [(333,), (200, 333), (2, 1, 1, 333), (2, 8, 200, 333), (2, 1, 200, 1)], ids=str)
def test_masks_reach_the_kernels_in_their_form(shape):
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    bias = call(EFFICIENT, mask=mask)["attn_bias"]
    assert bias.shape == (2, 8, 200, 333)
    assert bias.dtype == torch.float16
    assert bias.stride(-1) == 1
    assert not any(stride % 8 for stride in bias.stride()[:-1])
    bias = call(CUDNN, mask=mask)["attn_bias"]
    assert bias.dim() == 4
    assert bias.shape[1] == (shape[1] if len(shape) == 4 else 1)


def test_aligning_a_bias_keeps_its_values_and_copies_no_head():
    q, k = torch.empty(2, 4, 6, 8), torch.empty(2, 4, 13, 8)
    for shape in ((1, 1, 6, 13), (2, 4, 6, 13), (2, 1, 1, 13), (1, 1, 6, 1)):
        bias = torch.randn(shape)
        found = _aligned(bias, q, k)
        assert torch.equal(found, bias.expand(2, 4, 6, 13))
        assert found.untyped_storage().nbytes() <= 4 * 16 * bias[..., 0].numel()
    ready = F.pad(torch.randn(1, 1, 6, 13), (0, 3))[..., :13]
    assert _aligned(ready, q, k).data_ptr() == ready.data_ptr()

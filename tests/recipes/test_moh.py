"""MoH's gates against their formulas, and the preview on models of every kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch

import patchkit
from patchkit import InvalidOption
from patchkit.recipes.moh import MoH, auxiliary_loss
from patchkit.recipes.moh.balance import counted_tokens, imbalance
from patchkit.recipes.moh.budget import Budget
from patchkit.recipes.moh.gates import Weights, by_length, by_weights, spread_scores

TEXTS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
ALL = (*TEXTS, "bert", "vit")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weights(budget: Budget, width: int, gate: Any = "weighted") -> Weights:
    needed = Weights.needed(budget, gate)
    return Weights(**{name: noise(rows, width, seed=rows) for name, rows in needed.items()})


# --- budgets


@pytest.mark.parametrize(
    ("heads", "shared", "active", "expected"),
    [
        (32, 0.5, 0.75, (16, 8)),  # MoH-LLaMA3-8B
        (4, 0.5, 0.75, (2, 1)),  # Gemma 3 270M
        (10, 0.3, 0.7, (3, 4)),  # 0.7 * 10 is less than 7 in binary
        (24, 16, 19, (16, 3)),  # MoH-DiT-XL/2-90, last layers
        (2, 0.5, 1.0, (1, 1)),
        (8, 8, 8, (8, 0)),
        (8, 0, 0.5, (0, 4)),
    ],
)
def test_budgets(heads: int, shared: Any, active: Any, expected: tuple[int, int]) -> None:
    budget = Budget.of(heads, shared, active, "here")
    assert (budget.shared, budget.chosen) == expected
    assert budget.share == sum(expected) / heads


@pytest.mark.parametrize(("shared", "active"), [(9, 0.75), (0.5, 9), (6, 0.5), (0, 0), (0.1, 0.1)])
def test_budgets_that_no_layer_can_have(shared: Any, active: Any) -> None:
    with pytest.raises(InvalidOption, match="here"):
        Budget.of(8, shared, active, "here")


@pytest.mark.parametrize(
    "options",
    [
        {"shared": 1.2},
        {"active": 1.01},
        {"shared": 0.75, "active": 0.5},
        {"shared": 3, "active": 2},
        {"active": 0.0, "shared": 0.0},
        {"router": "norm"},
        {"gate": "soft"},
        {"mode": "eval"},
        {"shared_per_layer": []},
        {"shared_per_layer": [0.5], "active_per_layer": [0.5, 0.5]},
        {"shared_per_layer": [0.5, 0.9]},
        {"adapter": "somewhere", "shared": 0.25},
        {"adapter": "somewhere", "layers": "0"},
        {"heads": "0"},
    ],
)
def test_options_are_checked_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        MoH(**options)


def test_defaults_are_the_fixed_ones() -> None:
    assert (MoH().shared, MoH().active, MoH().router, MoH().gate, MoH().mode) == (
        0.5,
        0.75,
        "qnorm",
        "binary",
        "preview",
    )
    assert MoH(router="linear").gate == "weighted"
    assert dataclasses.replace(MoH(gate="weighted"), active=1.0).gate == "weighted"


# --- linear router


def test_linear_gates_are_one_at_zero_logits() -> None:
    budget = Budget(8, 3, 5)
    zeros = Weights(**{n: torch.zeros(rows, 16) for n, rows in Weights.needed(budget, "weighted").items()})
    gates = by_weights(noise(2, 7, 16), zeros, budget, "weighted", True)
    assert gates.value is not None
    torch.testing.assert_close(gates.value, torch.ones(2, 8, 7), atol=1e-6, rtol=0)


@pytest.mark.parametrize("budget", [Budget(8, 3, 2), Budget(8, 1, 4), Budget(8, 0, 3), Budget(8, 8, 0)])
def test_linear_gates_as_the_formula_reads(budget: Budget) -> None:
    x, weights = noise(2, 7, 16), random_weights(budget, 16)
    gates = by_weights(x, weights, budget, "weighted", True)
    assert gates.value is not None
    value = gates.value.transpose(1, 2)  # (B, N, H)
    a = 2 * torch.softmax(x @ weights.stages.T, -1) if weights.stages is not None else torch.ones(2, 7, 2)
    torch.testing.assert_close(value.sum(-1), a[..., 0] * budget.shared + a[..., 1] * budget.chosen)
    assert ((value != 0).sum(-1) == budget.shared + budget.chosen).all()
    assert torch.equal(gates.value != 0, gates.active)
    if weights.routed is not None:
        p = torch.softmax(x @ weights.routed.T, -1)
        best = p.topk(budget.chosen, -1).indices
        m = torch.zeros_like(p).scatter_(-1, best, 1.0)
        r = budget.chosen * (p * m) / (p * m).sum(-1, keepdim=True)
        torch.testing.assert_close(r.sum(-1), torch.full((2, 7), float(budget.chosen)))
        torch.testing.assert_close(value[..., budget.shared :], a[..., 1:] * r)
    if weights.shared is not None:
        s = budget.shared * torch.softmax(x @ weights.shared.T, -1)
        torch.testing.assert_close(value[..., : budget.shared], a[..., :1] * s)


# --- router by length


def test_scores_as_the_formula_reads() -> None:
    q = noise(2, 8, 7, 16)
    budget = Budget(8, 3, 2)
    gates = by_length(q, budget, "binary", True)
    n = q.norm(dim=-1)[:, 3:]
    p = torch.softmax(n / n.std(1, keepdim=True, unbiased=True), 1)
    assert gates.scores is not None
    torch.testing.assert_close(gates.scores, p)
    assert torch.equal(gates.active[:, 3:], torch.zeros(2, 5, 7).scatter_(1, p.topk(2, 1).indices, 1.0).bool())
    assert gates.active[:, :3].all()
    torch.testing.assert_close(spread_scores(7.5 * n), p)  # a common factor of the queries changes nothing
    assert by_length(q, budget, "binary", False).value is None


def test_router_is_computed_in_fp32() -> None:
    """Norms that bf16 cannot tell apart must not be confused."""
    q = torch.zeros(1, 4, 1, 512, dtype=torch.bfloat16)
    q[0, :, 0] = 1.0
    q[0, 2, 0, :2] = 1.0078125  # norm 22.6278 instead of 22.6274: the same number in bf16
    gates = by_length(q, Budget(4, 0, 1), "binary", False)
    assert gates.active[0, :, 0].tolist() == [False, False, True, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = by_weights(noise(1, 3, 8), random_weights(Budget(4, 1, 2), 8), Budget(4, 1, 2), "weighted", True)
    assert x.value is not None
    assert x.value.dtype == torch.float32


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("gate", ["binary", "weighted"])
@pytest.mark.parametrize("case", ["one routed head", "equal norms", "zero queries"])
def test_degenerate_norms_give_no_nan(case: str, gate: Any, train: bool) -> None:
    q = noise(1, 4, 5, 8)
    budget = Budget(4, 3, 1) if case == "one routed head" else Budget(4, 1, 2)
    if case == "equal norms":
        q = torch.nn.functional.normalize(q, dim=-1)[:, :1].expand(-1, 4, -1, -1).clone()
    elif case == "zero queries":
        q = torch.zeros_like(q)
    q.requires_grad_()
    gates = by_length(q, budget, gate, train)
    value = gates.value if gates.value is not None else gates.active.float()
    assert value.isfinite().all()
    if value.requires_grad:
        (value * noise(*value.shape)).sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()


def test_straight_through() -> None:
    """The forward is exactly 0 or 1; heads that are off have a gradient, too, and it reaches the queries."""
    budget = Budget(6, 2, 2)
    q = noise(2, 6, 5, 8).requires_grad_()
    gates = by_length(q, budget, "binary", True)
    assert gates.value is not None
    assert set(gates.value.unique().tolist()) == {0.0, 1.0}
    outputs = noise(2, 6, 5, 8, seed=3)
    value = gates.value
    value.retain_grad()
    (value[..., None] * outputs).sum().backward()
    off = ~gates.active
    assert (value.grad[off] != 0).all()
    torch.testing.assert_close(value.grad, outputs.sum(-1))
    assert (q.grad[:, 2:].norm(dim=-1) > 0).all()
    assert (q.grad[:, :2] == 0).all()


# --- load balance


def test_imbalance_of_uniform_routing_is_k() -> None:
    heads, chosen = 6, 2
    scores = torch.full((1, heads, 12), 1 / heads)
    active = torch.zeros(1, heads, 12, dtype=torch.bool)
    for token in range(12):
        active[0, [(2 * token) % heads, (2 * token + 1) % heads], token] = True
    assert float(imbalance(scores, active, None)) == pytest.approx(chosen)


def test_imbalance_falls_from_a_collapsed_router_and_only_p_has_a_gradient() -> None:
    x, budget = noise(4, 32, 16), Budget(6, 0, 2)
    x[..., 0] = 1.0
    weight = torch.zeros(6, 16)
    weight[0, 0], weight[1, 0] = 3.0, 2.5  # everybody chooses heads 0 and 1
    weight.requires_grad_()
    first = None
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(80):
        gates = by_weights(x, Weights(routed=weight), budget, "weighted", True)
        assert gates.scores is not None
        loss = imbalance(gates.scores, gates.active, None)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 4
    assert float(loss.detach()) < 2.3
    scores = torch.softmax(noise(1, 4, 5), 1).requires_grad_()
    f = torch.zeros(1, 4, 5, dtype=torch.bool)
    f[:, 1] = True
    imbalance(scores, f, None).backward()
    expected = torch.zeros(1, 4, 5)
    expected[:, 1] = 4 * 4 / 4 / 5  # E^2 / E f_i / N, and nothing for heads that nobody chose
    torch.testing.assert_close(scores.grad, expected)


def test_padding_and_prompt_do_not_count() -> None:
    scores, active = torch.softmax(noise(2, 4, 6), 1), noise(2, 4, 6, seed=1) > 0
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 5, 5, 5], [-100, 5, 5, 5, 5, 5]])
    counted = counted_tokens(mask, labels)
    assert counted is not None
    assert counted.tolist() == (labels != -100).tolist()
    before = imbalance(scores, active, counted)
    spoiled, off = scores.clone(), active.clone()
    spoiled[0, :, :3], off[0, :, :3] = 100.0, True
    assert torch.equal(imbalance(spoiled, off, counted), before)
    assert not torch.equal(imbalance(spoiled, off, None), imbalance(scores, active, None))
    assert counted_tokens(mask, None).tolist() == mask.bool().tolist()
    assert counted_tokens(None, None) is None


# --- preview


def attention_of(model: Any, entry: Any) -> list[tuple[Any, torch.Tensor, Any]]:
    """(module, what it is given, what it returns) of every attention, as the model runs now."""
    seen: list[Any] = []
    modules = [m for m in model.modules() if hasattr(m, "config") and type(m).__name__.endswith("Attention")]
    hooks = [
        m.register_forward_hook(
            lambda m, a, k, o: seen.append((m, a[0] if a else k["hidden_states"], o)), with_kwargs=True
        )
        for m in modules
    ]
    tiny.forward(entry, model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ALL)
def test_preview(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    plain = tiny.forward(entry, model)
    with patchkit.apply(model, "moh", min_tokens=0) as patch:
        few = tiny.forward(entry, model)
        account = patch.report()["recipes"][0]
        assert account["figures"]["share of heads active"] == pytest.approx(0.75)
        assert len(account["rows"]) == 2
        assert all(row["values"]["active"][:2] == [1.0, 1.0] for row in account["rows"])
        assert account["dense"] == {}
    assert torch.equal(tiny.forward(entry, model), plain)
    assert (few - plain).norm() / plain.norm() > 0.05
    with patchkit.apply(model, "moh"):
        gated = tiny.forward(entry, model)  # every head computed, then gated
    mask = entry.inputs(model).get("attention_mask")
    rows = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(few[rows], gated[rows], atol=2e-5, rtol=1e-4)
    with patchkit.apply(model, "moh", active=1.0, min_tokens=0):
        assert torch.equal(tiny.forward(entry, model), plain)


def test_heads_are_summed_with_their_gates() -> None:
    """sum_i g_i O_i W_O^i: the routed heads' lengths are those of q_proj, before any norm."""
    for name in ("qwen3", "gemma3", "llama"):
        entry = tiny.MODELS[name]
        model = entry.build()
        plain = attention_of(model, entry)
        (module, x, out), heads = plain[0], 4
        with patchkit.apply(model, "moh"):
            patched = attention_of(model, entry)[0][2][0]
        q = module.q_proj(x).view(*x.shape[:2], heads, -1)
        n = q.norm(dim=-1)[..., 2:]
        g = torch.cat([torch.ones(*x.shape[:2], 2), (n == n.amax(-1, keepdim=True)).float()], -1)
        seen: list[torch.Tensor] = []
        hook = module.o_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        tiny.forward(entry, model)
        hook.remove()
        o = seen[0].view(*x.shape[:2], heads, -1)
        w = module.o_proj.weight.view(module.o_proj.weight.shape[0], heads, -1)
        expected = sum(g[..., i, None] * (o[..., i, :] @ w[:, i].T) for i in range(heads))
        torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(patched, out[0], atol=1e-3), name


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_are_routed_alone(name: str) -> None:
    """Decoding with a cache is the full forward; what comes later, or stands beside, changes nothing."""
    entry = tiny.MODELS[name]
    model = entry.build()
    with patchkit.apply(model, "moh"):
        assert torch.equal(tiny.generate(entry, model), tiny.generate(entry, model, use_cache=False))
        given = entry.inputs(model)
        logits = tiny.forward(entry, model)
        with torch.no_grad():
            swapped = model(**{n: v.flip(0) for n, v in given.items()}).logits.flip(0)
            earlier = model(**{n: v[:, :-2] for n, v in given.items()}).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(swapped[real], logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(earlier[real[:, :-2]], logits[:, :-2][real[:, :-2]], atol=1e-5, rtol=1e-5)


def test_uneven_budgets_over_depth() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build(layers=3)
    with patchkit.apply(model, "moh", shared_per_layer=[1, 0.5, 1.0], active_per_layer=[2, 0.75, 1.0]) as patch:
        tiny.forward(entry, model)
        rows = patch.report()["recipes"][0]["rows"]
        assert [sum(r["values"]["active"]) / 4 for r in rows] == [0.5, 0.75, 1.0]
        assert patch.report()["recipes"][0]["figures"]["share of heads active"] == pytest.approx(0.75)
    for options in ({"active_per_layer": [0.75, 0.75]}, {"active": 5}, {"shared": 3, "active": 0.5}):
        with pytest.raises(InvalidOption, match="moh"):
            patchkit.apply(model, "moh", **options)


def test_two_heads_of_two_are_dense() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    ).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with patchkit.apply(model, "moh", shared=1, active=2):
            assert torch.equal(model(ids).logits, plain)


def test_a_router_that_has_to_be_trained_is_refused() -> None:
    model = tiny.MODELS["llama"].build()
    with pytest.raises(InvalidOption, match="by chance"):
        patchkit.apply(model, "moh", router="linear")


def test_training_without_an_adapter() -> None:
    entry = tiny.MODELS["qwen3"]
    model = entry.build()
    given = entry.inputs(model)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    with patchkit.apply(model, "moh", mode="train") as patch:
        own = model(**given, labels=labels)
        aux = auxiliary_loss(model)
        assert aux is not None
        model.train()
        loss = model(**given, labels=labels).loss
        torch.testing.assert_close(loss, own.loss + 0.01 * aux)
        loss.backward()
        assert any("gradients" in reason for reason in patch.report()["recipes"][0]["dense"])
    assert auxiliary_loss(model) is None, "it outlives its patch"
    masked = patchkit.apply(model, "moh")
    straight = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(**given, labels=labels).loss.backward()
    assert not torch.allclose(straight, model.model.layers[0].self_attn.q_proj.weight.grad)
    masked.remove()


def test_the_load_balance_loss_is_that_of_the_patches_that_are_on() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build().train()
    given = entry.inputs(model)
    labels = given["input_ids"]
    with patchkit.apply(model, "moh", mode="train") as patch:
        loss = model(**given, labels=labels).loss
        with pytest.raises(patchkit.Conflict):
            patchkit.apply(model, "moh", mode="train")
        patchkit.plan(model, "moh", mode="train")
        assert torch.equal(model(**given, labels=labels).loss, loss), "what was refused or only planned cut it off"
        whole = auxiliary_loss(model)
        assert whole is not None
        with torch.no_grad():
            model(**given, labels=labels)
        assert auxiliary_loss(model) is None, "of an earlier forward"
        model(**given, labels=labels)
        patch.disable()
        model(**given, labels=labels)
        assert auxiliary_loss(model) is None
    with (
        patchkit.apply(model, "moh", mode="train", layers="0"),
        patchkit.apply(model, "moh", mode="train", layers="1-"),
    ):
        assert torch.equal(model(**given, labels=labels).loss, loss)
        assert torch.equal(auxiliary_loss(model), whole)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiled(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    with patchkit.apply(model, "moh") as patch:
        plain = tiny.forward(entry, model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(tiny.forward(entry, compiled), plain, atol=1e-5, rtol=1e-5)
        reasons = set(patch.report()["recipes"][0]["dense"])
        assert reasons == {"all heads are computed and gated: too short to gain over dense"}


def test_gradients_of_a_compiled_patch_are_refused() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build().train()
    ids = torch.arange(3, 27)[None]
    with patchkit.apply(model, "moh", mode="train"):
        torch._dynamo.reset()
        loss = torch.compile(model, backend="eager")(input_ids=ids, labels=ids).loss
        with pytest.raises(patchkit.PatchkitError, match="no gradients"):
            loss.backward()


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        ).eval()  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def draw(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(noise(2, 4, 8, 8), timestep=torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])).sample


def test_dit() -> None:
    model = dit()
    plain = draw(model)
    with patchkit.apply(model, "moh", min_tokens=0) as patch:
        few = draw(model)
        assert patch.report()["recipes"][0]["figures"]["share of heads active"] == pytest.approx(0.75)
    with patchkit.apply(model, "moh"):
        torch.testing.assert_close(draw(model), few, atol=1e-5, rtol=1e-4)
    with patchkit.apply(model, "moh", active=1.0):
        assert torch.equal(draw(model), plain)
    assert not torch.allclose(few, plain, atol=1e-3)
    assert torch.equal(draw(model), plain)

"""MoH as an adapter of peft: what it computes, what it trains, how it is saved, loaded and taken off."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from peft import LoraConfig, PeftModel, get_peft_model
from recipes.test_moh import dit, draw, noise

import patchkit
from patchkit import InvalidOption
from patchkit.recipes.moh import MoHConfig, auxiliary_loss

LORA = {
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
}
MODELS = ("llama", "qwen3", "gemma3", "gpt2", "bert", "vit")


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """Entries of transformers' registries stay for good: they must be there before fingerprints are taken."""
    from patchkit.finetune.layer import _register

    _register()
    patchkit.apply(tiny.MODELS["bert"].build(), "moh").remove()


def config(name: str = "llama", lora: bool = True, **options: Any) -> MoHConfig:
    return MoHConfig(**options, lora={"r": 4, "target_modules": LORA.get(name, ["q_proj", "v_proj"])} if lora else None)


def shaken(model: Any) -> Any:
    """Adapters begin with zeros that change nothing; these do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 390, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# --- coming and going


@pytest.mark.parametrize("router", ["qnorm", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_loaded_switched_and_unloaded(name: str, router: Any, tmp_path: Path) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    plain, before, keys = tiny.forward(entry, model), fingerprint(model), list(model.state_dict())
    tuned = shaken(get_peft_model(model, config(name, router=router)))
    out = tiny.forward(entry, tuned)
    assert not torch.equal(out, plain)
    with tuned.disable_adapter():
        assert torch.equal(tiny.forward(entry, tuned), plain)
    assert torch.equal(tiny.forward(entry, tuned), out)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(tiny.forward(entry, PeftModel.from_pretrained(entry.build(), tmp_path)), out)
    other = entry.build()
    other.load_adapter(str(tmp_path))  # transformers' own
    assert torch.equal(tiny.forward(entry, other), out)
    assert tuned.unload() is model
    for parameter in model.parameters():
        parameter.requires_grad = True  # as peft leaves them frozen
    assert_same(before, fingerprint(model))
    assert list(model.state_dict()) == keys
    assert torch.equal(tiny.forward(entry, model), plain)


def test_an_adapter_without_any_parameter(tmp_path: Path) -> None:
    entry = tiny.MODELS["qwen3"]
    tuned = get_peft_model(entry.build(), MoHConfig())
    out = tiny.forward(entry, tuned)
    with patchkit.apply(entry.build(), "moh") as patch:
        assert torch.equal(tiny.forward(entry, patch._installation.target), out)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(tiny.forward(entry, PeftModel.from_pretrained(entry.build(), tmp_path)), out)


@pytest.mark.parametrize("options", [{}, {"router": "linear"}, {"router": "linear", "gate": "binary"}])
def test_everything_on_is_dense(options: dict[str, Any]) -> None:
    entry = tiny.MODELS["qwen3"]
    model = entry.build()
    plain = tiny.forward(entry, model)
    tuned = get_peft_model(model, MoHConfig(active=1.0, **options))
    for name, parameter in tuned.named_parameters():
        if "moh_" in name:
            torch.nn.init.zeros_(parameter)
    if options.get("gate") == "binary" or not options:
        assert torch.equal(tiny.forward(entry, tuned), plain)
    torch.testing.assert_close(tiny.forward(entry, tuned), plain, atol=1e-5, rtol=1e-5)


def test_it_cannot_be_merged() -> None:
    tuned = get_peft_model(tiny.MODELS["llama"].build(), config())
    for merge in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(InvalidOption, match="depends on the input"):
            merge()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_copies_are_tuned_and_stand_alone(name: str, how: Any) -> None:
    entry = tiny.MODELS[name]
    tuned = shaken(get_peft_model(entry.build(), config(name, router="linear")))
    out = tiny.forward(entry, tuned)
    other = how(tuned)
    tuned.unload()
    assert torch.equal(tiny.forward(entry, other), out)
    shaken(other)
    with other.disable_adapter():
        assert not torch.equal(tiny.forward(entry, other), out)


def test_two_adapters_take_turns(tmp_path: Path) -> None:
    entry = tiny.MODELS["qwen3"]
    tuned = shaken(get_peft_model(entry.build(), config(router="linear"), adapter_name="first"))
    first = tiny.forward(entry, tuned)
    tuned.add_adapter("second", config(active=0.5))
    assert torch.equal(tiny.forward(entry, tuned), first)
    tuned.set_adapter("second")
    second = tiny.forward(entry, tuned)
    assert not torch.equal(second, first)
    tuned.set_adapter("first")
    assert torch.equal(tiny.forward(entry, tuned), first)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(entry.build(), tmp_path / "second", adapter_name="second")
    assert torch.equal(tiny.forward(entry, loaded), second)
    tuned.delete_adapter("first")
    tuned.set_adapter("second")
    assert torch.equal(tiny.forward(entry, tuned), second)


def test_a_patch_on_top(tmp_path: Path) -> None:
    entry = tiny.MODELS["llama"]
    tuned = shaken(get_peft_model(entry.build(), config(router="linear")))
    out = tiny.forward(entry, tuned)
    with patchkit.apply(tuned, "moh", active=1.0):
        assert torch.equal(tiny.forward(entry, tuned), out)
    assert torch.equal(tiny.forward(entry, tuned), out)


def test_the_recipe_puts_a_trained_adapter_on(tmp_path: Path) -> None:
    entry = tiny.MODELS["qwen3"]
    tuned = shaken(get_peft_model(entry.build(), config(router="linear", active=0.5)))
    out = tiny.forward(entry, tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    model = entry.build()
    before, plain = fingerprint(model), tiny.forward(entry, model)
    with patchkit.apply(model, "moh", adapter=str(tmp_path / "adapter")) as patch:
        assert torch.equal(tiny.forward(entry, model), out)
        account = patch.report()["recipes"][0]
        assert account["figures"]["share of heads active"] == pytest.approx(0.5)
        assert account["rows"][0]["calls"] == 1
        patch.disable()
        assert torch.equal(tiny.forward(entry, model), plain)
        patch.enable()
        assert torch.equal(tiny.forward(entry, model), out)
    assert_same(before, fingerprint(model))
    assert torch.equal(tiny.forward(entry, model), plain)
    for folder, wrong in ((tmp_path, model), (tmp_path / "adapter", tiny.MODELS["gpt2"].build())):
        untouched = fingerprint(wrong)
        with pytest.raises(InvalidOption):
            patchkit.apply(wrong, "moh", adapter=str(folder))
        assert_same(untouched, fingerprint(wrong))


def test_dit_with_its_processors_replaced_meanwhile() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    model = dit()
    plain = draw(model)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    tuned = shaken(get_peft_model(model, MoHConfig(router="linear")))
    out = draw(tuned)
    assert not torch.allclose(out, plain, atol=1e-3)
    assert torch.equal(draw(copy.deepcopy(tuned)), out)
    model.transformer_blocks[0].attn1.processor = AttnProcessor2_0()
    assert torch.equal(draw(tuned), out)
    with tuned.disable_adapter():
        assert torch.equal(draw(tuned), plain)
    assert torch.equal(draw(tuned.unload()), plain)
    assert [m.processor for m in model.modules() if hasattr(m, "processor")][1] is processors[1]


# --- LoRA


def test_lora_of_its_own_keeps_its_names_and_trains_beside() -> None:
    entry = tiny.MODELS["qwen3"]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    names = [n for n, _ in get_peft_model(entry.build(), lora).named_parameters() if "lora_" in n]
    tuned = get_peft_model(entry.build(), MoHConfig(router="linear"))
    both = get_peft_model(tuned.get_base_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert [n for n, _ in both.named_parameters() if "lora_" in n] == names
    inside = get_peft_model(entry.build(), config(router="linear"))
    assert [n for n, _ in inside.named_parameters() if "lora_" in n] == names
    for model in (both, inside):
        shaken(model).train()(**batch()).loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum("moh_" in n for n in trained) == 6
        assert sum("lora_" in n for n in trained) == 8
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.parametrize("first", ["lora", "moh"])
@pytest.mark.parametrize("own", [False, True])
def test_each_is_unloaded_and_saved_alone(first: str, own: bool, tmp_path: Path) -> None:
    """Two adapters of two tuners, both called default where they may be: neither takes the other's place."""
    entry = tiny.MODELS["qwen3"]
    base = entry.build()
    plain = tiny.forward(entry, base)
    lora_name = "other" if own else "default"

    def lora(model: Any) -> Any:
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]), lora_name)

    def moh(model: Any) -> Any:
        return get_peft_model(model, config(lora=own, router="linear", modules_to_save=["lm_head"]))

    only = tiny.forward(entry, shaken(lora(entry.build())))
    if first == "lora":
        one = shaken(lora(base))
        two = moh(one.get_base_model())
    else:
        two = moh(base)
        one = lora(two.get_base_model())
        shaken(one)
    one.save_pretrained(tmp_path / "lora")
    two.save_pretrained(tmp_path / "moh")
    folder = tmp_path / "lora" / lora_name if own else tmp_path / "lora"
    assert '"LORA"' in (folder / "adapter_config.json").read_text()
    assert '"PATCHKIT_MOH"' in (tmp_path / "moh" / "adapter_config.json").read_text()
    assert two.unload() is base
    one.set_adapter(lora_name)
    if first == "lora":
        assert torch.equal(tiny.forward(entry, one), only)
    assert list(base.peft_config) == [lora_name]
    assert not any("head_router" in name or "modules_to_save" in name for name, _ in base.named_modules())
    assert one.unload() is base
    assert torch.equal(tiny.forward(entry, base), plain)
    assert not hasattr(base, "peft_config")


def test_lora_layers_of_one_name_are_refused_twice() -> None:
    model = get_peft_model(tiny.MODELS["qwen3"].build(), LoraConfig(r=4, target_modules=["q_proj"])).get_base_model()
    before = fingerprint(model)
    with pytest.raises(patchkit.Conflict, match="default"):
        get_peft_model(model, config())
    assert_same(before, fingerprint(model))


def test_router_sees_lora_that_comes_later() -> None:
    """With a query norm, lengths are those of the projection with LoRA on it, whichever came first."""
    entry = tiny.MODELS["qwen3"]

    def lora(model: Any) -> Any:
        return shaken(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])))

    first = lora(get_peft_model(entry.build(), MoHConfig()).get_base_model())
    then = get_peft_model(lora(entry.build()), MoHConfig())
    out = tiny.forward(entry, first)
    assert torch.equal(tiny.forward(entry, then), out)
    model = entry.build()
    with patchkit.apply(model, "moh"):
        assert torch.equal(tiny.forward(entry, lora(model)), out)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"shared": 0.8, "active": 0.5}, "less than shared"),
        ({"active": 1.5}, "no amount"),
        ({"router": "norm"}, "no router"),
        ({"gate": "soft"}, "no gate"),
        ({"balance": -1.0}, "negative"),
        ({"balance": "much"}, "no number"),
        ({"balance": float("nan")}, "no number"),
        ({"active": float("nan")}, "no amount"),
        ({"min_tokens": 1.5}, "no whole number"),
        ({"shared_per_layer": 0.5}, "no list"),
        ({"lora": {"rank": 4}}, "no LoRA configuration"),
        ({"lora": 4}, "a int"),
        ({"lora": {"use_dora": True}}, "use_dora"),
    ],
)
def test_configurations_are_checked(options: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidOption, match=what):
        MoHConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"active": 9}, {"active_per_layer": [0.75]}, {"target_modules": ["mlp"]}, {"target_modules": ["q_proj"]}],
)
def test_a_model_that_does_not_fit_is_left_alone(options: dict[str, Any]) -> None:
    model = tiny.MODELS["llama"].build()
    before = list(dict(model.named_modules()))
    with pytest.raises(patchkit.PatchkitError):
        get_peft_model(model, MoHConfig(**options))
    assert list(dict(model.named_modules())) == before


@pytest.mark.parametrize("lora", [True, False])
def test_whole_modules_beside_it(lora: bool, tmp_path: Path) -> None:
    entry = tiny.MODELS["llama"]
    given: dict[str, Any] = {"router": "linear", "lora": lora, "modules_to_save": ["lm_head"]}
    tuned = shaken(get_peft_model(entry.build(), config(**given)))
    out = tiny.forward(entry, tuned)
    tuned.save_pretrained(tmp_path)
    model = entry.build()
    before, plain = fingerprint(model), tiny.forward(entry, model)
    with patchkit.apply(model, "moh", adapter=str(tmp_path)) as patch:
        assert torch.equal(tiny.forward(entry, model), out)
        patch.disable()
        assert torch.equal(tiny.forward(entry, model), plain)
    assert_same(before, fingerprint(model))
    bare = PeftModel.from_pretrained(model, tmp_path).unload()
    assert list(bare.state_dict()) == list(entry.build().state_dict())
    assert torch.equal(tiny.forward(entry, bare), plain)


def test_lora_that_does_not_fit_leaves_nothing() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build()
    before = fingerprint(model)
    wrong = MoHConfig(router="linear", modules_to_save=["lm_head"], lora={"r": 4, "target_modules": ["nothing"]})
    with pytest.raises(ValueError, match="nothing"):
        get_peft_model(model, wrong)
    assert_same(before, fingerprint(model))
    tuned = shaken(get_peft_model(model, config(router="linear")))
    out, names = tiny.forward(entry, tuned), list(tuned.state_dict())
    with pytest.raises(ValueError, match="nothing"):
        tuned.add_adapter("other", MoHConfig(router="linear", lora={"r": 4, "target_modules": ["nothing"]}))
    assert list(tuned.state_dict()) == names
    assert torch.equal(tiny.forward(entry, tuned), out)


def test_a_patch_on_top_goes_on_without_it() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build()
    before = fingerprint(model)
    with patchkit.apply(model, "moh", active=0.5):
        alone = tiny.forward(entry, model)
    tuned = get_peft_model(model, MoHConfig(active=1.0, target_modules=["layers.0.self_attn"]))
    patch = patchkit.apply(model, "moh", active=0.5)
    tuned.unload()
    assert torch.equal(tiny.forward(entry, model), alone)
    assert patch.remove() == []
    for parameter in model.parameters():
        parameter.requires_grad = True  # peft leaves them frozen
    assert_same(before, fingerprint(model))


def test_not_beneath_a_patch() -> None:
    model = tiny.MODELS["llama"].build()
    with patchkit.apply(model, "moh"), pytest.raises(patchkit.Conflict, match="patched already"):
        get_peft_model(model, MoHConfig())


# --- training


@pytest.mark.parametrize("gate", ["binary", "weighted"])
def test_gradients_with_and_without_checkpointing(gate: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = shaken(get_peft_model(tiny.MODELS["qwen3"].build(), config(router="linear", gate=gate, balance=0.5)))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        loss = model(**batch()).loss
        loss.backward()
        assert auxiliary_loss(model).requires_grad
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), auxiliary_loss(model).detach(), grads))
    (loss, aux, grads), (again, aux_again, grads_again) = found
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(aux, aux_again)
    assert grads.keys() == grads_again.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], grads_again[name])


def test_reentrant_checkpointing_is_warned_of() -> None:
    model = shaken(get_peft_model(tiny.MODELS["qwen3"].build(), config(balance=0.5))).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="use_reentrant"):
        model(**batch())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="MoH")
        model(**batch())
        model.eval()(**batch())


def test_loss_in_training_and_evaluation() -> None:
    entry = tiny.MODELS["qwen3"]
    model = get_peft_model(entry.build(), config(balance=0.5))
    own = model(**batch()).loss
    aux = auxiliary_loss(model)
    model.train()
    torch.testing.assert_close(model(**batch()).loss, own + 0.5 * aux)
    assert float(aux) >= 1.0  # K = 1
    spoiled = batch()
    spoiled["input_ids"][0, :5] = 7  # padding
    model(**spoiled)
    torch.testing.assert_close(auxiliary_loss(model), aux)


def weights_after(
    folder: Path, accumulate: int, checkpointing: bool, rows: int = 8, balance: float = 0.0
) -> dict[str, torch.Tensor]:
    from transformers import Trainer, TrainingArguments

    data = batch(rows)
    if balance:  # P and f are those of a part: the same for all of them only if the rows are
        data = {name: value[1:2].repeat(rows, 1) for name, value in data.items()}
    else:
        data["labels"][1, :9] = -100  # parts with unequal numbers of labels
    items = [{name: value[i] for name, value in data.items()} for i in range(rows)]
    torch.manual_seed(0)
    model = shaken(get_peft_model(tiny.MODELS["qwen3"].build(), config(router="linear", balance=balance)))
    model.config.use_cache = False
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=rows // accumulate, report_to=[], save_strategy="no",
        gradient_accumulation_steps=accumulate, gradient_checkpointing=checkpointing, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, learning_rate=1e-2,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=items).train()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_trainer(tmp_path: Path) -> None:
    """transformers' own Trainer: accumulated or not, checkpointed or not, the weights are the same."""
    whole = weights_after(tmp_path, 1, False)
    for accumulate, checkpointing in ((4, False), (2, True)):
        other = weights_after(tmp_path, accumulate, checkpointing)
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


def test_trainer_balances_alike_in_parts(tmp_path: Path) -> None:
    """The load-balance loss of an accumulated batch weighs as much as that of a whole one; without it all differs."""
    whole = weights_after(tmp_path, 1, False, 4, balance=5.0)
    parts = weights_after(tmp_path, 4, False, 4, balance=5.0)
    less = weights_after(tmp_path, 1, False, 4, balance=1e-9)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(less[name], value, atol=1e-3) for name, value in whole.items())


def test_auxiliary_loss_is_scaled_with_accumulated_parts() -> None:
    """As the Trainer calls the model: each part weighs its share of all labels, so the sum is their mean."""
    model = shaken(get_peft_model(tiny.MODELS["qwen3"].build(), config(router="linear", balance=0.5))).train()
    data = batch(4)
    count = (data["labels"][:, 1:] != -100).sum()
    total, expected = 0.0, 0.0
    for part in (slice(0, 1), slice(1, 4)):
        rows = {name: value[part] for name, value in data.items()}
        with torch.no_grad():
            model.eval()
            own = model(**rows, num_items_in_batch=count).loss
            model.train()
        loss = model(**rows, num_items_in_batch=count).loss
        share = (rows["labels"][:, 1:] != -100).sum() / count
        expected += float(own + 0.5 * share * auxiliary_loss(model))
        total += float(loss)
    assert total == pytest.approx(expected, rel=1e-5)
    whole = model(**data, num_items_in_batch=count).loss
    assert total == pytest.approx(float(whole), rel=0.05)  # P and f of parts are not those of the whole


def test_it_learns() -> None:
    model = get_peft_model(tiny.MODELS["qwen3"].build(), config(router="linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("router", ["qnorm", "linear"])
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_compiled_as_one_graph(name: str, router: Any) -> None:
    """Nothing of an adapter is opaque to a graph: its own parameters are trained in it."""
    entry = tiny.MODELS[name]
    model = shaken(get_peft_model(entry.build(), config(name, router=router, balance=0.5)))
    data = batch()
    given = data if name != "bert" else {n: v for n, v in data.items() if n != "labels"}
    plain = model(**given)[0].detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], plain)
    found = []
    model.train()
    for module in (model, compiled):
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        out = module(**given)[0]
        (out if out.ndim == 0 else out.square().mean() + auxiliary_loss(model)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("lora_" in n for n in found[0])
    assert any("moh_" in n for n in found[0]) == (router == "linear")
    for n, grad in found[0].items():
        torch.testing.assert_close(found[1][n], grad)


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_compiled_with_the_active_heads_alone(mask: str) -> None:
    entry = tiny.MODELS["qwen3"]
    model = shaken(get_peft_model(entry.build(), config(router="linear", min_tokens=8)))
    given = {n: v for n, v in batch().items() if n == "input_ids" or mask == "padding"}
    given.pop("labels", None)
    with torch.no_grad():
        plain = model(**given).logits
        torch._dynamo.reset()
        graphs: list[str] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph.code)
            return graph.forward

        found = torch.compile(model, backend=backend, fullgraph=True)(**given).logits
    assert graphs[0].count("routed_attention") == 2, "one in each layer"
    real = batch()["attention_mask"].bool() if mask == "padding" else torch.ones_like(batch()["input_ids"]).bool()
    torch.testing.assert_close(found[real], plain[real])


def test_dit_is_trained_compiled() -> None:
    model = get_peft_model(dit(), MoHConfig(router="linear", lora={"r": 4, "target_modules": ["to_q"]}))
    shaken(model).train()
    found = []
    torch._dynamo.reset()
    for module in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(0)  # of the labels that are dropped
        out = module(noise(2, 4, 8, 8), timestep=torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])).sample
        (out.square().mean() + auxiliary_loss(model)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("moh_" in n for n in found[0])
    for n, grad in found[0].items():
        torch.testing.assert_close(found[1][n], grad)


def test_generation() -> None:
    entry = tiny.MODELS["gemma3"]
    tuned = shaken(get_peft_model(entry.build(), config(router="linear", task_type="CAUSAL_LM")))
    assert torch.equal(tiny.generate(entry, tuned), tiny.generate(entry, tuned, use_cache=False))

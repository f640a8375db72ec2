"""Sink channels: the registry, the user's file, the probe; and the models that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, forward
from tiny.vlms import VLMS
from torch import Tensor
from var_oracle import Sinks, attentive

import patchkit
from patchkit.recipes.var import Var, channels, probe
from patchkit.recipes.var.channels import Identity

SEVEN = Identity("llava", "llama", 4096, 32, 32064)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_DATA", str(tmp_path))


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "dims", "status"),
    [
        (SEVEN, {1415, 2533}, "published"),
        (Identity("llava", "llama", 5120, 40, 32064), {2100, 4743}, "published"),
        (Identity("llava_next", "llama", 5120, 40, 32064), {2100, 4743}, "published"),
        (Identity("qwen2_vl", "qwen2_vl_text", 3584, 28, 152064), {458, 2570}, "published"),
        (Identity("internvl", "llama", 4096, 32, 92553), {3584}, "published"),
        (Identity("qwen2_5_vl", "qwen2_5_vl_text", 2048, 36, 151936), {318, 1874, 1819}, "candidate"),
        (Identity("qwen3_vl", "qwen3_vl_text", 2560, 36, 151936), {0}, "candidate"),
        (Identity("internvl", "qwen3", 5120, 64, 151936), {731}, "candidate"),
    ],
)
def test_known_models(identity: Identity, dims: set[int], status: str) -> None:
    found = channels.find(identity)
    assert (set(found.dims), found.status) == (dims, status)


def test_every_entry_can_be_used() -> None:
    entries = channels.registry()
    assert len(entries) >= 16
    for entry in entries:
        assert entry["status"] in ("published", "candidate")
        assert entry["channels"]
        assert all(0 <= c < entry["hidden"] for c in entry["channels"])
        low, high = entry.get("vocabulary", (0, 0))
        for model in entry["models"]:
            identity = Identity(model, entry["text"], entry["hidden"], entry["layers"], (low + high) // 2)
            assert set(channels.find(identity).dims) == set(entry["channels"])


@pytest.mark.parametrize(
    "other",
    [
        replace(SEVEN, vocabulary=128320),  # LLaMA-3: as wide and as deep
        replace(SEVEN, text="mistral"),
        replace(SEVEN, layers=31),
        replace(SEVEN, hidden=4095),
        replace(SEVEN, model="paligemma"),
    ],
)
def test_neighbours_are_not_known(other: Identity) -> None:
    with pytest.raises(patchkit.UnsupportedModel, match=r"run patchkit.recipes.var.probe\(model"):
        channels.find(other)


def test_without_channels_the_error_says_what_to_do() -> None:
    model = VLMS["llava"].build()
    with pytest.raises(patchkit.UnsupportedModel, match=r"sink channels of llava .* are not known"):
        patchkit.apply(model, "var")
    assert not patchkit.status(model)["patched"]


def test_the_users_file_comes_first_and_replaces_itself(tmp_path: Path) -> None:
    assert channels.user_file().parent == tmp_path
    channels.remember(SEVEN, [7], "a test")
    channels.remember(replace(SEVEN, layers=3), [9], "a test")
    path = channels.remember(SEVEN, [8], "another test")
    assert path == channels.user_file()
    assert channels.find(SEVEN) == channels.Channels((8,), "probed", f"{SEVEN}: another test")
    assert channels.find(replace(SEVEN, layers=3)).dims == (9,)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize("text", ["{", "[{}]", "[3]", '{"a": 1}'])
def test_a_broken_users_file_is_an_error(text: str) -> None:
    channels.user_file().write_text(text)
    with pytest.raises(patchkit.PatchkitError, match="cannot be read"):
        channels.find(SEVEN)


def test_candidates_are_used_with_a_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VLMS["llava"].build()
    entry = {"models": ["llava"], "text": "llama", "hidden": 32, "layers": 4, "channels": [3]}
    monkeypatch.setattr(channels, "registry", lambda: [entry | {"status": "candidate", "who": "x", "source": "y"}])
    with patchkit.apply(model, "var") as patch:
        forward(VLMS["llava"], model)
        (caution,) = patch.report().cautions()
    assert "unverified sink channels" in caution
    assert "x: y" in caution


# --- the probe ------------------------------------------------------------------------------------------------------


def prompts(count: int, images: int) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 380, (1, 10), generator=generator)
        picture = torch.full((1, 16 if seed < images else 0), 390)
        row: dict[str, Tensor] = {"input_ids": torch.cat((torch.tensor([[1]]), picture, words), 1)}
        if seed < images:
            row["pixel_values"] = torch.randn(1, 3, 32, 32, generator=generator)
        found.append(row)
    return found


def test_the_probe_finds_planted_channels_and_files_them() -> None:
    model = attentive(5)
    with Sinks(model):
        found = probe(model, prompts(16, 8), tau=4.0)
        assert found.accepted, found.reasons
        assert found.sink_dims == found.candidates == [5]
        evidence = found.evidence
        assert (evidence.prompts, evidence.with_images, evidence.layers) == (16, 8, [2])
        assert evidence.first_fires == 1.0
        assert evidence.far_below > 0.85
        assert evidence.visual_sinks == 2.0
        assert evidence.attention_ratio is not None
        assert evidence.attention_ratio > 3
        assert min(evidence.medians[5]) > 4
        assert not patchkit.status(model)["patched"]
        assert found.save() == channels.user_file()
        with patchkit.apply(model, Var(tau=4.0, min_visual=0.05, rho=0.05)) as patch:
            with torch.no_grad():
                model(**prompts(1, 1)[0])
            (row,) = (r for r in patch.report()["recipes"][0]["rows"] if "visual_sinks" in r["values"])
    assert (row["values"]["text_sinks"], row["values"]["visual_sinks"]) == ([1], [2])


def test_batches_with_padding_count_prompt_by_prompt() -> None:
    model = attentive(5)
    short = prompts(1, 0)[0]["input_ids"]
    batch = {
        "input_ids": torch.cat((torch.nn.functional.pad(short, (4, 0)), torch.cat((short, short[:, 1:5]), 1))),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 11, [1] * 15]),
    }
    with torch.no_grad(), Sinks(model, text=False):
        found = probe(model, [batch], tau=4.0)
    assert found.evidence.prompts == 2
    assert found.evidence.with_images == 0


@pytest.mark.parametrize(
    ("sinks", "many", "told"),
    [
        ({"text": False}, (16, 8), "no channel of the first token"),
        ({"images": False}, (16, 8), "0% of the prompts with images have a sink"),
        ({"even": 14.0}, (16, 8), "no two clear modes"),
        ({}, (4, 2), "4 prompts, 2 with images; 16 are needed"),
        ({}, (16, 2), "16 prompts, 2 with images"),
    ],
)
def test_the_probe_refuses(sinks: dict[str, Any], many: tuple[int, int], told: str) -> None:
    model = attentive(5)
    with Sinks(model, **sinks):
        found = probe(model, prompts(*many), tau=4.0)
    assert not found.accepted
    assert found.sink_dims == []
    assert any(told in reason for reason in found.reasons), found.reasons
    with pytest.raises(patchkit.UnsupportedModel, match="no sink channels were found"):
        found.save()
    assert not channels.user_file().exists()


def test_sinks_that_nobody_looks_at_are_refused() -> None:
    model = VLMS["llava"].build()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.zero_()  # even attention
    with Sinks(model):
        found = probe(model, prompts(16, 8), tau=4.0)
    assert found.reasons == ["visual sinks draw 1.0 times the attention of a visual token, not several"]


def test_no_prompts() -> None:
    with pytest.raises(patchkit.InvalidOption, match="no prompts"):
        probe(VLMS["llava"].build(), [])


# --- models ---------------------------------------------------------------------------------------------------------


def test_language_models_have_no_image_tokens() -> None:
    with pytest.raises(patchkit.UnsupportedModel, match="no image tokens"):
        patchkit.apply(MODELS["llama"].build(4), "var", sink_dims=[3])


def mllama() -> Any:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3], "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=390))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize(
    ("build", "kind", "why"), [(mllama, "mllama", "cross-attention"), (gpt_oss, "gpt_oss", "learned sink logits")]
)
def test_models_that_are_refused_by_name(build: Any, kind: str, why: str) -> None:
    with pytest.raises(patchkit.UnsupportedModel, match=f"VAR does not fit {kind}: .*{why}"):
        patchkit.apply(build(), "var", sink_dims=[3])


@pytest.mark.parametrize("kind", ["idefics", "idefics2", "instructblip", "instructblipvideo", "blip-2", "kosmos-2"])
def test_others_that_are_refused_by_name(kind: str) -> None:
    model = VLMS["llava"].build()
    model.config.model_type = kind
    try:
        with pytest.raises(patchkit.UnsupportedModel, match=f"VAR does not fit {kind}: "):
            patchkit.apply(model, "var", sink_dims=[3])
    finally:
        del model.config.model_type


def test_learned_sinks_of_any_model_are_refused() -> None:
    model = VLMS["llava"].build()
    attention = model.model.language_model.layers[2].self_attn
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(patchkit.UnsupportedModel, match="learned sink logits"):
        patchkit.apply(model, "var", sink_dims=[3])

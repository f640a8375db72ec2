"""Scores by networks: absent with a reason, or what the network says."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tiny import tokenizers
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from patchkit.errors import InvalidOption
from patchkit.evaluation import learned


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
    vision = size | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizers.clip().save_pretrained(folder)
    return folder


def test_what_is_not_there_says_how_to_get_it():
    found = learned.prepare(None, None, "cpu")
    assert found.missing["lpips"] == 'pip install "patchkit[metrics]"'
    assert "--clip" in found.missing["clip_text"]
    assert "--dino" in found.missing["dino_frames"]
    assert found.figures(torch.rand(3, 3, 16, 16), None, "a") == {}


def test_lpips(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.min() >= -1
            assert a.max() <= 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    found = learned.prepare(None, None, "cpu")
    assert "lpips" not in found.missing
    a, b = torch.zeros(40, 3, 8, 8), torch.full((40, 3, 8, 8), 0.25)
    assert found.figures(a, b, "x") == {"lpips": pytest.approx(0.5)}
    assert found.figures(a, None, "x") == {}


def test_lpips_whose_weights_cannot_be_fetched(monkeypatch):
    def fail(**options):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=fail))
    found = learned.prepare(None, None, "cpu")
    assert "could not be loaded: no network" in found.missing["lpips"]
    assert found.functions == []


def test_clip(clip_folder):
    """The same as transformers' own scores, up to the scale that CLIP multiplies cosines with."""
    found = learned.prepare(str(clip_folder), None, "cpu")
    assert set(found.missing) == {"lpips", "dino_frames"}
    clip = torch.rand(3, 3, 32, 32)
    figures = found.figures(clip, None, "a cat")
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), tokenizers.clip()
    pixels = (clip - torch.tensor(learned._MEAN).view(3, 1, 1)) / torch.tensor(learned._DEVIATION).view(3, 1, 1)
    with torch.no_grad():
        out = model(**tokenizer("a cat", return_tensors="pt"), pixel_values=pixels)
    assert figures["clip_text"] == pytest.approx(
        float((out.logits_per_image / model.logit_scale.detach().exp()).mean()), abs=1e-5
    )
    frames = out.image_embeds
    assert figures["clip_frames"] == pytest.approx(float((frames[1:] * frames[:-1]).sum(-1).mean()), abs=1e-5)
    assert set(found.figures(clip[:1], None, "a cat")) == {"clip_text"}
    assert found.figures(torch.rand(2, 3, 40, 64), None, "a cat")["clip_frames"] <= 1


def test_dino(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=224, patch_size=56
    )
    Dinov2Model(config).eval().save_pretrained(tmp_path)
    found = learned.prepare(None, str(tmp_path), "cpu")
    still = torch.rand(1, 3, 64, 64).expand(3, -1, -1, -1)
    assert found.figures(still, None, "") == {"dino_frames": pytest.approx(1)}
    assert found.figures(torch.rand(3, 3, 64, 64), None, "")["dino_frames"] < 1


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InvalidOption, match="could not be loaded") as caught:
        learned.prepare(str(tmp_path), None, "cpu")
    assert caught.value.where == f"--clip {tmp_path}"


def test_features_of_frames_for_cscv(clip_folder, tmp_path):
    """The vision tower's pooled output, from a whole CLIP or its tower; frames of any shape; CLIP's normalisation."""
    from transformers import CLIPVisionModel

    from patchkit.evaluation import temporal

    tower = CLIPVisionModel.from_pretrained(clip_folder).eval()
    tower.save_pretrained(tmp_path)
    clip = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in learned._CLIP)
    with torch.no_grad():
        expected = tower(pixel_values=(clip - mean) / deviation).pooler_output
    for name in (clip_folder, tmp_path):
        features = learned.clip_frames(str(name))
        torch.testing.assert_close(features(clip), expected, atol=1e-5, rtol=1e-4)
    wide = torch.nn.functional.pad(clip, (16, 16))  # the middle is cut out
    torch.testing.assert_close(features(wide), expected, atol=1e-2, rtol=1e-2)
    assert 0 < temporal.cscv(features(clip)) < 1
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert not torch.allclose(learned.clip_frames(str(tmp_path))(clip), expected, atol=1e-4)
    with pytest.raises(InvalidOption, match="--clip nowhere"):
        learned.clip_frames("nowhere")

"""The vision-language model's processor: words, chats, pictures, batches; it works offline and is the real class."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from patchkit.zoo import stills
from patchkit.zoo.chat import IMAGE_TOKENS, SPECIAL, SYSTEM, VisionLanguage, chat_processor
from patchkit.zoo.text import CHAT_WORDS, WORDS
from patchkit.zoo.training.vlm_model import build_model
from patchkit.zoo.training.vlm_rows import Packer, pixels

QUESTION = "What colour is the background?"


@pytest.fixture(scope="module")
def processor():
    return chat_processor()


@pytest.fixture(scope="module")
def pair(processor):
    return VisionLanguage(build_model().eval(), processor)


def _picture(seed=0):
    return stills.render([stills.Still(stills.Description("blue"), (), seed)])[0]


def _turn(role, *parts):
    return {"role": role, "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def test_every_word_is_one_token_and_comes_back(processor):
    tokenizer = processor.tokenizer
    words = list(dict.fromkeys((*WORDS, *CHAT_WORDS)))
    ids = tokenizer(" ".join(words)).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == words
    assert len(tokenizer) == len(SPECIAL) + len(words)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(words)
    assert tokenizer("a zebra").input_ids[-1] == tokenizer.unk_token_id


def test_ids_never_move(processor):
    """New words may come at the end only: trained weights know the words by these numbers."""
    places = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4, "a": 5, "red": 8, "frame": 97, "?": 98}
    assert {w: processor.tokenizer.convert_tokens_to_ids(w) for w in places} == places


def test_the_template_writes_chats(processor):
    one = [_turn("user", None, QUESTION)]
    assert processor.apply_chat_template(one, add_generation_prompt=True) == (
        f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
    )
    more = [*one, _turn("assistant", "blue"), _turn("user", "how many shapes are there?")]
    assert processor.apply_chat_template(more, add_generation_prompt=True) == (
        f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT: blue </s>USER: how many shapes are there? ASSISTANT:"
    )
    own = [{"role": "system", "content": "please look."}, *one]
    assert processor.apply_chat_template(own).startswith("please look. USER: <image>")


def test_a_prompt_becomes_what_the_model_was_trained_on(processor):
    """The processor's ids are those of the training's packed rows, and so are the pixels."""
    from patchkit.zoo.questions import Question

    text = processor.apply_chat_template([_turn("user", None, QUESTION)], add_generation_prompt=True)
    picture = _picture()
    raw = (picture * 255).round().to(torch.uint8)
    given = processor(text=text, images=raw, return_tensors="pt")
    row = Packer().row([Question("background", QUESTION, "blue")])
    (begin, _end), ids = row.answers[0], given.input_ids[0].tolist()
    assert ids == row.ids[:begin]
    assert row.places[:begin] == list(range(begin))
    assert ids.count(processor.image_token_id) == IMAGE_TOKENS == 64
    assert (given.pixel_values[0] - pixels(picture)).abs().max() < 1e-6


def test_chats_are_the_trained_conversations(processor):
    from patchkit.zoo.questions import Question

    asked = [Question("background", QUESTION, "blue"), Question("count", "how many shapes are there?", "none")]
    row = Packer().row(asked, chat=True)
    turns = [
        t
        for q in asked
        for t in (_turn("user", *([None] if q is asked[0] else []), q.text), _turn("assistant", q.answer))
    ]
    text = processor.apply_chat_template(turns)
    given = processor(text=text, images=Image.new("RGB", (64, 64)), return_tensors="pt")
    assert given.input_ids[0].tolist() == row.ids
    assert row.places == list(range(len(row.ids)))


def test_pictures_of_any_kind_and_size(processor):
    frame = (_picture() * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    large = Image.fromarray(np.kron(frame, np.ones((3, 3, 1), dtype=np.uint8)))
    small = processor.image_processor(frame, return_tensors="pt").pixel_values
    assert small.shape == (1, 3, 64, 64)
    shrunk = processor.image_processor(large, return_tensors="pt").pixel_values
    assert (small - shrunk).abs().mean() < 0.02
    wide = processor.image_processor(Image.new("RGB", (200, 100)), return_tensors="pt").pixel_values
    assert wide.shape == (1, 3, 64, 64)


def test_two_pictures_in_one_prompt(pair):
    text = pair.prompt("which picture has a blue background?", 2)
    assert text.count("<image>") == 2
    given = pair.processor(text=text, images=[Image.new("RGB", (64, 64))] * 2, return_tensors="pt")
    assert given.pixel_values.shape == (2, 3, 64, 64)
    assert (given.input_ids == pair.processor.image_token_id).sum() == 2 * IMAGE_TOKENS
    with torch.no_grad():
        assert pair.model(**given).logits.shape[1] == given.input_ids.shape[1]
    assert isinstance(pair.ask("which picture has a blue background?", _picture(0), _picture(1)), str)


def test_padding_is_on_the_left_and_changes_nothing(pair):
    texts = [pair.prompt("count?"), pair.prompt("what is in the picture, on the left of the green circle?")]
    pictures = [(_picture(n) * 255).to(torch.uint8) for n in range(2)]
    both = pair.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    assert both.attention_mask[0, 0] == 0
    assert both.attention_mask[:, -1].tolist() == [1, 1]
    with torch.no_grad():
        together = pair.model(**both).logits[:, -1]
        for n in range(2):
            alone = pair.model(**pair.processor(text=texts[n], images=pictures[n], return_tensors="pt")).logits[0, -1]
            assert (alone - together[n]).abs().max() < 1e-4


def test_it_saves_and_loads_offline_as_what_it_is(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    code = (
        "import socket\n"
        "def refuse(*args): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from transformers import AutoProcessor, LlavaProcessor\n"
        f"p = AutoProcessor.from_pretrained({str(tmp_path)!r})\n"
        "assert type(p) is LlavaProcessor, type(p)\n"
        "print(p.tokenizer('what colour is the circle?').input_ids, p.patch_size, p.tokenizer.padding_side)\n"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    ids = processor.tokenizer("what colour is the circle?").input_ids
    assert out.strip() == f"{ids} 8 left"
    again = type(processor).from_pretrained(tmp_path)
    turns = [_turn("user", None, QUESTION)]
    assert again.apply_chat_template(turns, add_generation_prompt=True) == processor.apply_chat_template(
        turns, add_generation_prompt=True
    )


def test_importing_it_is_light():
    code = "import sys, patchkit.zoo.chat, patchkit.zoo.questions\n" + (
        "print([m for m in ('diffusers', 'transformers', 'tokenizers', 'imageio') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

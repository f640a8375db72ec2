"""Prompts and seeds, and files of prompts that are wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from patchkit.errors import InvalidOption, RecipeFileError
from patchkit.evaluation import cases
from patchkit.recipe_files import files, yamlread
from patchkit.zoo import worlds


def file_of(inputs="{}", model="zoo/video"):
    return files.parse(yamlread.read_text(f"version: 1\nmodel: {model}\nrecipes: [adaspa]\ninputs: {inputs}\n", "r"))


def test_no_two_samples_start_from_the_same_noise():
    chosen = cases.choose("5", file_of(), worlds.of("video"))
    assert [c.prompt for c in chosen] == list(worlds.of("video").prompts(5))
    seeds = [c.seed(7, repeat) for c in chosen for repeat in range(3)]
    assert seeds[:4] == [7, 8, 9, 1007]
    assert len(set(seeds)) == len(seeds)


def test_the_prompt_of_the_recipe_file_is_the_default():
    assert [c.prompt for c in cases.choose(None, file_of("{prompt: [a, b]}"), None)] == ["a", "b"]
    assert [c.prompt for c in cases.choose(None, file_of(), worlds.of("video"))] == list(worlds.of("video").prompts(1))
    with pytest.raises(RecipeFileError, match="the prompt is missing"):
        cases.choose(None, file_of(model="a/b"), None)


def test_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeff# mine\n\na cat \n  a <b>dog</b>\n")
    assert [(c.number, c.prompt) for c in cases.choose(str(path), file_of(), None)] == [
        (0, "a cat"),
        (1, "a <b>dog</b>"),
    ]


def test_a_file_of_edits(tmp_path):
    for name in ("s.png", "m.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [
        {"prompt": "a", "seed": 5, "inputs": {"strength": 0.5}, "source": "s.png", "mask": "m.png"},
        {"prompt": "a", "source": "m.png"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = cases.read(path)
    assert (first.source, first.mask, first.inputs) == (tmp_path / "s.png", tmp_path / "m.png", {"strength": 0.5})
    assert (first.seed(100, 1), second.seed(100, 1)) == (6, 1101)


BAD = {
    "empty": ("", "p.txt", "holds no prompt"),
    "only remarks": ("# a\n\n", "p.txt", "holds no prompt"),
    "twice": ("a\nb\na\n", "p.txt", "'a' is there twice"),
    "no JSON": ("{", "p.jsonl", "not JSON"),
    "a list": ("[]", "p.jsonl", "no prompt"),
    "no prompt": ('{"seed": 1}', "p.jsonl", "no prompt"),
    "unknown field": ('{"prompt": "a", "sead": 1}', "p.jsonl", "no field 'sead'"),
    "seed": ('{"prompt": "a", "seed": -1}', "p.jsonl", "seed is -1"),
    "inputs": ('{"prompt": "a", "inputs": 3}', "p.jsonl", "inputs is no mapping"),
    "source": ('{"prompt": "a", "source": "none.png"}', "p.jsonl", "no file that is there"),
    "mask": ('{"prompt": "a", "mask": 3}', "p.jsonl", "no file that is there"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    text, file, words = BAD[name]
    (tmp_path / file).write_text(text)
    with pytest.raises((InvalidOption, RecipeFileError), match=words) as caught:
        cases.read(tmp_path / file)
    assert caught.value.where
    assert caught.value.remedy


def test_bad_bytes(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidOption, match="cannot read"):
        cases.read(tmp_path / "p.txt")
    with pytest.raises(InvalidOption, match="there is no file"):
        cases.choose(str(tmp_path / "none.txt"), file_of(), None)


@pytest.mark.parametrize("count", ["0", "-3", "100000"])
def test_bad_numbers(count):
    with pytest.raises(InvalidOption, match="prompts were asked for"):
        cases.choose(count, file_of(), worlds.of("video"))


def test_a_number_without_a_world():
    with pytest.raises(InvalidOption, match="has no world of its own") as caught:
        cases.choose("4", file_of(model="a/b"), None)
    assert "--prompts prompts.txt" in caught.value.remedy

"""Recipe files: what is read, and that every mistake is named with its place and a remedy."""

from __future__ import annotations

import dataclasses

import pytest
import testing_recipes

from patchkit import errors
from patchkit.recipe_files import files, yamlread
from patchkit.recipe_files.fields import ModelSpec
from patchkit.recipe_files.schema import schema

GOOD = """\
version: 1
model: {id: owner/name, dtype: bf16, device: cpu, offload: model, revision: main, variant: fp16}
recipes:
  - dimming: {density: 0.25, layers: "2-", steps: [0.2, 1.0]}
  - slow
inputs:
  prompt: "a cat"
  num_inference_steps: 20
  seed: 0
  max_sequence_length: 16
output: out/circle.mp4
compare: dense
"""


def parse(text):
    return files.parse(yamlread.read_text(text, "r.yaml"))


def test_everything_is_read():
    file = parse(GOOD)
    assert file.model == ModelSpec("owner/name", "bf16", "cpu", "model", "main", "fp16")
    assert file.recipes == (
        testing_recipes.Dimming(density=0.25, layers="2-", steps=(0.2, 1.0)),
        testing_recipes.Slow(),
    )
    assert file.inputs == {"prompt": "a cat", "num_inference_steps": 20, "seed": 0, "max_sequence_length": 16}
    assert (str(file.output.path), file.output.folder, file.compare) == ("out/circle.mp4", False, True)
    file.require()
    with pytest.raises(dataclasses.FrozenInstanceError):
        file.compare = False


def test_only_recipes_are_needed_to_apply():
    file = parse("version: 1\nrecipes: [dimming]\n")
    assert file.recipes == (testing_recipes.Dimming(),)
    assert (file.model, file.inputs, file.output, file.compare) == (None, {}, None, False)


def test_a_recipe_may_stand_twice_with_other_options():
    file = parse("version: 1\nrecipes: [dimming: {layers: 0}, dimming: {layers: 1}]\n")
    assert [r.layers for r in file.recipes] == [0, 1]


@pytest.mark.parametrize("folder", ["out/", "out"])
def test_output_folder(folder):
    assert parse(f"version: 1\nrecipes: [dimming]\noutput: {folder}\n").output.folder


def test_an_existing_folder_with_a_dot_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.d").mkdir()
    assert parse("version: 1\nrecipes: [dimming]\noutput: out.d\n").output.folder


HEAD = "version: 1\nrecipes: [dimming]\n"
# text, line, field, words of the message, words of the remedy
BAD = {
    "not a mapping": ("- a\n", "1", "", "mapping", "version: 1"),
    "scalar": ("hello\n", "1", "", "this is text", "version: 1"),
    "no version": ("recipes: [dimming]\n", "1", "version", "version is missing", "version: 1"),
    "unknown version": ("version: 2\nrecipes: [dimming]\n", "1", "version", "version 2", "newer"),
    "version as text": ("version: '1'\nrecipes: [dimming]\n", "1", "version", "'1'", "version 1"),
    "version true": ("version: true\nrecipes: [dimming]\n", "1", "version", "True", "version 1"),
    "unknown field": (HEAD + "outptu: a.mp4\n", "3", "outptu", "no field 'outptu'", "'output'"),
    "no recipes": ("version: 1\nmodel: a/b\n", "1", "recipes", "missing", "recipes: [adaspa]"),
    "empty recipes": ("version: 1\nrecipes: []\n", "2", "recipes", "empty", "recipes: [adaspa]"),
    "recipes a name": ("version: 1\nrecipes: dimming\n", "2", "recipes", "recipes is text", "list"),
    "unknown recipe": ("version: 1\nrecipes:\n  - dimmming\n", "3", "recipes[0].dimmming", "no recipe", "'dimming'"),
    "recipe twice": ("version: 1\nrecipes:\n- dimming\n- dimming\n", "4", "recipes[1]", "second time", "keep one"),
    "two in one entry": ("version: 1\nrecipes:\n- {dimming: , slow: }\n", "3", "recipes[0]", "2 recipes", "own dash"),
    "none in an entry": ("version: 1\nrecipes:\n- {}\n", "3", "recipes[0]", "0 recipes", "own dash"),
    "entry a number": ("version: 1\nrecipes:\n- 3\n", "3", "recipes[0]", "a number", "own dash"),
    "options a list": ("version: 1\nrecipes:\n- dimming: [1]\n", "3", "recipes[0].dimming", "a list", "option: value"),
    "unknown option": (
        "version: 1\nrecipes:\n- dimming:\n    mode: soft\n    densty: 0.3\n",
        "5",
        "recipes[0].dimming.densty",
        "no option 'densty'",
        "'density'",
    ),
    "option out of range": (
        "version: 1\nrecipes:\n- dimming:\n    density: 1.5\n",
        "4",
        "recipes[0].dimming.density",
        "1.5 is not a value",
        "less than or equal to 1",
    ),
    "option of a wrong type": (
        "version: 1\nrecipes:\n- dimming: {density: lots}\n",
        "3",
        "recipes[0].dimming.density",
        "'lots'",
        "number",
    ),
    "option true for a number": (
        "version: 1\nrecipes:\n- dimming: {density: true}\n",
        "3",
        "recipes[0].dimming.density",
        "True",
        "float",
    ),
    "selection grammar": (
        "version: 1\nrecipes:\n- slow\n- dimming:\n    layers: 5-x\n",
        "5",
        "recipes[1].dimming.layers",
        "'5-x'",
        "0,5-10,-1",
    ),
    "empty window": (
        "version: 1\nrecipes:\n- dimming: {steps: [0.5, 0.5]}\n",
        "3",
        "recipes[0].dimming.steps",
        "empty",
        "earlier step first",
    ),
    "heads without meaning": (
        "version: 1\nrecipes:\n- dimming: {heads: 0}\n",
        "3",
        "recipes[0].dimming.heads",
        "per head",
        "leave it out",
    ),
    "key twice": (HEAD + "inputs:\n  seed: 1\n  seed: 2\n", "5", "inputs.seed", "second time", "keep one"),
    "field twice": (HEAD + "version: 1\n", "3", "version", "second time", "keep one"),
    "tag": (HEAD + "inputs: !!python/object/apply:os.system [ls]\n", "3", "", "tag", "leave the tag out"),
    "local tag": (HEAD + "output: !x a.mp4\n", "3", "", "tag", "leave the tag out"),
    "anchor": (HEAD + "inputs: &a {seed: 1}\n", "3", "", "references", "write the value out"),
    "alias": (HEAD + "inputs: *a\n", "3", "", "references", "write the value out"),
    "two documents": (HEAD + "---\nversion: 1\n", "3", "", "second document", "one document"),
    "deep": ("a: " + "[" * 3000 + "\n", "1", "", "nested too deeply", "levels"),
    "open bracket": (HEAD + "inputs: {seed: 1\n", "4", "", "not YAML", "quotes"),
    "tab": (HEAD + "inputs:\n\tseed: 1\n", "4", "", "a tab", "spaces"),
    "list as key": (HEAD + "? [a]\n: b\n", "3", "", "plain word", "key: value"),
    "model a number": (HEAD + "model: 3\n", "3", "model", "a number", "zoo/NAME"),
    "model without id": (HEAD + "model: {dtype: fp16}\n", "3", "model.id", "id is missing", "zoo/video"),
    "model field": (HEAD + "model: {id: a/b, torch_dtype: fp16}\n", "3", "model.torch_dtype", "no field", "'dtype'"),
    "zoo model": (HEAD + "model: zoo/vidoe\n", "3", "model", "no zoo model", "'zoo/video'"),
    "zoo alone": (HEAD + "model: zoo\n", "3", "model", "no zoo model", "zoo/video"),
    "folder that is none": (HEAD + "model: ./nowhere\n", "3", "model", "neither", "owner/name"),
    "model of words": (HEAD + "model: my model\n", "3", "model", "neither", "owner/name"),
    "dtype": (HEAD + "model: {id: a/b, dtype: float61}\n", "3", "model.dtype", "'float61'", "'float16'"),
    "offload": (HEAD + "model: {id: a/b, offload: all}\n", "3", "model.offload", "'all'", "sequential"),
    "device": (HEAD + "model: {id: a/b, device: gpu}\n", "3", "model.device", "'gpu'", "cuda"),
    "revision a number": (HEAD + "model: {id: a/b, revision: 12}\n", "3", "model.revision", "a number", '"12"'),
    "inputs a list": (HEAD + "inputs: [a]\n", "3", "inputs", "a list", "prompt"),
    "prompt a number": (HEAD + "inputs: {prompt: 3}\n", "3", "inputs.prompt", "prompt is 3", "quotes"),
    "prompts of numbers": (HEAD + "inputs: {prompt: [a, 3]}\n", "3", "inputs.prompt", "a list", "list of texts"),
    "steps 0": (HEAD + "inputs: {num_inference_steps: 0}\n", "3", "inputs.num_inference_steps", "is 0", "1 or more"),
    "steps text": (HEAD + "inputs: {num_inference_steps: ten}\n", "3", "inputs.num_inference_steps", "'ten'", "whole"),
    "steps true": (HEAD + "inputs: {num_inference_steps: true}\n", "3", "inputs.num_inference_steps", "True", "whole"),
    "seed below 0": (HEAD + "inputs: {seed: -1}\n", "3", "inputs.seed", "-1", "0 to"),
    "seed a fraction": (HEAD + "inputs: {seed: 0.5}\n", "3", "inputs.seed", "0.5", "whole"),
    "seed too large": (HEAD + "inputs: {seed: 99999999999999999999}\n", "3", "inputs.seed", "9999", "0 to"),
    "height 0": (HEAD + "inputs: {height: 0}\n", "3", "inputs.height", "is 0", "1 or more"),
    "width text": (HEAD + "inputs: {width: wide}\n", "3", "inputs.width", "'wide'", "whole"),
    "frames list": (HEAD + "inputs: {num_frames: [9]}\n", "3", "inputs.num_frames", "a list", "whole"),
    "guidance text": (HEAD + "inputs: {guidance_scale: high}\n", "3", "inputs.guidance_scale", "'high'", "a number"),
    "output suffix": (HEAD + "output: a.avi\n", "3", "output", ".avi", ".mp4"),
    "output number": (HEAD + "output: 3\n", "3", "output", "a number", "out/result.mp4"),
    "output empty": (HEAD + "output: ''\n", "3", "output", "output is text", "out/result.mp4"),
    "compare": (HEAD + "compare: sparse\n", "3", "compare", "'sparse'", "compare: dense"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name):
    text, line, field, what, remedy = BAD[name]
    with pytest.raises(errors.RecipeFileError) as caught:
        parse(text)
    error = caught.value
    assert error.where.startswith(f"r.yaml:{line}") or (line == "4" and error.where.startswith("r.yaml:3"))
    assert not field or f"field '{field}'" in error.where
    assert what in error.what
    assert remedy in error.remedy


MISSING = {
    "model": ("inputs: {prompt: a}\noutput: a.mp4\n", "model", "--model"),
    "prompt": ("model: a/b\ninputs: {seed: 1}\noutput: a.mp4\n", "inputs.prompt", "--prompt"),
    "empty prompt": ("model: a/b\ninputs: {prompt: ''}\noutput: a.mp4\n", "inputs.prompt", "--prompt"),
    "output": ("model: a/b\ninputs: {prompt: a}\n", "output", "--output"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_a_run_needs(name):
    text, field, remedy = MISSING[name]
    with pytest.raises(errors.RecipeFileError) as caught:
        parse(HEAD + text).require()
    assert f"field '{field}'" in caught.value.where
    assert caught.value.where.startswith("r.yaml:")
    assert remedy in caught.value.remedy


BYTES = {
    "empty": (b"", "is empty"),
    "comments": (b"# nothing\n", "is empty"),
    "binary": (b"version: 1\0", "binary"),
    "latin": (b"version: 1\nrecipes: [\xe9]\n", "UTF-8"),
    "control": (b"version: 1\nrecipes: [\x07]\n", "not YAML"),
    "large": (b"#" * 300_000, "too large"),
}


@pytest.mark.parametrize("name", BYTES)
def test_files_that_are_none(name, tmp_path):
    content, what = BYTES[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(errors.RecipeFileError, match=what) as caught:
        files.load(path)
    assert str(path) in caught.value.where
    assert caught.value.remedy
    if name == "latin":
        assert caught.value.where.endswith(":2")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(errors.RecipeFileError, match="is a directory"):
        files.load(tmp_path)
    with pytest.raises(errors.RecipeFileError, match="there is no file"):
        files.load(tmp_path / "none.yaml")


def test_a_byte_order_mark_is_no_harm(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    assert files.load(path).recipes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("1e-3", 0.001),
        ("5-", "5-"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", 16),
        ("010", 10),
        ("~", None),
        (".5", 0.5),
        ("[0.2, 1.0]", [0.2, 1.0]),
        ("'3'", "3"),
        ("a: b: c", "a: b: c"),
        ("", ""),
    ],
)
def test_values_are_read_by_the_yaml_1_2_schema(text, value):
    read = yamlread.read_value(text, "here")
    assert read == value
    assert type(read) is type(value)


RECIPES = [
    testing_recipes.Dimming(),
    testing_recipes.Dimming(density=1e-5, layers="5-", steps=(0.2, 1.0), mode="no"),
    testing_recipes.Dimming(mode="1e-3", label="a: b # c\n 'd' \"e\" é", factors=[1, 2], layers=[1, 2]),
    testing_recipes.Dimming(label="null", targets=["to_q"], exclude=".*x"),
    testing_recipes.Dimming(label="007", layers="0x10".replace("x", "")),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_what_is_saved_is_what_is_loaded(recipe, tmp_path):
    path = files.save_recipes([recipe, testing_recipes.Slow()], tmp_path / "r.yaml")
    assert files.load_recipes(path) == [recipe, testing_recipes.Slow()]
    assert path.read_text().startswith("# ")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_a_whole_file_survives_a_round_trip():
    file = parse(GOOD)
    text = files.dump(file.recipes, model=file.model, inputs=file.inputs, output="out/circle.mp4", compare=True)
    assert dataclasses.replace(parse(text), source="", document=None) == dataclasses.replace(
        file, source="", document=None
    )


def test_saving_where_it_cannot_be(tmp_path):
    with pytest.raises(errors.RecipeFileError, match="cannot write"):
        files.save_recipes([testing_recipes.Slow()], tmp_path / "none" / "r.yaml")


def test_examples_are_valid_by_the_reader_and_by_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    shipped = files.examples()
    assert "adaspa" in shipped
    for name, text in shipped.items():
        document = yamlread.read_text(text, name)
        jsonschema.validate(document.data, made)
        file = files.parse(document)
        file.require()


SCHEMA_SEES = [n for n in BAD if n.startswith(("unknown", "option", "model f", "steps", "seed", "guidance", "compare"))]


@pytest.mark.parametrize("name", SCHEMA_SEES)
def test_the_schema_sees_mistakes_too(name):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yamlread.read_text(BAD[name][0], "r").data, schema())


def test_locate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.locate("adaspa").source == "example adaspa.yaml"
    (tmp_path / "mine.yaml").write_text(HEAD)
    assert files.locate("mine.yaml").source == "mine.yaml"
    with pytest.raises(errors.RecipeFileError, match="neither a file nor a recipe") as caught:
        files.locate("adapsa")
    assert "'adaspa'" in caught.value.remedy
    bare = files.parse(files.locate("dimming"))
    assert bare.recipes == (testing_recipes.Dimming(),)
    with pytest.raises(errors.RecipeFileError, match="no model is named"):
        bare.require()
    (tmp_path / "adaspa").mkdir()
    assert files.locate("adaspa").source == "example adaspa.yaml"
    with pytest.raises(errors.RecipeFileError, match="there is no file"):
        files.locate("none.yaml")

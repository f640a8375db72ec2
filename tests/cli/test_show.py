"""The commands that only tell."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import patchkit
from patchkit.cli import show
from patchkit.recipe_files.schema import schema

COMMANDS = ["run", "compare", "plan", "bench", "list", "info", "doctor", "schema", "new-recipe"]


def test_help(cli):
    for arguments in (["--help"], ["-h"], []):
        result = cli(*arguments)
        assert result.exit_code == 0
        for command in COMMANDS:
            assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(cli, command):
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert f"patchkit {command}" in result.stdout


def test_flags_bear_the_names_that_diffusers_gives_them(cli):
    text = " ".join(cli("run", "--help").stdout.split())
    for flag in ("--model", "-m", "--dtype", "--variant", "--revision", "--output", "-o", "--seed", "--fps"):
        assert flag in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from patchkit.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_version(cli):
    assert cli("--version").stdout == f"patchkit {patchkit.__version__}\n"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "patchkit", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"patchkit {patchkit.__version__}\n", done.stderr


def test_list(cli):
    text = cli("list").stdout
    assert "adaspa" in text
    assert "patchkit run adaspa" in text
    rows = {row["name"]: row for row in json.loads(cli("list", "--json").stdout)}
    assert rows["dimming"]["summary"] == "weakens attention"
    assert "`adaspa`: computes" in cli("list", "--markdown").stdout


def test_the_example_of_a_recipes_own_name_is_the_one_to_run(cli):
    rows = json.loads(cli("list", "--json").stdout)
    for row in rows:
        assert not row["examples"] or row["examples"][0] == row["name"]
    assert any(len(row["examples"]) > 1 for row in rows)


def test_info(cli):
    result = cli("info", "adaspa")
    assert result.exit_code == 0, result.output
    for word in ("density", "2502.21079", "patchkit run adaspa", "version: 1", "number > 0, <= 1"):
        assert word in result.stdout
    options = {o["name"]: o for o in json.loads(cli("info", "dimming", "--json").stdout)["options"]}
    assert options["density"] == {
        "name": "density",
        "takes": "number > 0, <= 1",
        "default": 0.5,
        "meaning": "what remains of the output.",
    }
    assert options["factors"]["meaning"] == "means nothing either, on two lines."
    assert options["layers"]["meaning"].startswith("block numbers")
    assert options["mode"]["takes"] == '"soft" | "no" | "1e-3"'


def test_doctor_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    assert "torch" in result.stdout
    found = json.loads(cli("doctor", "--json").stdout)
    assert found["versions"]["patchkit"] == patchkit.__version__
    assert "cpu" in found["devices"]
    assert "zoo/video" in found["zoo"]
    sparse = found["kernels"]["block_sparse_attention"]["cpu"]
    assert (sparse["path"], sparse["reason"]) == ("blocked", "Triton needs a GPU")
    assert 0 < sparse["checks"]["bfloat16"]["error"] < 1e-2
    assert found["failures"] == []
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_a_kernel_that_fails(cli, monkeypatch):
    survey = importlib.import_module("patchkit.kernels.survey")  # the package has a function of that name

    def broken(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(survey, "block_mass", broken)
    result = cli("doctor")
    assert result.exit_code == 1
    assert "error: block_mass on cpu in bfloat16 (blocked): RuntimeError: out of registers" in result.stderr
    assert "no operator changes its path" in result.stderr
    assert "FAILS" in result.stdout
    assert "block_sparse_attention on" not in result.stderr
    document = cli("doctor", "--json")
    assert document.exit_code == 1
    assert len(json.loads(document.stdout)["failures"]) == 3


def test_schema(cli):
    assert json.loads(cli("schema").stdout) == json.loads(json.dumps(schema()))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "integer", "minimum": 1, "exclusiveMaximum": 9}, "integer >= 1, < 9"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string | null"),
        ({"type": "array", "items": {"type": "integer"}}, "[integer, ...]"),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}]}, "[integer, number]"),
        ({"const": "a"}, '"a"'),
        ({}, "value"),
    ],
)
def test_types_in_words(part, words):
    assert show.readable(part) == words


def test_info_names_the_verb_that_an_example_is_for(cli):
    shown = cli("info", "moh").stdout
    assert "example, for `patchkit train moh-train`" in shown
    assert "example, for `patchkit run moh`" in shown
    assert "example, for `patchkit calibrate deltallm deltallm-calibrate`" in cli("info", "deltallm").stdout

"""patchkit new-recipe."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_what_it_writes_works(cli, here):
    result = cli("new-recipe", "my-method")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in here.iterdir()) == ["my_method.py", "test_my_method.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_style(cli, here):
    ruff = pytest.importorskip("ruff").find_ruff_bin()
    cli("new-recipe", "my-method")
    for command in (["check", "--select", "E,F,W,B,UP,D1", "--ignore", "D103,D100"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, "--no-cache", "--isolated", "--line-length", "120", "."],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_never_overwrites(cli, here):
    (here / "test_my_method.py").write_text("mine")
    result = cli("new-recipe", "my-method")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert [p.name for p in here.iterdir()] == ["test_my_method.py"]
    assert (here / "test_my_method.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["My", "a b", "../x", "class", "1st", "a--b", "", "-x"])
def test_names(cli, here, name):
    result = cli("new-recipe", "--", name)
    assert result.exit_code == 2
    assert "small letters" in result.stderr
    assert list(here.iterdir()) == []


def test_names_that_are_taken(cli, here):
    assert "there is a recipe 'adaspa' already" in cli("new-recipe", "adaspa").stderr


def test_a_folder(cli, here):
    assert cli("new-recipe", "my-method", "--path", "none").exit_code == 2
    (here / "some").mkdir()
    assert cli("new-recipe", "my-method", "--path", "some").exit_code == 0
    assert sorted(p.name for p in (here / "some").iterdir()) == ["my_method.py", "test_my_method.py"]

"""One process at a time in a folder."""

import subprocess
import sys

import pytest

from patchkit.errors import PatchkitError
from patchkit.locking import LOCK, alone_in

HOLD = """
import sys, time
from pathlib import Path
from patchkit.locking import alone_in
with alone_in(Path(sys.argv[1]), "a comparison"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "new" / "folder"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(PatchkitError, match="a comparison is already running") as info,
            alone_in(folder, "a comparison"),
        ):
            pass
        assert str(folder) in str(info.value)
    finally:
        other.kill()  # as a machine that goes down would: nothing is released
        other.wait()
    with alone_in(folder, "a comparison"):
        assert (folder / LOCK).exists()


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path, "a search"):
        1 / 0
    with alone_in(tmp_path, "a search"):
        pass


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchkitError, match="cannot write"), alone_in(tmp_path / "file", "a search"):
        pass

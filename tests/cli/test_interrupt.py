"""Ctrl-C, for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "import testing_recipes\nfrom patchkit.cli.main import main\nmain()\n"


@pytest.mark.skipif(os.name == "nt", reason="signals are different there")
def test_ctrl_c_in_the_middle_of_a_run(recipe_file, here):
    recipe_file.write_text(recipe_file.read_text().replace("dimming: {density: 0.25}", "slow: {seconds: 0.5}"))
    command = [sys.executable, "-c", MAIN, "run", "r.yaml", "--no-compare", "--num-inference-steps", "100"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(
        command,
        cwd=here,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a suite started in the background inherits "ignore Ctrl-C", and so would this child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            for line in process.stderr:
                if line.startswith("running patched"):
                    break
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "stopped" in err
    assert "Traceback" not in err
    assert out == ""
    assert [p.name for p in here.iterdir()] == ["r.yaml"]

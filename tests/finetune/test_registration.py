"""peft knows our adapters, whoever is imported first, and nobody pays for it before."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> dict[str, object]:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_patchkit_imports_nothing_and_waits_once() -> None:
    found = run("""
        import importlib, importlib.util, json, sys
        before = list(sys.meta_path)
        import patchkit
        from patchkit import waiting
        waiting.wait()
        spec = importlib.util.find_spec("peft")  # as transformers asks whether it is installed
        print(json.dumps({
            "imported": sorted(n for n in ("peft", "torch", "transformers", "diffusers") if n in sys.modules),
            "finders": len(sys.meta_path) - len(before),
            "found": spec is not None and spec.origin.endswith("__init__.py"),
        }))
    """)
    assert found == {"imported": [], "finders": 1, "found": True}


@pytest.mark.slow
@pytest.mark.parametrize("first", ["patchkit", "peft"])
def test_peft_learns_of_our_adapters(first: str) -> None:
    second = "peft" if first == "patchkit" else "patchkit"
    found = run(f"""
        import json, sys
        before = len(sys.meta_path)
        import {first}
        import {second}
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        config = PEFT_TYPE_TO_CONFIG_MAPPING["PATCHKIT_MOH"]
        import peft
        print(json.dumps({{
            "config": config.__name__,
            "tuner": PEFT_TYPE_TO_TUNER_MAPPING["PATCHKIT_MOH"].__name__,
            "value": config().peft_type.value,
            "left": [type(f).__module__ for f in sys.meta_path if type(f).__module__.startswith("patchkit")],
            "loader": type(peft.__loader__).__module__ + " " + type(peft.__spec__.loader).__module__,
        }}))
    """)
    assert found["config"] == "MoHConfig"
    assert found["tuner"] == "MoHModel"
    assert found["value"] == "PATCHKIT_MOH"
    assert found["left"] == []
    assert "patchkit" not in str(found["loader"])


def table(first: str) -> dict[str, object]:
    """Which classes peft knows after ``first``, in a process of its own."""
    return run(f"""
        import json
        {first}
        import patchkit
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
        print(json.dumps({{
            "config": configs["PATCHKIT_MOH"].__name__ if "PATCHKIT_MOH" in configs else None,
            "tuner": tuners["PATCHKIT_MOH"].__name__ if "PATCHKIT_MOH" in tuners else None,
        }}))
    """)


KNOWN = {"config": "MoHConfig", "tuner": "MoHModel"}


def test_our_config_may_be_imported_before_peft() -> None:
    """Its module is then half made while peft is imported, and peft asks for it."""
    assert table("from patchkit.recipes.moh import MoHConfig") == KNOWN


@pytest.mark.slow
@pytest.mark.parametrize("first", ["config", "layer", "tuner"])
def test_any_module_of_ours_may_come_before_peft(first: str) -> None:
    assert table(f"import patchkit.finetune.{first}") == KNOWN


def test_without_peft_the_error_says_how_to_get_it() -> None:
    found = run("""
        import json, sys
        sys.modules["peft"] = None  # as if it were not installed
        import importlib.util
        own = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "peft" else own(name, *rest)
        import patchkit
        try:
            from patchkit.recipes.moh import MoHConfig
        except patchkit.MissingDependency as error:
            print(json.dumps({"error": str(error), "recipe": "moh" in patchkit.recipes()}))
    """)
    assert 'pip install "patchkit[finetune]"' in str(found["error"])
    assert found["recipe"] is True

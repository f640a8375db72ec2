"""The commands that only tell: list, info, doctor, schema."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from patchkit.cli.console import FAILED, Debug, Json, Output, Quiet, heavy


def list_recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="Methods and models as a Markdown table.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the recipes that are installed."""
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit import registry
        from patchkit.recipe_files import files

        shipped = files.examples()
        rows = [registry.describe(cls) | {"examples": _examples(name, shipped)} for name, cls in _known()]
        if markdown:
            out.text(registry.markdown())
            return
        out.table(
            "",
            ("recipe", "what it does", "for", "run it"),
            [(r["name"], r["summary"], ", ".join(r["families"]), _runnable(r)) for r in rows],
        )
        out.data(rows)


def _known() -> list[tuple[str, Any]]:
    from patchkit import registry

    return list(registry.all_recipes().items())


def _examples(name: str, shipped: dict[str, str]) -> list[str]:
    """Those of a recipe; the one of its own name, which can be run as it is, comes first."""
    found = [n for n in shipped if n == name or n.startswith((f"{name}-", f"{name}_"))]
    return sorted(found, key=lambda n: (n != name, n))


def _runnable(row: dict[str, Any]) -> str:
    return f"patchkit run {row['examples'][0]}" if row["examples"] else "-"


def _command(name: str, text: str) -> str:
    """What an example is for: the verb whose section it has, or `patchkit run`."""
    import yaml

    from patchkit import jobs

    content = yaml.safe_load(text)
    for verb in jobs.verbs():
        section: Any = content
        for word in verb.split("."):
            section = section.get(word) if isinstance(section, dict) else None
        if section is not None:
            return f"patchkit {verb.replace('.', ' ')} {name}"
    return f"patchkit run {name}"


def info(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe does, its options with their defaults, and its example."""
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit import registry
        from patchkit.recipe_files import files

        cls = registry.get(recipe)
        shipped = files.examples()
        about = registry.describe(cls)
        options = _options(cls)
        out.text(f"{cls.name}: {cls.summary}\n{cls.paper}")
        facts = {
            "effect": "computes attention itself" if cls.effect == "replaces" else "works around the attention op",
            "attention": ", ".join(cls.kinds),
            "for": ", ".join(cls.families),
            "tested on": ", ".join(cls.models) or "-",
            "before": ", ".join(cls.before),
            "after": ", ".join(cls.after),
            "conflicts": ", ".join(cls.conflicts),
        }
        out.table("", ("", ""), [(name, value) for name, value in facts.items() if value])
        rows = [(o["name"], o["takes"], json.dumps(o["default"]), o["meaning"]) for o in options]
        out.table("options", ("name", "takes", "default", "meaning"), rows)
        if cls.arguments:
            out.table("extra arguments of pipe(...)", ("name", "what it is"), list(cls.arguments.items()))
        examples = {name: shipped[name] for name in _examples(recipe, shipped)}
        for name, text in examples.items():
            out.text(f"example, for `{_command(name, text)}`:\n\n{text.rstrip()}\n")
        out.data(about | {"options": options, "arguments": dict(cls.arguments), "examples": examples})


def _options(cls: Any) -> list[dict[str, Any]]:
    from patchkit.recipe_base import Recipe

    meanings: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        meanings |= documented(parent.__doc__ or "")
    rows = [
        {
            "name": n,
            "takes": readable(p),
            "default": p.get("default"),
            "meaning": meanings.get(n, "").replace("``", "`"),
        }
        for n, p in cls.schema()["properties"].items()
    ]
    common = Recipe.__dataclass_fields__
    return sorted(rows, key=lambda row: row["name"] in common)  # the recipe's own first


def documented(docstring: str) -> dict[str, str]:
    """Name -> text of the entries under ``Args:`` of a docstring."""
    found: dict[str, str] = {}
    name, inside, depth = "", False, 0
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Attributes:"):
            inside, depth = True, indent + 4
        elif not inside or not line.strip():
            continue
        elif indent < depth:
            inside = False
        elif indent == depth and (entry := re.match(r"\s*([\w, ]+):\s*(.*)", line)):
            name = entry[1].strip()
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def readable(schema: dict[str, Any]) -> str:
    """The type and range of an option, in words."""
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(readable(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(json.dumps(v) for v in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = str(schema.get("type", "value"))
    if kind == "array":
        parts = schema.get("prefixItems")
        return f"[{', '.join(readable(p) for p in parts)}]" if parts else f"[{readable(schema.get('items', {}))}, ...]"
    signs = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs if key in schema]
    return " ".join([kind, ", ".join(limits)]).strip()


def schema() -> None:
    """Print the JSON schema of recipe files, for editors and other tools."""
    with Output(json=True).guarded() as out:
        heavy(out)
        from patchkit.recipe_files.schema import schema as build

        out.data(build())


def doctor(json_: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show versions and devices; run every kernel and say which path it takes, why, and how exact it is.

    Writes nothing. Exit code 1 if a kernel fails.
    """
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        heavy(out)
        from patchkit.runs.diagnosis import diagnose

        with out.working("running the kernels"):
            found = diagnose()
        out.table("versions", ("package", "version"), [(n, v or "not installed") for n, v in found["versions"].items()])
        out.table("devices", ("device", "what it is"), list(found["devices"].items()))
        if found["kernels"]:
            head = ("operator", "device", "path", "why", "error fp32", "fp16", "bf16", "first call")
            out.table("kernels: the path they take, their error against fp32", head, _kernel_rows(found["kernels"]))
        out.table("zoo", ("model", "what it is"), list(found["zoo"].items()))
        for problem in found["problems"]:
            out.note(problem)
        for failure in found["failures"]:
            out.failure(failure)
        if found["failures"]:
            out.failure(
                "calls of that kind raise or are wrong: no operator changes its path because a kernel failed",
                "update torch and triton together, or leave out recipes that use it; dense attention is torch's own",
            )
        out.data(found)
        if found["failures"]:
            raise typer.Exit(FAILED)


def _kernel_rows(kernels: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, devices in kernels.items():
        for device, entry in devices.items():
            checks = entry["checks"]
            errors = [_error(checks.get(dtype)) for dtype in ("float32", "float16", "bfloat16")]
            first = max(check["first_ms"] for check in checks.values())
            rows.append((name, device, entry["path"], entry["reason"], *errors, f"{first:.0f} ms"))
    return rows


def _error(check: dict[str, Any] | None) -> str:
    if check is None:
        return "-"
    return "FAILS" if check["failure"] else f"{check['error']:.0e}"

"""Generate tables of the documentation from the code: they replace `<!-- generated: NAME -->` in a page.

Names: keys (config/schema.py and its comments), groups (the YAML files in conf/), commands (the scripts in
pyproject.toml and their `--help`), notebooks (the table in notebooks/README.md).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
import tomllib
import typing
from pathlib import Path
from typing import Any

import yaml

from reft_lightning.config import compose, schema
from reft_lightning.config.explain import Vocabulary

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- generated: (\w+) -->")
IDENTITY = {
    "free": "no", "place": "except local paths", "seed": "as its seed", "file": "by file name",
    "watching": "except those that only watch",
}  # fmt: skip


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of one page (an mkdocs event)."""
    return MARK.sub(lambda found: TABLES[found[1]](), markdown)


# --- keys ---------------------------------------------------------------------------------------------------------


def keys() -> str:
    """Return a section for each part of the configuration, with one line per key."""
    source = inspect.getsource(schema)
    comments = _comments(source)
    parts = [_section("", "The top level", schema.Config, comments)]
    for name, cls in typing.get_type_hints(schema.Config).items():
        if dataclasses.is_dataclass(cls):
            parts.append(_section(f"{name}.", name, typing.cast(type, cls), comments))
    return "\n\n".join(parts)


def _section(prefix: str, title: str, cls: type, comments: dict[tuple[str, str], str]) -> str:
    hints, marks = typing.get_type_hints(cls), schema.marks()
    of_section = marks.get(prefix.rstrip("."), "")
    lines = ["| key | type | default | identifies a run | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        key = f"{prefix}{field.name}"
        words = [comments.get((cls.__name__, field.name), "")]
        if allowed := schema.CHOICES.get(key):
            missing = [choice for choice in allowed if choice not in words[0]]
            words += [f"one of {', '.join(allowed)}"] if missing else []
        if bounds := schema.BOUNDS.get(key):
            words.append(f"must {bounds}")
        refused: dict[str, list[str]] = {}
        for value, reason in schema.REFUSED.get(key, {}).items():
            refused.setdefault(reason, []).append(yaml.dump(value).split("\n")[0])
        words += [f"not {', '.join(values)}, which {reason}" for reason, values in refused.items()]
        cells = [
            f"`{key}`", _type(hints[field.name]), f"`{_default(field)}`",
            IDENTITY.get(marks.get(key, of_section), "yes"), "; ".join(_escaped(w) for w in words if w),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    about = inspect.getdoc(cls) or ""
    return f"## {title}\n\n{about.replace('``', '`')}\n\n" + "\n".join(lines)


def _type(hint: Any) -> str:
    inside = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Union:
        return f"{_type(inside[0])} or null"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
    return words.get(hint) or {list: "list", dict: "dictionary"}[typing.get_origin(hint)]


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = typing.cast(Any, field.default_factory)()
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return (
        {"???": "required"}.get(value, value) if isinstance(value, str) else yaml.dump(value).split("\n")[0]
    )


def _comments(source: str) -> dict[tuple[str, str], str]:
    """Return (class, field) -> its comment, from the lines above it and the ends of its lines."""
    at, whole = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.strip().startswith("#")
            (whole if alone else at)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            lines = [at[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in at]
            above, n = [], node.lineno - 1
            while n in whole:
                above.insert(0, whole[n])
                n -= 1
            found[cls.name, ast.unparse(node.target)] = " ".join([*above, *lines])
    return found


# --- groups and commands ------------------------------------------------------------------------------------------


def groups() -> str:
    """Return a table for each group in `conf/`: its files, with the first sentence of each."""
    parts = []
    for group, options in Vocabulary([compose.config_dir()]).groups.items():
        if "/" in group or group == "local":
            continue
        lines = [f"## {group}", "", f"| `{group}=` | description |", "|---|---|"]
        for option in options:
            text = (compose.config_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")
            lines.append(f"| `{option}` | {_first_words(text)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _first_words(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    if lines and lines[0].startswith("@package"):
        lines = lines[1:]
    words = " ".join(lines)
    if header := re.search(r"Paper: *(?:none\. )?(.+?) Tables?: *(.+?) Expected: ", words):
        paper, table = header.groups()
        words = f"Table {table}" if table[0].isdigit() else paper
    return _escaped(re.split(r"(?<=[a-z0-9)])(?<! al)(?<! eq)[.;](?= |$)", words)[0])


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<])", r"\\\1", text)


def commands() -> str:
    """Return a table of the commands, followed by the `--help` of each."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    table = ["| command | what it does |", "|---|---|"]
    parts = []
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        about = inspect.getdoc(getattr(importlib.import_module(module), function)) or ""
        first = about.replace("``", "`").split("\n\n")[0].replace("\n", " ")
        table.append(f"| [`{name}`](#{name}) | {first} |")
        parts.append(f"## {name}\n\n```text\n{_help(name, module, function)}\n```")
    return "\n".join(table) + "\n\n" + "\n\n".join(parts)


def _help(name: str, module: str, function: str) -> str:
    code = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- notebooks ----------------------------------------------------------------------------------------------------


def notebooks() -> str:
    """Return the table in notebooks/README.md; files outside docs/ are named, not linked."""
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return re.sub(r"\[([^]]+)\]\((\w+\.ipynb)\)", r"\1: `\2`", table)


TABLES = {"keys": keys, "groups": groups, "commands": commands, "notebooks": notebooks}

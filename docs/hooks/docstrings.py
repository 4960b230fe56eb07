"""Docstrings as Markdown: roles, formulas and tables of reStructuredText, which the code is written in."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SIGNS = {
    "Phi": "Φ", "alpha": "α", "sigma": "σ", "nu": "ν", "pm": "±", "odot": "⊙", "sum": "Σ", "prod": "Π", "le": "≤",
    "ge": "≥", "to": "→", "mid": "|", "cdot": "·", "log": "log", "max": "max", "min": "min", "tanh": "tanh", "top": "T",
    "qquad": "    ", "quad": "  ", "ell": "ℓ", "Big": "", "big": "", "left": "", "right": "", "|": "‖",
    "pi": "π", "beta": "β", "gamma": "γ", "zeta": "ζ",
}  # fmt: skip
RAISED = dict(zip("0123456789T-+", "⁰¹²³⁴⁵⁶⁷⁸⁹ᵀ⁻⁺", strict=True))
LOWERED = dict(zip("0123456789ijmnrs", "₀₁₂₃₄₅₆₇₈₉ᵢⱼₘₙᵣₛ", strict=True))


class Markdown(Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring as Markdown."""
    text = re.sub("::$", ":", _tables(text), flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math::\s*((?:.+\n?)+)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda m: formula(m[1]), text)
    return re.sub(r":[a-z]+:`~?\.*([^`]+)`", lambda m: f"`{m[1].rpartition('reft_lightning.')[2]}`", text)


def _block(found: re.Match) -> str:
    return f'{found[1]}<p class="formula">{formula(" ".join(found[2].split()))}</p>\n'


def formula(tex: str) -> str:
    r"""Return a formula of one line as text.

    >>> formula(r"\Phi(h) = h + W_2^\top (W_1 h + b)")
    'Φ(h) = h + W₂ᵀ (W₁ h + b)'
    """
    tex = re.sub(r"\\(?:text|mathrm|operatorname)\{([^{}]*)\}", r"\1", tex)
    tex = re.sub(r"\\ell(?=_)", "ℓ", tex)
    tex = re.sub(r"\\hat ([a-z])", "\\1\N{COMBINING CIRCUMFLEX ACCENT}", tex)
    tex = re.sub(r"\\bar ([a-z])", "\\1\N{COMBINING MACRON}", tex)
    tex = re.sub(r"\\(\||[A-Za-z]+)", lambda m: SIGNS.get(m[1], m[0]), re.sub(r"\\[,;!]", " ", tex))
    tex = re.sub(r"\^([0-9T])", lambda m: RAISED[m[1]], tex)
    tex = re.sub(r"\^\{(-?[0-9]+)\}", lambda m: "".join(RAISED[c] for c in m[1]), tex)
    tex = re.sub(r"_([0-9ijmnrs])(?![a-z])", lambda m: LOWERED[m[1]], tex)
    tex = re.sub(r"\\sqrt\s?(?:\{([^{}]*)\}|(\w))", lambda m: f"√({m[1]})" if m[1] else f"√{m[2]}", tex)
    tex = re.sub(r"\\binom\{([^{}]*)\}\{([^{}]*)\}", r"C(\1, \2)", tex)
    tex = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1) / (\2)", tex)
    tex = re.sub(r"(?<![\w)])\((\w)\)|\^\{(\w)\}", lambda m: m[1] or f"^{m[2]}", tex)
    if "\\" in tex:
        return f"<code>{tex}</code>"  # no page shows one; a test looks for them
    return tex.replace("<", "&lt;").replace("-", "−").replace("*", "&#42;")


def _tables(text: str) -> str:
    lines, written = text.split("\n"), []
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r" *=+(?: +=+)+", line)]
    start = 0
    while rules:
        several = rules[:3] if len(rules) > 2 and rules[1] == rules[0] + 2 else rules[:2]
        rules = rules[len(several) :]
        first, last = several[0], several[-1]
        columns = [m.start() for m in re.finditer("=+", lines[first])]
        indent = lines[first][: columns[0]]
        body = [i for i in range(first + 1, last) if i not in several]
        rows = [
            [_cell(lines[i], a, b) for a, b in zip(columns, [*columns[1:], None], strict=True)] for i in body
        ]
        head = rows.pop(0) if len(several) == 3 else ["" for _ in columns]
        table = [head, ["---"] * len(columns), *rows]
        written += [*lines[start:first], *(f"{indent}| {' | '.join(row)} |" for row in table)]
        start = last + 1
    return "\n".join(written + lines[start:])


def _cell(line: str, start: int, stop: int | None) -> str:
    return line[start:stop].strip().replace("|", "\\|").replace("*", "\\*")

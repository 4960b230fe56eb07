"""The one "did you mean" of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name closest to ``name``, or an empty text.

    >>> did_you_mean("bolq", ["boolq", "piqa"])
    "; did you mean 'boolq'?"
    """
    names = [str(option) for option in allowed]
    close = difflib.get_close_matches(str(name), names, n=1) or [n for n in names if name and str(name) in n]
    return f"; did you mean {prefix + close[0]!r}?" if close else ""

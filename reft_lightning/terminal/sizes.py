"""Human-readable sizes in bytes."""

from __future__ import annotations


def size(count: float) -> str:
    """Return a number of bytes in a suitable unit, a power of 1000.

    >>> size(17), size(5_300), size(2.7e8), size(3.1e13)
    ('17 B', '5.3 kB', '270.0 MB', '31000.0 GB')
    """
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

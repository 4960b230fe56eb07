"""Figures of the findings, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.atomic import write_whole
from .angles import spread
from .findings import main_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the first two are safe for colour blindness (Okabe and Ito 2008)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6b7280"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "reft-inspect", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "axes.titlesize": 10,
}  # fmt: skip


def draw(found: dict[str, Any], out: Path) -> list[Path]:
    """Write each figure that has data, replacing earlier ones; return the files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pictures: dict[str, tuple[str, Callable[[Figure, dict[str, Any]], None]]] = {
        "edit_norm": ("edit_norm", _edit_norm),
        "angles": ("subspaces", _angles),
        "switched_off": ("without", _without),
        "strength": ("strength", _strength),
    }
    written = []
    for name, (needs, paint) in pictures.items():
        for ending in ("png", "svg"):
            path = out / f"{name}.{ending}"
            if not found.get(needs):
                path.unlink(missing_ok=True)  # from an earlier inspection
                continue
            with rc_context(STYLE):
                figure = Figure(figsize=(8, 4.2), layout="constrained")
                paint(figure, found)
                metadata = {"Date": None} if ending == "svg" else {}
                write_whole(path, partial(figure.savefig, format=ending, dpi=130, metadata=metadata))
            written.append(path)
    return written


def _edit_norm(figure: Figure, found: dict[str, Any]) -> None:
    norm = found["edit_norm"]
    layers, places = norm["layers"], norm["positions"]
    missing = [float("nan")] * len(places)
    grid = np.transpose([norm["by_position"].get(layer, missing) for layer in layers])
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(places)), places)
    _ticks(axes.set_xticks, layers)
    title = r"How far an edit moves a representation: $\|\Phi(h)-h\|\,/\,\|h\|$, mean over rows"
    axes.set(xlabel="layer", title=title)
    figure.colorbar(image, ax=axes)


def _ticks(set_ticks: Callable[[list[int], list[str]], Any], names: Sequence[Any]) -> None:
    some = list(range(0, len(names), max(1, len(names) // 15)))
    set_ticks(some, [str(names[i]) for i in some])


def _angles(figure: Figure, found: dict[str, Any]) -> None:
    angles = found["subspaces"]
    layers, nan = angles["layers"], float("nan")
    panels = figure.subplots(1, 2 if angles["runs"] else 1, squeeze=False)[0]
    # a layer's angle to itself, 0, would give all others the same colour
    grid = [
        [nan if i == j else angle for j, angle in enumerate(row)] for i, row in enumerate(angles["angle"])
    ]
    chance = [angle for i, row in enumerate(angles["chance"]) for angle in row[:i] if angle == angle]
    image = panels[0].imshow(grid, cmap="viridis", vmax=90)
    for set_ticks in (panels[0].set_xticks, panels[0].set_yticks):
        _ticks(set_ticks, layers)
    title = f"Degrees between layers (chance {spread(chance)})" if chance else "Degrees between layers"
    panels[0].set(xlabel="layer", ylabel="layer", title=title)
    figure.colorbar(image, ax=panels[0])
    if angles["runs"]:
        for (name, by_layer), marker in zip(angles["runs"].items(), "os^Dv" * 9, strict=False):
            found_angles, by_chance = (
                [pair[what] for pair in by_layer.values()] for what in ("angle", "chance")
            )
            (line,) = panels[1].plot(list(by_layer), found_angles, marker=marker, ms=4, label=Path(name).name)
            panels[1].plot(list(by_layer), by_chance, color=line.get_color(), ls="--", lw=1)
        panels[1].plot([], [], color=GREY, ls="--", label="chance")
        panels[1].set(xlabel="layer", title="Degrees to the same layer of another run")
        panels[1].legend()


def _without(figure: Figure, found: dict[str, Any]) -> None:
    without, scores = found["without"], found["scores"]
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("layer", "position"), strict=True):
        names = [str(name) for name in without[what]]
        losses = [values["loss"] for values in without[what].values()]
        axes.bar(range(len(names)), [x - scores["adapted"]["loss"] for x in losses], color=BLUE)
        _ticks(axes.set_xticks, names)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set(xlabel=f"{what} whose edit is switched off")
        axes.label_outer()
    figure.axes[0].set_ylabel("validation loss minus that with all edits")
    figure.suptitle(
        f"All edits: {scores['adapted']['loss']:.4f}; none: {without['all']['loss']:.4f}", fontsize=10
    )


def _strength(figure: Figure, found: dict[str, Any]) -> None:
    curve = found["strength"]
    main = main_score(found["scores"]["adapted"])
    shown = [name for name in dict.fromkeys([main, "loss", "perplexity"]) if name in curve[0]]
    titles = {"loss": "validation loss", "perplexity": "perplexity of a text"}
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        axes.plot([p["scale"] for p in curve], [p[name] for p in curve], marker="o", color=BLUE, ms=4)
        for scale, colour in ((0, GREY), (1, ORANGE)):
            axes.axvline(scale, color=colour, lw=0.8, ls="--")
        if name == "perplexity":
            axes.set_yscale("log")
        axes.set(xlabel="strength (0: base, 1: as trained)", title=titles.get(name, name.replace("_", " ")))

"""Print the findings to a terminal."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..terminal.lines import say
from .angles import spread
from .findings import main_score

SHOWN = 4  # layers of the logit lens: those with the largest edits


def show(found: dict[str, Any], console: Console) -> None:
    """Print tables of the findings, and one line for everything that cannot be inspected."""
    if "model" in found:
        parameters = f"{found['trainable_parameters']:,} trained parameters"
        rows = f"{found['rows']} validation rows of {', '.join(found['tasks'])}"
        say(console, found["folder"], "bold")
        console.print(escape(f"{found['model']}, {found['method']}, {parameters}; {rows}"), soft_wrap=True)
        _scores(found, console)
    if "edit_norm" in found:
        _parts(found, console)
    if angles := found.get("subspaces"):
        _angles(angles, console)
    if found.get("logit_lens"):
        _lens(found, console)
    if "strength" in found:
        _strength(found["strength"], console)
    for line in found["not_inspected"]:
        say(console, line)


def _table(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _scores(found: dict[str, Any], console: Console) -> None:
    rows = []
    for what, label in (("scores", "own rows"), ("other", f"{found['other_family']} rows")):
        if what in found:
            base, adapted = found[what]["base"], found[what]["adapted"]
            for name, value in base.items():
                of = f"text ({found['text']})" if name == "perplexity" else label
                rows.append([of, name.replace("_", " "), _number(name, value), _number(name, adapted[name])])
    title = "Base and adapted: what was learnt, what was forgotten"
    _table(console, title, ["", "", "base", "adapted"], rows)


def _parts(found: dict[str, Any], console: Console) -> None:
    norm, without, scores = found["edit_norm"], found["without"], found["scores"]["adapted"]
    main = main_score(scores)
    shown = list(dict.fromkeys(["loss", main]))
    places = zip(*norm["by_position"].values(), strict=True)
    by = {
        "layer": norm["by_layer"],
        "position": {
            # layers may edit different positions: nan if a layer does not edit one
            name: fmean([value for value in column if value == value] or [float("nan")])
            for name, column in zip(norm["positions"], places, strict=True)
        },
    }
    for what, norms in by.items():
        columns = [what, "edit norm", *(f"{name.replace('_', ' ')} without it" for name in shown)]
        rows = [
            [str(key), f"{norms.get(key, float('nan')):.3f}", *(_number(n, values[n]) for n in shown)]
            for key, values in without[what].items()
        ]
        rows.append([f"all {what}s", "", *(_number(n, without["all"][n]) for n in shown)])
        rows.append(["none", "", *(_number(n, scores[n]) for n in shown)])
        _table(console, f"Edits by {what}, and the score with one switched off", columns, rows)


def _angles(angles: dict[str, Any], console: Console) -> None:
    layers, grid, chance = angles["layers"], angles["angle"], angles["chance"]
    pairs = [
        (grid[i][j], layers[i], layers[j], chance[i][j])
        for i in range(len(layers)) for j in range(i) if grid[i][j] == grid[i][j]
    ]  # fmt: skip
    if pairs:
        least, one, other, _ = min(pairs)
        say(
            console,
            f"subspaces of layers: {fmean(pair[0] for pair in pairs):.1f} degrees apart on average, nearest {other} "
            f"and {one} with {least:.1f}; chance {spread(pair[3] for pair in pairs)}",
        )
    for name, by_layer in angles["runs"].items():
        if by_layer:
            found = [pair["angle"] for pair in by_layer.values()]
            expected = spread(pair["chance"] for pair in by_layer.values())
            say(
                console,
                f"same layers of {name}: {fmean(found):.1f} degrees apart on average, nearest {min(found):.1f}; "
                f"chance {expected}",
            )


def _lens(found: dict[str, Any], console: Console) -> None:
    shown = {line["layer"] for line in found["logit_lens"]}
    norms = {layer: norm for layer, norm in found["edit_norm"]["by_layer"].items() if layer in shown}
    largest = sorted(norms, key=norms.__getitem__, reverse=True)[:SHOWN]
    rows = [
        [str(line["layer"]), line["direction"], *(" ".join(line[to][:4]) for to in ("towards", "away_from"))]
        for line in found["logit_lens"]
        if line["layer"] in largest and not line["direction"].startswith("row")
    ]
    _table(
        console, "Logit lens of the largest edits (all layers, and rows of R, in inspect.json)",
        ["layer", "direction", "towards", "away from"], rows,
    )  # fmt: skip


def _strength(curve: list[dict[str, float]], console: Console) -> None:
    names = [name for name in curve[0] if name != "scale"]
    rows = [[f"{point['scale']:g}", *(_number(name, point[name]) for name in names)] for point in curve]
    _table(console, "Strength of all edits", ["scale", *(name.replace("_", " ") for name in names)], rows)

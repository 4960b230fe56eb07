"""Pictures that are drawn here, shapes of one kind and colour, and rows of questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "x")
MOST = 4  # shapes of a picture
CELL, GRID = 14, 3  # pixels of a cell, which is a patch of the model's tower, and cells a side


class Scene(NamedTuple):
    """What a picture shows, and in which of its cells."""

    count: int
    colour: str
    shape: str
    cells: tuple[int, ...]


def scenes(count: int, seed: int) -> list[Scene]:
    """Draw scenes at random; those of one seed are always the same."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        number = rng.randint(1, MOST)
        cells = tuple(sorted(rng.sample(range(GRID * GRID), number)))
        found.append(Scene(number, rng.choice(list(COLOURS)), rng.choice(SHAPES), cells))
    return found


def draw(scene: Scene) -> Image.Image:
    """Return the picture of a scene."""
    picture = Image.new("RGB", (CELL * GRID, CELL * GRID), (245, 245, 245))
    pen, colour = ImageDraw.Draw(picture), COLOURS[scene.colour]
    for cell in scene.cells:
        left, top = CELL * (cell % GRID) + 2, CELL * (cell // GRID) + 2
        right, bottom = left + CELL - 5, top + CELL - 5
        if scene.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif scene.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        else:
            pen.line((left, top, right, bottom), fill=colour, width=3)
            pen.line((left, bottom, right, top), fill=colour, width=3)
    return picture


def write(folder: Path, splits: Mapping[str, Sequence[tuple[Scene, str, Any]]]) -> Path:
    """Write pictures and ``<split>.jsonl`` of (scene, question, answer or answers) into a folder, and return it."""
    (folder / "pictures").mkdir(parents=True)
    for split, rows in splits.items():
        lines = []
        for number, (scene, question, answer) in enumerate(rows):
            name = f"pictures/{split}_{number}.png"
            draw(scene).save(folder / name)
            lines.append(json.dumps({"image": name, "question": question, "answers": answer}))
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder

"""Pictures that rows name: files of a folder, or bytes as the hub's tables hold them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

MARK = "<image>"  # where a picture stands in a text, as in LLaVA's files
SENT_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")  # of what a stranger sends: others run other programs (EPS)


@dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Args:
        name: as the row has it.
        path: of its file; None where the row holds the bytes.
        data: its bytes.
        sent: whether a stranger sent it, in one of :data:`SENT_FORMATS`.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    sent: bool = False

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return self.path.read_bytes() if self.path is not None else self.data or b""

    @cached_property
    def digest(self) -> str:
        """What is equal in two files with the same bytes."""
        return hashlib.sha256(self.read()).hexdigest()[:16]

    @property
    def pixels(self) -> int:
        """How many there are, which its first bytes tell."""
        return self._opened(lambda image: image.width * image.height)

    def open(self) -> Any:
        """Return the picture in RGB, 8 bits a colour, turned as its camera was held (EXIF), as viewers show it."""
        from PIL import ImageOps

        return self._opened(lambda image: _in_8_bits(ImageOps.exif_transpose(image)).convert("RGB"))

    def _opened(self, of: Callable[[Any], Any]) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            return of(Image.open(io.BytesIO(self.read()), formats=SENT_FORMATS if self.sent else None))
        except UnidentifiedImageError:
            formats = f"a {', '.join(SENT_FORMATS[:-1])} or {SENT_FORMATS[-1]} file"
            reason = f"it is not {formats if self.sent else 'a picture that PIL reads'}"
        except FileNotFoundError:
            reason = f"there is no file {self.path}; data.image_folder names another folder"
        except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
            reason = str(error)
        raise ValueError(f"the picture {self.name!r} cannot be read: {reason}")


def _in_8_bits(image: Any) -> Any:
    """Return a picture whose grey values lie in 0..255; PIL cuts those of 16 bits off there, which turns them white."""
    if image.mode in ("I", "F"):
        raise ValueError(
            "its grey values are 32-bit numbers, whose range the file does not tell: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image


def pictures_in(value: Any, name: str, folder: Path) -> tuple[Picture, ...]:
    """Return the pictures of a cell: the name of a file, bytes, or a list of those; none of an empty cell.

    Args:
        value: of the cell; an object with ``bytes`` or ``path`` is how the hub's tables write a picture.
        name: of the column.
        folder: that names of files are relative to.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, list | tuple):
        return tuple(picture for part in value for picture in pictures_in(part, name, folder))
    if isinstance(value, bytes):
        return (Picture("bytes", data=value),)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return (Picture(str(value.get("path") or "bytes"), data=value["bytes"]),)
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str) and path:
        return (Picture(path, folder / path),)  # an absolute name is used as it is
    raise ValueError(f"column {name!r} must name a picture, or hold its bytes; got {value!r:.80}")


def marked(
    turns: tuple[tuple[str, str], ...], prompt: str, pictures: Sequence[Picture]
) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return turns and prompt with a mark for each picture: their own, or all before the first question."""
    marks = sum(text.count(MARK) for text in (prompt, *(text for _, text in turns)))
    if marks == 0 and pictures:
        first = MARK * len(pictures) + "\n"
        asked = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if asked is None:
            return turns, first + prompt
        role, text = turns[asked]
        return (*turns[:asked], (role, first + text), *turns[asked + 1 :]), prompt
    if marks != len(pictures):
        raise ValueError(
            f"there must be as many marks {MARK} as pictures; got pictures: {len(pictures)}, marks: {marks}"
        )
    return turns, prompt

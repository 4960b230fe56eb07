"""The pictures of rows: files in a folder, or bytes as in the hub's tables."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

MARK = "<image>"  # the place of a picture in a text, as in LLaVA's files
# accepted from untrusted senders; other formats can run programs (EPS)
SENT_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")


@dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Args:
        name: the picture's name in the row.
        path: its file; None if the row contains the bytes.
        data: its bytes.
        sent: whether it comes from an untrusted sender and must be in one of :data:`SENT_FORMATS`.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    sent: bool = False

    def read(self) -> bytes:
        """Return the bytes of the picture."""
        return self.path.read_bytes() if self.path is not None else self.data or b""

    @cached_property
    def digest(self) -> str:
        """A short hash of the bytes."""
        return hashlib.sha256(self.read()).hexdigest()[:16]

    @property
    def pixels(self) -> int:
        """The number of pixels, read from the header."""
        return self._opened(lambda image: image.width * image.height)

    def open(self) -> Any:
        """Return the picture in RGB with 8 bits per channel, rotated by its EXIF orientation as in image viewers."""
        from PIL import ImageOps

        return self._opened(lambda image: _in_8_bits(ImageOps.exif_transpose(image)).convert("RGB"))

    def _opened(self, of: Callable[[Any], Any]) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            return of(Image.open(io.BytesIO(self.read()), formats=SENT_FORMATS if self.sent else None))
        except UnidentifiedImageError:
            formats = f"a {', '.join(SENT_FORMATS[:-1])} or {SENT_FORMATS[-1]} file"
            reason = f"it is not {formats if self.sent else 'in a format that PIL reads'}"
        except FileNotFoundError:
            reason = f"there is no file {self.path}; set data.image_folder to the folder of the pictures"
        except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
            reason = str(error)
        raise ValueError(f"the picture {self.name!r} cannot be read: {reason}")


def _in_8_bits(image: Any) -> Any:
    """Return a picture with grey values in 0..255; PIL would clip 16-bit values, which turns them white."""
    if image.mode in ("I", "F"):
        raise ValueError("its grey values are 32-bit numbers of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image


def pictures_in(value: Any, name: str, folder: Path) -> tuple[Picture, ...]:
    """Return the pictures of a cell: a file name, bytes, or a list of these; an empty cell has none.

    Args:
        value: the cell; also an object with ``bytes`` or ``path``, the form of pictures in the hub's tables.
        name: the column name.
        folder: the folder that file names are relative to.
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
        return (Picture(path, folder / path),)  # an absolute path is used as is
    raise ValueError(
        f"column {name!r} must contain the name of a picture file, or its bytes; got {value!r:.80}"
    )


def marked(
    turns: tuple[tuple[str, str], ...], prompt: str, pictures: Sequence[Picture]
) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return turns and prompt with a mark for each picture; without marks, all come before the first question."""
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

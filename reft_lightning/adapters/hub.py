"""Files of the Hugging Face hub: two for an adapter, and an error that names what was tried if one does not come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEANT = {401: "it is private, or does not exist: give token=, or log in", 403: "your token may not read it",
         404: "there is none"}  # fmt: skip
LONGEST = 200  # characters of a reason


def download(
    name: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of the hub's cache that holds these files of a repository.

    Raises:
        FileNotFoundError: if one does not come, for whatever reason; names the address that was asked.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    place = Path()
    for file in files:
        try:
            place = Path(hf_hub_download(name, file, revision=revision, subfolder=subfolder, token=token))
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{name!r} is not a folder, and not a name of the hub either, which is owner/name"
            ) from error
        except Exception as error:  # what comes from a network can raise anything, down to a JSONDecodeError
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            status: Any = getattr(getattr(cause, "response", None), "status_code", None)
            said = (str(cause).splitlines() or [""])[0][:LONGEST]
            reason = MEANT.get(status) or f"{type(cause).__name__}: {said}"
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set, so only the hub's cache was read"
            path = "/".join([name, "resolve", revision or "main", *([subfolder] if subfolder else []), file])
            raise FileNotFoundError(
                f"{name!r} is not a folder, and {constants.ENDPOINT}/{path} could not be read: {reason}"
            ) from error
    return place.parent

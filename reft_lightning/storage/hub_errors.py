"""Say why a model or a dataset could not be read from the Hugging Face hub, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError

LONGEST = 300  # characters of a reason


@contextmanager
def explained(
    what: str,
    where: str,
    instead: str,
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, StrictDataclassError),
    raised: type[OSError] = OSError,
) -> Iterator[None]:
    """Explain the errors of a library that reads from the hub.

    Args:
        what: what is read, such as "the model 'owner/name'".
        where: the name on the hub, or a folder.
        instead: what else can be done if the hub does not give it, as the rest of a sentence.
        kinds: the errors to explain, in addition to those of the network.
        raised: the type of the error to raise.
    """
    try:
        yield
    except Exception as error:
        fault = network_fault(error)
        if fault is None and not isinstance(error, kinds):
            raise
        said = f"{what} could not be loaded: {reason_of(error)}"
        advice = "" if Path(where).is_dir() else f"\n{_advice(fault)}; or {instead}."
        raise raised(said + advice) from error


def reason_of(error: BaseException) -> str:
    """Return in one line why a library could not read something.

    transformers and datasets describe a broken connection as if the name were wrong ("Can't load the model").
    """
    said = str(error)
    if isinstance(error, StrictDataclassError):  # the last line says which value is wrong
        said = said.strip().splitlines()[-1]
    return network_fault(error) or shorten(said, LONGEST, placeholder=" ...") or type(error).__name__


def network_fault(error: BaseException | None) -> str | None:
    """Return what is wrong with the network or the hub; None if the hub gave an answer, or was not asked."""
    seen = set()
    while error is not None and error not in seen:
        seen.add(error)
        response = getattr(error, "response", None)
        if response is None and type(error).__module__.startswith("httpx"):  # or httpx2
            return f"{type(error).__name__}: {shorten(str(error), LONGEST, placeholder=' ...')}"
        if response is not None and (response.status_code == 429 or response.status_code >= 500):
            return f"{response.url} answered {response.status_code}"
        error = error.__cause__ or error.__context__  # which datasets hides with `from None`
    return None


def _advice(fault: str | None) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so only the hub's cache is read: unset it if the hub can be reached"
    if fault:
        return "Run the same command again later: a download continues where it stopped"
    return "Check the name (owner/name) and the network; if access is restricted, log in with hf auth login"

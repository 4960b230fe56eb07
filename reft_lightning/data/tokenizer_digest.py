"""A digest of everything that a tokenizer's ids depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# Attributes that do not affect ids: the tokenizer's origin, the layout of conversations (which are rendered before
# tokenisation), and state noted while it is used.
_NO_IDS = {
    "chat_template", "deprecation_warnings", "files_loaded", "init_inputs", "init_kwargs", "name_or_path",
    "response_template", "verbose", "_in_target_context_manager",
}  # fmt: skip
_PROBE = "Ab  1,234\n\tdon't </s> <s> naïve 中文 🙂 ﬁ"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of the class, vocabulary, rules, special tokens and options of a tokenizer.

    Returns:
        None if the class is not from transformers or has parts written in Python, because what its ids depend on
        cannot be determined from outside.
    """
    kind = type(tokenizer)
    if kind.__module__.partition(".")[0] != "transformers":
        log.info(
            "encoded rows are not cached, because %s.%s is not a tokenizer of transformers",
            kind.__module__,
            kind.__name__,
        )
        return None
    # These calls come first, because they also reset truncation and padding that earlier calls left in the rules.
    probe = [tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (False, True)]
    state = _rules(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else _files(tokenizer)
    if state is None:
        log.info("encoded rows are not cached, because %s has parts that cannot be serialised", kind.__name__)
        return None
    options = {name: value for name, value in vars(tokenizer).items() if name not in _NO_IDS}
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    described = json.dumps([kind.__qualname__, state, options, probe, ids], sort_keys=True, default=_named)
    return hashlib.sha256(described.encode()).hexdigest()


def encoding_settings(
    layout: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any] | None:
    """Return what encoded rows depend on in addition to their texts; None if it is not known."""
    digest = tokenizer_digest(tokenizer)
    return None if digest is None else {"layout": layout, "tokenizer": digest, "max_length": max_length}


def _rules(tokenizer: PreTrainedTokenizerFast) -> str | None:
    try:
        rules = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises Exception itself for components written in Python
        log.debug("%s", error)
        return None
    return hashlib.sha256(rules.encode()).hexdigest()


def _files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".jinja")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _named(value: Any) -> str:
    # objects are covered by the rules or the files; their repr may contain a memory address
    return repr(value) if isinstance(value, AddedToken) else type(value).__name__

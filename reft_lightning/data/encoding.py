"""From text to tokens, and from tokens to batches in the prompt | target layout.

Letters: b rows, s columns, t target columns. Prompts are left-padded to a common boundary and targets are
right-padded after it, so training and generation see the same columns::

    pad pad p1 p2 p3 | t1 t2 eos pad      input_ids, attention_mask  (b, s)
    -100 ........... | t1 t2 eos -100     labels                     (b, s)
                     ^ boundary: the same column in every row

Masks come from lengths, never from comparing ids with the pad id: pad may be the eos or unk token, and such a token
must stay visible if it occurs in the text. Encoder-decoder models read prompt and target as separate texts
(``two_texts``, laid out by :mod:`.text_to_text`).

A text without a prompt is all target (:func:`encode_pieces`). Each row is a piece of the text. Its prompt is what the
tokenizer puts before every text (BOS) or, if that is nothing, the preceding token; the first token of the text is then
not learnt, because nothing predicts it::

    bos | t1 t2 t3      bos | t4 t5 eos      max_length 4, with BOS
    t1 | t2 t3 t4       t4 | t5 eos          without
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unicodedata import category

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .encoding_cache import prepare
from .example import Example
from .tokenizer_digest import encoding_settings

log = logging.getLogger(__name__)

IGNORED = -100  # label of columns without loss, torch's ignore_index
# Unicode categories of control characters, format characters and white space
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Args:
        prompt_ids: begins with BOS if the tokenizer adds one.
        target_ids: ends in eos, unless the target was cut.
        example: the source of the tokens.
        joint: whether prompt and target were tokenised as one text and split.
        cut_prompt: number of prompt tokens dropped on the left.
        cut_target: number of target tokens dropped on the right.
        edited: for each prompt token, whether it contains part of a marked word; empty if no words are marked.
        row: index in the `EncodedRows` it was read from; -1 if none. Ignored in comparisons.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    example: Example
    joint: bool = True
    cut_prompt: int = 0
    cut_target: int = 0
    edited: list[bool] = field(default_factory=list)
    row: int = field(default=-1, compare=False)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts before every text: `[bos]` or nothing for causal models."""
    return _frame(tokenizer)[0]


def _frame(tokenizer: PreTrainedTokenizerBase, target: bool = False) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text, or every target of an encoder-decoder."""
    (plain,), (whole,) = (_ids(tokenizer, ["a"], target, special) for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(
        f"{type(tokenizer).__name__} changes the tokens of the text when it adds special tokens: {whole}"
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, two_texts: bool = False) -> list[int]:
    """Return the tokens of a prompt without a target, after a single BOS if the tokenizer adds one.

    With ``two_texts``, the tokens that the tokenizer puts after every text follow.
    """
    leading, closing = _frame(tokenizer)
    closing = closing if two_texts else []
    return [*leading, *_bare(_ids(tokenizer, [prompt])[0], leading, closing), *closing]


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, two_texts: bool = False
) -> Encoded:
    """Return the tokens of prompt and target.

    Prompt + target are tokenised as one text, as in the paper's code, and split after the prompt's tokens.
    If these are not a prefix of the whole (a token spans the boundary), the target is tokenised separately.

    A row longer than `max_length` loses prompt tokens on the left, after BOS, because the question is at the end.
    The target may fill half of `max_length`, or whatever the prompt leaves if that is more; beyond that it is cut on
    the right. With ``two_texts``, each text has its own special tokens and may have up to `max_length` tokens.

    Raises:
        ValueError: if the prompt or target is empty (names the row), the tokenizer has no eos token, or `max_length`
            is too small.
    """
    refuse_empty(example)
    columns = _encoder(tokenizer, max_length, two_texts)(_texts_of([example]))
    (ids,), (prompt,), (joint,), (cut_prompt,), (cut_target,) = (columns[name] for name in TYPES)
    (edited,) = columns.get("edited", [[]])
    return Encoded(ids[:prompt], ids[prompt:], example, joint, cut_prompt, cut_target, edited)


def _texts_of(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Return the text columns to encode; if words are marked, their places are a column of JSON texts."""
    texts = {"prompt": [e.prompt for e in examples], "target": [e.target for e in examples]}
    if any(e.marked for e in examples):
        texts["marked"] = [json.dumps(e.marked) for e in examples]
    return texts


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    what: str = "rows",
    target_tokens: int | None = None,
    two_texts: bool = False,
) -> EncodedRows:
    """Encode many examples as `encode` does, and log anything unusual: tokens across the boundary, truncation.

    Only the first ``target_tokens`` tokens of each target are kept; eos counts as one of them.
    Large sets are encoded in several processes and cached, see `encoding_cache`.
    """
    for example in examples:
        refuse_empty(example)
    layout = "prompt, text_target" if two_texts else "prompt | target"
    texts = _texts_of(examples)
    columns = prepare(
        _encoder(tokenizer, max_length, two_texts),
        texts,
        TYPES | ({"edited": "[bool]"} if "marked" in texts else {}),
        depends_on=lambda: encoding_settings(layout, tokenizer, max_length),
        what=what,
    )
    rows = f"of {len(examples)} {what}"
    if separate := np.count_nonzero(~columns["joint"]):
        log.info("%d %s: a token spans prompt and target, so they were tokenised separately", separate, rows)
    if prompts := np.count_nonzero(columns["cut_prompt"]):
        log.warning(
            "%d %s: prompt truncated on the left to fit %d tokens; a larger data.max_length keeps more",
            prompts, rows, max_length,
        )  # fmt: skip
    _refuse_unedited(examples, columns, max_length)
    if empty := np.count_nonzero(columns["ids.lengths"] - columns["prompt"] <= 1):
        log.warning("%d %s: the target has no tokens except eos", empty, rows)
    if targets := np.count_nonzero(columns["cut_target"]):
        log.warning(
            "%d %s: target truncated on the right, without eos; a larger data.max_length keeps more",
            targets,
            rows,
        )
    return EncodedRows(examples, columns, target_tokens)


def _refuse_unedited(examples: Sequence[Example], columns: Mapping[str, np.ndarray], max_length: int) -> None:
    """Raise ValueError for a row that truncation has left without marked words."""
    if "edited" not in columns:
        return
    for example, edited in zip(
        examples, np.split(columns["edited"], np.cumsum(columns["prompt"])[:-1]), strict=True
    ):
        if not edited.any():
            raise ValueError(
                f"{example.source or example.task}: data.max_length={max_length} leaves no token of the marked words "
                "in the prompt; choose a larger value"
            )


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, what: str = "rows"
) -> EncodedRows:
    """Encode the targets of examples as texts without a prompt, in pieces of at most `max_length` tokens.

    Raises:
        ValueError: if the tokenizer has no eos token, or `max_length` is too small.
    """
    leading, eos = leading_ids(tokenizer), _eos_of(tokenizer)
    context = len(leading) or 1
    room = max_length - context
    if room < 1:
        raise ValueError(f"max_length must be at least {context + 1}; got {max_length}")
    columns = prepare(
        partial(encode_wholes, tokenizer=tokenizer, leading=leading, eos=eos),
        {"text": [e.target for e in examples]},
        {"ids": "[int32]"},
        depends_on=lambda: encoding_settings("text", tokenizer, max_length),
        what=what,
    )
    pieces: list[np.ndarray] = []
    owners: list[Example] = []
    ends = np.cumsum(columns["ids.lengths"])[:-1]
    for example, ids in zip(examples, np.split(columns["ids"], ends), strict=True):
        for start in range(0 if leading else 1, len(ids), room):
            before = np.array(leading, np.int32) if leading else ids[start - 1 : start]
            pieces.append(np.concatenate([before, ids[start : start + room]]))
            owners.append(example)
    rows = EncodedRows(owners, uncut(pieces, [context] * len(pieces)))
    log.info("%d %s: %d tokens to learn, in %d pieces of at most %d (data.max_length)",
             len(examples), what, sum(rows.targets), len(pieces), max_length)  # fmt: skip
    return rows


def uncut(rows: Sequence[np.ndarray], prompts: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the columns `TYPES` of rows of ids, given the lengths of their prompts."""
    none = np.zeros(len(rows), np.int32)
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *rows]),
        "ids.lengths": np.array([len(row) for row in rows], np.int64),
        "prompt": np.array(prompts, np.int32),
        "joint": np.ones(len(rows), bool),
        "cut_prompt": none,
        "cut_target": none,
    }


def encode_wholes(
    texts: Mapping[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, leading: list[int], eos: int
) -> dict[str, list]:
    """Return the ids of whole texts without leading special tokens, each ending in a single eos."""
    bare = (_bare(ids, leading, [eos]) for ids in _ids(tokenizer, texts["text"]))
    return {"ids": [[*ids, eos] for ids in bare]}


def _eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no eos token, which must end every target; set eos_token"
        )
    assert isinstance(eos, int)
    return eos


def _encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int, two_texts: bool
) -> partial[dict[str, list]]:
    """Return the function that computes the columns `TYPES` from texts."""
    eos = _eos_of(tokenizer)
    frames = [_frame(tokenizer), _frame(tokenizer, target=True)] if two_texts else [_frame(tokenizer)]
    least = max(len(leading) + 4 + (len(closing) if two_texts else 0) for leading, closing in frames)
    if max_length < least:
        raise ValueError(f"max_length must be at least {least}; got {max_length}")
    settings: dict[str, Any] = {"tokenizer": tokenizer, "eos": eos, "max_length": max_length}
    if two_texts:
        return partial(encode_two_texts, frames=frames, **settings)
    return partial(encode_texts, leading=frames[0][0], **settings)


def refuse_empty(example: Example, parts: Sequence[str] = ("prompt", "target")) -> None:
    """Raise ValueError, naming the row, if the prompt or target of an example has no visible characters.

    Zero-width characters, such as U+200B or a byte order mark, are not visible; some tokenizers drop them.
    """
    for part in parts:
        text: str = getattr(example, part)
        if all(category(character) in UNSEEN for character in text):
            blank = f": {text[:40]!r} has no visible characters" if text.strip() else ""
            raise ValueError(f"{example.source or example.task}: the {part} is empty{blank}")


# ids of prompt and target, the length of the prompt, and the other fields of `Encoded`; raise `encoding_cache.VERSION`
# if the same texts should give different numbers
TYPES = {"ids": "[int32]", "prompt": "int32", "joint": "bool", "cut_prompt": "int32", "cut_target": "int32"}


def encode_texts(
    texts: Mapping[str, list[str]],  # prompt, target; optionally marked
    *,
    tokenizer: PreTrainedTokenizerBase,
    leading: list[int],
    eos: int,
    max_length: int,
) -> dict[str, list]:
    """Return the columns `TYPES` of non-empty prompts and targets, and `edited` if words are marked."""
    prompts = _ids(tokenizer, texts["prompt"])
    wholes = _ids(tokenizer, [p + t for p, t in zip(texts["prompt"], texts["target"], strict=True)])
    rows = []
    for prompt, whole, text in zip(prompts, wholes, texts["target"], strict=True):
        joint = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        target = whole[len(prompt) :] if joint else _ids(tokenizer, [text])[0]
        rows.append(_fit(prompt, target, joint, leading, eos, max_length))
    columns = _in_columns(rows)
    if "marked" in texts:
        counts = [count - len(leading) for count in columns["prompt"]]  # prompts are cut on the left
        edited = _edited(tokenizer, texts["prompt"], map(json.loads, texts["marked"]))
        columns["edited"] = [
            [False] * len(leading) + own[len(own) - count :]
            for own, count in zip(edited, counts, strict=True)
        ]
    return columns


def _edited(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], marked: Iterable[list[list[int]]]
) -> Iterator[list[bool]]:
    """Yield for each prompt whether each token contains a marked character."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"data.marks needs the character offsets of tokens, which {type(tokenizer).__name__} does not provide: "
            "choose a model with a fast tokenizer"
        )
    given: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    for tokens, spans in zip(tokenizer(prompts, **given)["offset_mapping"], marked, strict=True):
        yield [any(start < last and first < end for first, last in spans) for start, end in tokens]


def encode_two_texts(
    texts: Mapping[str, list[str]],  # prompt, target
    *,
    tokenizer: PreTrainedTokenizerBase,
    frames: Sequence[tuple[list[int], list[int]]],  # of prompts and of targets
    eos: int,
    max_length: int,
) -> dict[str, list]:
    """Return the columns `TYPES` of prompts and targets that are separate texts.

    Each is enclosed in the tokenizer's special tokens. Those of targets (`text_target`) may differ, such as a language
    code, and so may the vocabulary (Marian's). A target ends in eos. The blank that separates a target from its prompt
    is removed.
    """
    targets = [text.removeprefix(" ") for text in texts["target"]]
    rows = []
    (leading, closing), (first, last) = frames
    last = last if eos in last else [*last, eos]
    pairs = zip(_ids(tokenizer, texts["prompt"]), _ids(tokenizer, targets, target=True), strict=True)
    for prompt, target in ((_bare(p, leading, closing), _bare(t, first, last)) for p, t in pairs):
        cut_prompt = max(len(leading) + len(prompt) + len(closing) - max_length, 0)
        cut_target = max(len(first) + len(target) + len(last) - max_length, 0)
        read = [*leading, *prompt[cut_prompt:], *closing]
        written = [*first, *target, *last][:max_length]
        rows.append((read + written, len(read), True, cut_prompt, cut_target))
    return _in_columns(rows)


def _in_columns(rows: Sequence[tuple]) -> dict[str, list]:
    return {name: [row[i] for row in rows] for i, name in enumerate(TYPES)}


def _bare(ids: list[int], leading: list[int], closing: list[int]) -> list[int]:
    """Return the tokens of a text without special tokens that the text itself spells out, to avoid doubling them."""
    if leading and ids[: len(leading)] == leading:
        ids = ids[len(leading) :]
    if closing and ids[-len(closing) :] == closing:
        ids = ids[: -len(closing)]
    return ids


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], target: bool = False, special: bool = False
) -> list[list[int]]:
    given: dict[str, Any] = {"text_target" if target else "text": texts}
    # verbose=False: no warnings about texts beyond the model's length, which `_fit` handles
    return tokenizer(**given, add_special_tokens=special, verbose=False)["input_ids"]


def _fit(
    prompt: list[int], target: list[int], joint: bool, leading: list[int], eos: int, max_length: int
) -> tuple[list[int], int, bool, int, int]:
    prompt = _bare(prompt, leading, [])
    if target[-1:] != [eos]:
        target = [*target, eos]
    room = max(max_length - len(leading) - len(prompt), max_length // 2)
    cut_target = max(len(target) - room, 0)
    target = target[: len(target) - cut_target]
    cut_prompt = max(len(leading) + len(prompt) + len(target) - max_length, 0)
    prompt = leading + prompt[cut_prompt:]
    return prompt + target, len(prompt), joint, cut_prompt, cut_target


class EncodedRows(Dataset[Encoded]):
    """Encoded examples in a single token array: 170,000 prompts take 70 MB instead of 600.

    Args:
        examples: n examples.
        columns: the columns of `encode_texts` for them, as returned by `prepare`.
        target_tokens: number of leading target tokens to keep; None for all.

    Attributes:
        lengths: number of tokens in each row.
        prompt_lengths: number of prompt tokens in each row.
        targets: number of target tokens in each row, over which its loss is averaged.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        columns: Mapping[str, np.ndarray],
        target_tokens: int | None = None,
    ) -> None:
        self.examples, self._columns = list(examples), columns
        lengths, prompts = columns["ids.lengths"], columns["prompt"]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._edits = np.concatenate([[0], np.cumsum(prompts)]).astype(np.int64)  # starts of rows in `edited`
        if target_tokens is not None:
            longest = int(lengths.max(initial=0))  # the sum below is in 32 bits
            lengths = np.minimum(lengths, prompts + min(target_tokens, longest))
        self.lengths: list[int] = lengths.tolist()
        self.prompt_lengths: list[int] = prompts.tolist()
        self.targets: list[int] = (lengths - prompts).tolist()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Encoded:
        """Return row i as made by `encode`, with its index."""
        i = range(len(self))[i]  # -1 is the last row, len(self) raises IndexError
        ids = self._columns["ids"][self._starts[i] : self._starts[i] + self.lengths[i]].tolist()
        prompt, joint, cut_prompt, cut_target = (
            self._columns[name][i].item() for name in TYPES if name != "ids"
        )
        edited = (
            self._columns["edited"][self._edits[i] :][:prompt].tolist() if "edited" in self._columns else []
        )
        return Encoded(ids[:prompt], ids[prompt:], self.examples[i], joint, cut_prompt, cut_target, edited, i)


class Collator:
    """Collate encoded rows into the prompt | target layout, with `pad_token_id` in masked columns."""

    def __init__(self, pad_token_id: int | None) -> None:
        if pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; base_models.load_tokenizer sets one")
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return the batch.

        input_ids, attention_mask, labels and prompt_mask (bool) are (b, s); boundary is an int; rows (b,) holds the
        row indices in their `EncodedRows` and is not a model input. If words are marked, edit_mask (b, s) bool marks
        their tokens.
        """
        boundary = max(len(row.prompt_ids) for row in rows)
        width = boundary + max(len(row.target_ids) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            first, end = boundary - len(row.prompt_ids), boundary + len(row.target_ids)
            target = torch.tensor(row.target_ids, dtype=torch.int64)
            input_ids[i, first:boundary] = torch.tensor(row.prompt_ids, dtype=torch.int64)
            input_ids[i, boundary:end] = target
            attention_mask[i, first:end] = 1
            prompt_mask[i, first:boundary] = True
            labels[i, boundary:end] = target
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "prompt_mask": prompt_mask,
            "boundary": boundary,
            "rows": torch.tensor([row.row for row in rows], dtype=torch.int64),
        }
        if any(row.edited for row in rows):
            batch["edit_mask"] = torch.zeros_like(prompt_mask)
            for edits, row in zip(batch["edit_mask"], rows, strict=True):
                edits[boundary - len(row.edited) : boundary] = torch.tensor(row.edited)
        return batch


def target_only(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Request logits for the target columns only, which gives the same loss with less work for the head.

    Hugging Face causal models compare the logits of column j with the label of column j+1, so the t target columns
    also need the column before them: labels (b, t+1), `logits_to_keep` = t+1 with t = s - boundary.

    The batch is one of `Collator`, and is not modified.
    """
    labels: Tensor = batch["labels"]
    keep = labels.shape[1] - batch["boundary"] + 1
    return {**batch, "labels": labels[:, -keep:], "logits_to_keep": keep}

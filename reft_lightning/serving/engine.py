"""Generate the answers of many requests in shared batches, whichever adapters they use, in one thread.

A batch is one call of ``ReftModel.generate`` in which every row has its own adapter. Requests that arrive meanwhile
join after a few tokens: the batch ends, and the next one continues its unfinished rows, whose tokens so far are read
again in the same pass as the new prompts (``prompt_mask`` separates them, so that edits keep their positions). The
decoder of an encoder-decoder generates them again one by one, while new rows generate their first tokens.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..adapters.reft.model import ReftModel
from ..base_models.reading import context_of
from ..base_models.stacks import reads_two_texts
from ..base_models.vision import image_tokens
from ..data.encoding import Encoded, prompt_ids
from ..data.example import Example
from ..data.image_data import ImageCollator, encode_image
from ..data.prompts import tokenizer_of
from ..data.texts import padded
from ..evaluation import first_tokens
from ..evaluation.decoding import without_generation_defaults
from .answers import Answer, Choosing, tell

log = logging.getLogger(__name__)

NOT_READ = ("labels", "boundary", "rows")  # parts of a data module's batch that generation does not use
JOIN_AFTER = 16  # tokens of a batch after which waiting requests may join it


def change_for_all(adapter: Any) -> str:
    """Return what an adapter changes for all rows of a batch, so that it cannot be chosen per row; empty if nothing."""
    if adapter.config.beside:
        return f"was trained together with {adapter.config.beside}"
    if adapter.config.heads:
        return "has a trained head"
    return "edits a vision tower" if any(site.visual for site in adapter.sites.values()) else ""


class Busy(RuntimeError):
    """Too many requests are waiting, or the server is closing."""


class Engine:
    """A thread that answers up to ``max_batch`` requests together; if ``max_waiting`` wait, more are refused."""

    def __init__(
        self,
        model: ReftModel,
        reader: PreTrainedTokenizerBase | ProcessorMixin,
        max_batch: int = 16,
        max_waiting: int = 1024,
    ) -> None:
        self.model, self.reader, self.tokenizer = model.eval(), reader, (tokenizer := tokenizer_of(reader))
        # whether its one adapter answers every request
        self.alone = bool(change_for_all(model.adapters.first))
        self.sees = reader is not tokenizer
        self._collate = ImageCollator(reader) if self.sees else None
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.context = context_of(model.base_model)
        # the prompt in an encoder, the answer in a decoder
        self.two_texts = reads_two_texts(model.base_model)
        self.starts = first_tokens(model.base_model, tokenizer) if self.two_texts else {}
        self.pad = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        # the model's own end tokens, and the one that adapters were trained to generate
        ends: list[Any] = [model.base_model.generation_config.eos_token_id, tokenizer.eos_token_id]
        self.ends = [i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])]
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch: list[Answer] = []  # the answers in progress
        self._thread = threading.Thread(target=self._run, name="reft-serve", daemon=True)
        self._thread.start()

    def encode(self, example: Example) -> Encoded:
        """Return a question as the model reads it.

        Raises:
            ValueError: for pictures that cannot be read, or picture marks without pictures.
        """
        if not self.sees:
            return Encoded(prompt_ids(self.tokenizer, example.prompt, self.two_texts), [], example)
        row = encode_image(self.reader, example)
        marks = set(image_tokens(self.model.base_model.config)).intersection(row.prompt_ids)
        if marks and not example.pictures:
            mark = self.tokenizer.decode([marks.pop()])
            raise ValueError(
                f"{mark} is a placeholder for a picture: send the picture as a message part of type 'image_url'"
            )
        return row

    def room(self, prompt: int) -> int:
        """Return how many tokens the answer may have, given the length of the prompt."""
        if self.two_texts:  # the start token takes one of the decoder's positions
            return self.context - 1 if prompt <= self.context else 0
        return self.context - prompt

    def submit(self, answer: Answer) -> None:
        """Queue a request; raise :class:`Busy` if too many are waiting."""
        with self._changed:
            if self._closed:
                raise Busy("the server is closing")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are waiting; try again later")
            self._waiting.append(answer)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; requests that are waiting or in progress end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._batch)
                if self._closed:
                    for answer in [*self._batch, *self._waiting]:
                        tell(answer, Busy("the server is closing"))
                    return
                batch = self._batch = [answer for answer in self._batch if not answer.cancelled]
                while self._waiting and len(batch) < self.max_batch:
                    if not self._waiting[0].cancelled:
                        batch.append(self._waiting[0])
                    self._waiting.popleft()
            if batch:
                self._go_on(batch)
            self._batch = [answer for answer in batch if not answer.done]

    def _go_on(self, answers: Sequence[Answer]) -> None:
        """Generate; on failure, retry each half separately, as a request must not end the others in its batch."""
        try:
            self._generate(answers)
        except Exception as error:
            left = [answer for answer in answers if not answer.done]
            if len(left) > 1:
                self._go_on(left[: len(left) // 2])
                self._go_on(left[len(left) // 2 :])
            elif left:
                log.exception("a request failed")
                tell(left[0], error)

    def _generate(self, answers: Sequence[Answer]) -> None:
        """Continue some answers until all are done, or others can join."""
        batch = self._laid_out(answers)
        again = [list(answer.tokens) if self.two_texts else [] for answer in answers]
        choosing = Choosing(answers, self.tokenizer, self.ends, self.pad, again)
        # steps until the batch reaches the end of the context, counting rows that are done
        room = self.room(batch["input_ids"].shape[1])
        left = (a.max_tokens - (0 if self.two_texts else len(a.tokens)) for a in answers)
        names = [None if a.adapter is None else (a.adapter, a.strength) for a in answers]
        inputs: Any = {name: value.to(self.model.base_model.device) for name, value in batch.items()}
        with torch.inference_mode(), without_generation_defaults(self.model):
            self.model.generate(
                **inputs,
                adapter_names=None if self.alone else names,
                logits_processor=LogitsProcessorList([choosing]),
                stopping_criteria=StoppingCriteriaList([_Ending(self, choosing, room)]),
                generation_config=GenerationConfig(
                    max_new_tokens=max(left),
                    do_sample=False,
                    pad_token_id=self.pad,
                    eos_token_id=None,  # each answer detects its own end
                    **self.starts,
                ),
            )

    def _laid_out(self, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """Return the model's inputs: prompts and, for a decoder-only model, the answers so far."""
        if self._collate is not None:
            for answer in answers:  # process the pixels once, though the answer may be read again
                answer.seen = replace(answer.seen, pixels=self._collate.pixels(answer.seen))
            batch = self._collate([replace(answer.seen, target_ids=answer.tokens) for answer in answers])
            return {name: value for name, value in batch.items() if name not in NOT_READ}
        rows = [(answer.prompt, [] if self.two_texts else answer.tokens) for answer in answers]
        prompts = [[1] * len(prompt) + [0] * len(tokens) for prompt, tokens in rows]
        return {
            "input_ids": padded([prompt + tokens for prompt, tokens in rows], self.pad),
            "attention_mask": padded([[1] * len(row) for row in prompts], 0),
            "prompt_mask": padded(prompts, 0).bool(),
        }

    def others_can_join(self, answers: Sequence[Answer], steps: int) -> bool:
        """Whether a batch should end early: if waiting requests fit, half its rows are done, or the engine closes."""
        running = sum(not answer.done for answer in answers)
        return self._closed or (
            steps >= JOIN_AFTER
            and ((bool(self._waiting) and running < self.max_batch) or 2 * running <= len(answers))
        )


class _Ending(StoppingCriteria):
    def __init__(self, engine: Engine, choosing: Choosing, room: int) -> None:
        self.engine, self.choosing, self.room = engine, choosing, room

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        answers = self.choosing.answers
        for answer in answers:
            answer.done |= answer.cancelled
        steps = self.choosing.steps
        new = steps - 2 * max(map(len, self.choosing.again))  # so that new tokens outnumber repeated ones
        if steps >= self.room or self.engine.others_can_join(answers, new):
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return torch.tensor([answer.done for answer in answers], device=input_ids.device)

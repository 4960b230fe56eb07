"""What works with what: run each method on each kind of model, with tiny random weights, and record the outcomes.

    python experiments/capabilities/probe.py                               # all: matrix.json, the tables of the pages
    python experiments/capabilities/probe.py --models t5 --methods loreft  # a part of it, printed

A cell is `works` if a numeric law held, `refused` if the package or peft raised an error, `off` if a shortcut was
disabled because of the model or of what is trained, `base` if the law does not hold for the model without edits either,
`warned` if it does not hold and the log said so when the method was attached, `none` if there is nothing to probe,
`unprobed`, or `wrong`. Methods are the files in `conf/intervention`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.methods import method_named
from reft_lightning.adapters.reft.model import ReftModel
from reft_lightning.adapters.reft.sites import block_path
from reft_lightning.adapters.saving import load_saved, load_state
from reft_lightning.config.compose import config_dir
from reft_lightning.config.schema import InterventionConfig
from reft_lightning.runs.arguments import attachment
from reft_lightning.speed.choose_part import ShortenedPass
from reft_lightning.speed.frozen_part import FrozenPrefix

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MATRIX = HERE / "matrix.json"
CLOSE = 1e-4  # relative to the largest of the compared numbers, in float32
MOVED = 1e-3  # the least that an edit must change, so that equality means something
COARSE = 0.05  # relative to a bfloat16 loss, or to 1 if the loss is smaller

# --- models ---------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 128}
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop",
                       "attn_pdrop", "dropout", "dropout_rate", "attention_dropout", "hidden_dropout",
                       "embedding_dropout", "mlp_dropout", "activation_dropout",
                       "classifier_dropout"), 0.0)  # fmt: skip
WINDOWS = {"sliding_window": 6, "query_pre_attn_scalar": 8,
           "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "layer_types": ["linear_attention", "full_attention"] * 2}  # fmt: skip
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1,
          "mamba_chunk_size": 16, "attn_layer_indices": [1, 3], "attn_rotary_emb": 4}  # fmt: skip
TWO = {"decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_attention_heads": 4, "init_std": 0.3,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "forced_eos_token_id": None}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 4,
      "initializer_factor": 1.0}  # fmt: skip
CAUSAL, CLASSIFIER, TWO_TEXTS = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForSeq2SeqLM,
)

# name -> its usual name, task, model_type, its own settings
MODELS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "llama": ("Llama", CAUSAL, "llama", GROUPED),
    "gemma3": ("Gemma 3 (sliding windows)", CAUSAL, "gemma3_text", GROUPED | WINDOWS),
    "gemma3_both_ways": ("Gemma 3 (bidirectional)", CAUSAL, "gemma3_text",
                         GROUPED | WINDOWS | {"use_bidirectional_attention": True}),
    "gpt2": ("GPT-2", CAUSAL, "gpt2", GPT),
    "bloom": ("BLOOM", CAUSAL, "bloom", {"n_layer": 4, "n_head": 4}),
    "mixtral": ("Mixtral", CAUSAL, "mixtral", GROUPED | EXPERTS | {"initializer_range": 0.1}),
    "mamba": ("Mamba", CAUSAL, "mamba", {"state_size": 8, "time_step_rank": 4, "expand": 2}),
    "qwen3_5": ("Qwen3.5 (linear attention)", CAUSAL, "qwen3_5_text", GROUPED | LINEAR | {"initializer_range": 0.1}),
    "bert": ("BERT", CLASSIFIER, "bert", {"initializer_range": 0.1}),
    "deberta_v3": ("DeBERTa-v3", CLASSIFIER, "deberta-v2",
                   {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
                    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
                    "type_vocab_size": 0, "pooler_hidden_size": 32, "initializer_range": 0.1}),
    "modernbert": ("ModernBERT", CLASSIFIER, "modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "t5": ("T5, in the encoder", TWO_TEXTS, "t5", T5 | TWO),
    "bart": ("BART, in the encoder", TWO_TEXTS, "bart", BART | TWO),
}  # fmt: skip
# models that differ from one above only in details; only LoReFT and LoRA are probed on them
RELATIVES: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", CAUSAL, "qwen2", GROUPED),
    "qwen3": ("Qwen3", CAUSAL, "qwen3", GROUPED),
    "mistral": ("Mistral", CAUSAL, "mistral", GROUPED | {"sliding_window": 6}),
    "gemma2": ("Gemma 2", CAUSAL, "gemma2", GROUPED | WINDOWS),
    "gemma3n": ("Gemma 3n (`mlp_output`)", CAUSAL, "gemma3n_text",
                GROUPED | WINDOWS | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
                                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
                                     "laurel_rank": 8}),
    "phi3": ("Phi-3", CAUSAL, "phi3", GROUPED),
    "olmo2": ("OLMo 2", CAUSAL, "olmo2", GROUPED),
    "smollm3": ("SmolLM3", CAUSAL, "smollm3", GROUPED),
    "gpt_neox": ("GPT-NeoX", CAUSAL, "gpt_neox", {}),
    "opt": ("OPT", CAUSAL, "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "falcon": ("Falcon", CAUSAL, "falcon", {"new_decoder_architecture": False}),
    "qwen3_moe": ("Qwen3-MoE", CAUSAL, "qwen3_moe", GROUPED | EXPERTS),
    "gpt_oss": ("gpt-oss", CAUSAL, "gpt_oss", GROUPED | EXPERTS
                | {k: WINDOWS[k] for k in ("sliding_window", "layer_types")}),
    "bamba": ("Bamba", CAUSAL, "bamba", GROUPED | STATES),
    "lfm2": ("LFM2", CAUSAL, "lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2,
                                      "block_auto_adjust_ff_dim": False}),
    "roberta": ("RoBERTa", CLASSIFIER, "roberta", {}),
    "electra": ("ELECTRA", CLASSIFIER, "electra", {"embedding_size": 32}),
    "t5_decoder": ("T5, in the decoder", TWO_TEXTS, "t5", T5 | TWO),
    "bart_decoder": ("BART, in the decoder", TWO_TEXTS, "bart", BART | TWO),
}  # fmt: skip
ALL = MODELS | RELATIVES
OF_RELATIVES = ("loreft", "peft/lora")


@cache
def _original(name: str) -> Any:
    _, auto, kind, own = ALL[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **STILL, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = auto.from_config(config).eval()
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                # trained checkpoints have no zeros here; some norms have no gradient at zero
                module.weight.data[module.padding_idx].normal_(std=0.3)
    if auto is not CLASSIFIER:
        model.generation_config.eos_token_id = None  # so that all rows have one length
        model.generation_config.forced_eos_token_id = None
    return model


# --- methods --------------------------------------------------------------------------------------------------------

# Options that fit into a width of 32.
SMALL = {"r": 4, "lora_alpha": 8, "group_size": 8, "oft_block_size": 8, "num_virtual_tokens": 4, "top_k": 2}


def methods() -> list[str]:
    """Return the names that ``intervention=`` accepts."""
    folder = config_dir() / "intervention"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


@cache
def _settings(method: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "intervention" / f"{method}.yaml"))
    config = InterventionConfig(**values)
    for options in (config.options, config.beside_options):
        for name in options.keys() & SMALL.keys():
            options[name] = SMALL[name] if options[name] else options[name]
    settings = attachment(SimpleNamespace(intervention=config))  # pyright: ignore[reportArgumentType]
    small = {"rank": min(settings.get("rank", 4), 4), "positions": "f2+l2"}
    default = settings.get("positions") == InterventionConfig().positions
    return settings | {n: v for n, v in small.items() if n in settings and (n == "rank" or default)}


# --- one method on one model ----------------------------------------------------------------------------------------


class Wrong(Exception):
    """A law does not hold."""


class Outcome(Exception):
    """An outcome other than a law that held or failed: its kind and the reason."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")


def none(why: str) -> Outcome:
    return Outcome("none", why)


class Case:
    """A method on a model: makes adapted copies of the model, and their inputs."""

    def __init__(self, model: str, method: str) -> None:
        self.name, self.method = model, method
        self.auto = ALL[model][1]
        self.generates = self.auto is not CLASSIFIER
        self.two = self.auto is TWO_TEXTS
        self.record = method_named(_settings(method)["method"])
        self.trains = self.record.trains or (self.record.trains_heads and not self.generates)

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        return copy.deepcopy(_original(self.name)).to(dtype)

    def adapted(self, dtype: torch.dtype = torch.float32, base: Any = None, **own: Any) -> Any:
        """Return an adapted model in eval mode, its parameters moved away from their initial values."""
        settings = {**_settings(self.method)}
        if self.record.takes_settings:
            settings |= own
            if self.name == "gemma3n":  # four streams, and two layers without their own keys and values
                settings["component"] = "mlp_output"
            if self.name.endswith("_decoder"):
                settings["component"] = f"decoder.{settings.get('component', 'block_output')}"
                settings["positions"] = {"f2+l2": "f1+decode:2", "l2": "f1"}.get(
                    settings["positions"], settings["positions"]
                )
        if not self.generates and self.record.trains_heads and self.record.trains | (self.method == "none"):
            settings["heads"] = "auto"
        torch.manual_seed(0)
        model: Any = adapt(self.base(dtype) if base is None else base, **settings)
        generator, size = torch.Generator().manual_seed(3), 0.02 if self.record.in_place else 0.2
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
        return model.eval()

    def batch(self, *lengths: int, side: str = "right", extra: int = 0) -> dict[str, Tensor]:
        """Return a batch of the model's task, padded on a side: ``input_ids``, masks and ``labels``."""
        texts = [_tokens(n, n) for n in lengths]
        width = max(lengths) + extra
        ids = torch.stack(
            [F.pad(t, (width - len(t), 0) if side == "left" else (0, width - len(t))) for t in texts]
        )
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        if self.auto is CLASSIFIER:
            return batch | {"labels": torch.arange(len(lengths)) % 2}
        targets = torch.stack([_tokens(4, 100 + n) for n in lengths])
        targets[1:, 3:] = -100
        if self.two:
            return batch | {"labels": targets}
        real = targets.clamp(min=0)
        batch = {
            "input_ids": torch.cat([ids, real], 1),
            "attention_mask": torch.cat([batch["attention_mask"], (real > 0).long()], 1),
        }
        labels = torch.cat([torch.full_like(ids, -100), targets], 1)
        prompt = torch.arange(labels.shape[1]) < width
        return batch | {"labels": labels, "prompt_mask": batch["attention_mask"].bool() & prompt}

    def trained_rows(self) -> dict[str, Tensor]:
        return self.batch(10, 6, side="right" if self.auto is CLASSIFIER or self.two else "left")


def _tokens(length: int, seed: int) -> Tensor:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = CLOSE) -> None:
    if not (difference := apart(found, expected)) <= tolerance:
        raise Wrong(f"{what} differ by {difference:.1g}")


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys() or not found:
        raise Wrong("different parameters have gradients")
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((found[n] - g).abs().max()) for n, g in expected.items())
    if not worst <= CLOSE * largest:
        raise Wrong(f"gradients differ by {worst / largest:.1g}")


def step(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and gradients of one training step with fixed random numbers."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def differs_from_base(model: Any, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        edited = model(**batch).logits
        with model.disabled():
            plain = model(**batch).logits
    if apart(edited, plain) < MOVED:
        raise Wrong("the edit changes nothing")


# --- probes: each returns if its law holds ---------------------------------------------------------------------------


def train(case: Case) -> None:
    """Twelve steps lower the loss and change only trained parameters; disabled() is the base bit for bit."""
    if not case.trains:
        raise none("it trains nothing")
    base = case.base(torch.float32)
    model, batch = case.adapted(torch.float32), case.trained_rows()
    differs_from_base(model, batch)
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    if "difference_in_means" in case.method:
        raise none("it is computed, not trained by a loss: objective=difference_in_means")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0
    )
    before = float(model(**batch).loss)
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    after = float(model(**batch).loss)
    if not after < before:
        raise Wrong(f"the loss went from {before:.3f} to {after:.3f}")
    now = dict(model.named_parameters())
    if any(not torch.equal(p, now[n]) for n, p in frozen.items()):
        raise Wrong("frozen weights moved")
    still = [n for n, p in trained.items() if torch.equal(p, now[n])]
    if not _unread(still, model):
        raise Wrong(f"{still[0]} did not move")
    with torch.no_grad(), model.disabled():
        if not torch.equal(model(**batch).logits, _plain(base, case, batch)):
            raise Wrong("disabled() is not the base")


def _unread(names: list[str], model: Any) -> bool:
    """Whether the parameters that did not move had no effect on the loss: positions or experts that no row reached."""
    own = dict(model.named_parameters())
    return all(own[n].grad is None or not own[n].grad.any() for n in names)


def _plain(base: Any, case: Case, batch: dict[str, Tensor]) -> Tensor:
    frozen = adapt(base, "frozen")  # which passes position_ids if padded rows need them
    return frozen(**batch).logits


GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def _prompts(case: Case, *lengths: int, side: str = "left") -> dict[str, Tensor]:
    texts = [_tokens(n, n) for n in lengths]
    width = max(lengths)
    ids = torch.stack(
        [F.pad(t, (width - len(t), 0) if side == "left" else (0, width - len(t))) for t in texts]
    )
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def _told(case: Case, model: Any, prompts: dict[str, Tensor], text: Tensor) -> Tensor:
    """Return the teacher-forced logits (b, new, v) of a generated text."""
    with torch.no_grad():
        if case.two:
            return model(**prompts, decoder_input_ids=text[:, :-1]).logits
        width = prompts["input_ids"].shape[1]
        more = torch.ones(len(text), text.shape[1] - width, dtype=torch.long)
        mask = torch.cat([prompts["attention_mask"], more], 1)
        prompt = mask.bool() & (torch.arange(text.shape[1]) < width)
        return model(input_ids=text, attention_mask=mask, prompt_mask=prompt).logits[:, width - 1 : -1]


def generate(case: Case) -> None:
    """Texts and logits equal those of teacher forcing, and the texts are the same without a cache."""
    if not case.generates:
        raise none("an encoder generates nothing")
    prompts = _prompts(case, 9, 9)

    def law(model: Any) -> None:
        out = model.generate(**prompts, **GREEDY, return_dict_in_generate=True, output_logits=True)
        text = out.sequences
        logits = _told(case, model, prompts, text)
        close(torch.stack(out.logits, 1), logits, "logits of generation and teacher forcing")
        if not torch.equal(logits.argmax(-1), text[:, -logits.shape[1] :]):
            raise Wrong("generation is not teacher forcing")
        if not torch.equal(model.generate(**prompts, **GREEDY, use_cache=False), text):
            raise Wrong("texts differ without a cache")

    _law_of(case, law)


def _law_of(case: Case, law: Callable[[Any], None]) -> None:
    """Check a law on the adapted model; if it fails, check whether it holds for the model without edits."""
    with said(logging.WARNING) as warned:
        model = case.adapted()
    try:
        law(model)
    except Wrong as error:
        try:
            law(adapt(case.base(), "frozen"))
        except Wrong as plain:
            raise Outcome("base", f"even without edits, {plain}") from plain
        if warned:
            raise Outcome("warned", warned[0]) from error
        raise error


def left_padding(case: Case) -> None:
    """A row gives the same logits and texts alone and padded on the left."""
    lengths = (9, 5)

    def law(model: Any) -> None:
        batch = case.batch(*lengths, side="left", extra=2)
        with torch.no_grad():
            together = model(**batch).logits
            for row, length in enumerate(lengths):
                padding = lengths[0] + 2 - length
                cut = {"labels": 0} if case.two or not case.generates else {}
                alone = {
                    n: v[row : row + 1] if v.ndim < 2 else v[row : row + 1, cut.get(n, padding) :]
                    for n, v in batch.items()
                }
                logits = model(**alone).logits
                own, real = together[row : row + 1], slice(None)
                if not case.two and case.generates:
                    own, real = own[:, padding:], alone["attention_mask"].bool()
                elif case.two:
                    real = alone["labels"] != -100
                close(own[real], logits[real], "logits")
        if case.generates:
            both = model.generate(**_prompts(case, *lengths), **GREEDY)
            one = model.generate(**_prompts(case, lengths[1]), **GREEDY)
            if not torch.equal(both[1:, -5:], one[:, -5:]):
                raise Wrong("texts differ")

    _law_of(case, law)


def beams(case: Case) -> None:
    """The score of the best of three beams is its log-probability under teacher forcing."""
    if not case.generates:
        raise none("an encoder generates nothing")
    prompts = _prompts(case, 9, 6, side="right" if case.two else "left")

    def law(model: Any) -> None:
        out = model.generate(**prompts, **GREEDY, num_beams=3, length_penalty=0.0, return_dict_in_generate=True,
                             output_scores=True)  # fmt: skip
        logits = _told(case, model, prompts, out.sequences)
        new = out.sequences[:, -logits.shape[1] :]
        total = logits.double().log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
        close(out.sequences_scores.double(), total, "scores")

    _law_of(case, law)


def checkpointing(case: Case) -> None:
    """Blocks run again in the backward pass, and gradients are the same."""
    if not case.trains:
        raise none("it trains nothing")
    if not _original(case.name).supports_gradient_checkpointing:
        raise none("transformers does not checkpoint this model")
    if case.record.needs_cache:
        raise Outcome(
            "refused",
            f"{case.record.name} enters the model as a key/value cache, which checkpointing switches off",
        )
    model, batch = case.adapted(), case.trained_rows()
    loss, expected = step(model, batch)
    base = model.base_model
    inside = next(
        m for m in base.get_submodule(block_path(base))[0].modules() if isinstance(m, nn.Linear | Conv1D)
    )
    runs = []
    inside.register_forward_hook(lambda *_: runs.append(1))
    base.gradient_checkpointing_enable()
    again, found = step(model, batch)
    if len(runs) < 2:
        raise Wrong("no block ran again")
    close(again, loss, "losses")
    same_gradients(found, expected)


def bf16(case: Case) -> None:
    """On a bfloat16 base the loss is within 5 % (or 0.05) of float32, gradients are finite, interventions float32."""
    batch = case.trained_rows()
    full = case.adapted(torch.float32)
    half = case.adapted(torch.bfloat16)
    half.load_adapter_state_dict(full.adapter_state_dict())
    half.train()
    full.train()
    torch.manual_seed(1)
    expected = full(**batch).loss
    torch.manual_seed(1)
    loss = half(**batch).loss
    if case.trains:
        loss.backward()
        if not all(g.isfinite().all() for g in gradients(half).values()):
            raise Wrong("gradients are not finite")
    difference = abs(float(loss.detach()) - float(expected.detach()))
    if not difference <= COARSE * max(1.0, float(expected.detach())):
        raise Wrong(f"losses differ by {difference:.1g}")
    if case.record.takes_settings:
        kinds = {p.dtype for n, p in half.named_parameters() if ".interventions." in n}
        if kinds - {torch.float32}:
            raise Wrong(f"interventions are {kinds}")


def compiled(case: Case) -> None:
    """A compiled step has the loss and gradients of the plain one."""
    if not case.record.compiles:
        raise Outcome("refused", "model.compile compiles interventions, not baselines")
    if not case.trains:
        raise none("it trains nothing")
    model, batch = case.adapted(), case.trained_rows()
    if case.two:
        model.compile()  # raises
    if case.name != "llama" and (case.method != "loreft" or case.name in RELATIVES):
        raise Outcome("unprobed", "compiling takes seconds: it is probed only with LoReFT and on Llama")
    loss, expected = step(model, batch)
    model.compile(backend="aot_eager")
    try:
        again, found = step(model, batch)
    except RuntimeError as error:
        base = case.base().train()
        inputs = {name: value for name, value in batch.items() if name != "prompt_mask"}
        try:
            torch.compile(base.forward, backend="aot_eager")(**inputs).loss.backward()
        except RuntimeError as plain:
            raise Outcome("base", f"even without edits, {plain}") from plain
        raise error
    finally:
        torch.compiler.reset()
    close(again, loss, "losses")
    same_gradients(found, expected)


def save_load(case: Case) -> None:
    """A saved adapter, loaded onto a new base, gives bitwise equal logits."""
    model, batch = case.adapted(torch.float32), case.trained_rows()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        if isinstance(model, ReftModel):
            again: Any = rl.ReftModel.from_pretrained(case.base(torch.float32), folder)
        else:
            again = case.adapted(torch.float32)
            for parameter in (p for p in again.parameters() if p.requires_grad):
                parameter.mul_(0.5)
            load_saved(again, folder, load_state(folder))
        if not torch.equal(again.eval()(**batch).logits, model(**batch).logits):
            raise Wrong("logits differ")


def mixed_batch(case: Case) -> None:
    """In a batch with the adapter on the first row and the base on the second, each row is as it is alone."""
    model, batch = case.adapted(), case.trained_rows()
    with torch.no_grad():
        try:
            mixed = model(**batch, adapter_names=["default", None]).logits
        except ValueError as error:
            if "no argument 'adapter_names'" in str(error):
                raise Outcome("refused", "it applies to all rows of a batch") from error
            raise
        first = model(**batch).logits[0]
        with model.unedited():
            second = model(**batch).logits[1]
    close(mixed[:1].nan_to_num(), first[None].nan_to_num(), "edited rows")
    close(mixed[1:].nan_to_num(), second[None].nan_to_num(), "rows of the base")


def merge(case: Case) -> None:
    """Edits of all tokens at the feed-forward module, merged into the weights, give the same logits."""
    model, batch = case.adapted(positions="all", component="mlp_output"), case.trained_rows()
    differs_from_base(model, batch) if case.record.trains else None
    with torch.no_grad():
        expected = model(**batch).logits
        found = _plain(rl.merge(model), case, batch)
        real = batch["attention_mask"].bool() if found.shape[:2] == batch["input_ids"].shape else slice(None)
        real = batch["labels"] != -100 if case.two else real
        close(found[real], expected[real], "logits")  # merged weights also change padding


def kept_prefix(case: Case) -> None:
    """A step that reuses kept keys and values of the frozen prefix has the loss and gradients of the plain one."""
    if not case.generates:
        raise none("a text has no prefix apart from its target")
    if not case.trains:
        raise none("it trains nothing")
    if case.record.trains_all_layers or case.record.in_place or _settings(case.method).get("beside"):
        raise Outcome("off", "weights of all layers are trained, so no part stays the same")
    own: dict[str, Any] = {} if case.name.endswith("_decoder") else {"positions": "l2"}
    model = case.adapted(**own)
    if case.two:
        lengths, rows, boundary, batch = [20, 18], [20, 18], 20, case.batch(20, 18)
    else:
        rows, boundary = [20, 18], 20
        lengths, batch = [24, 22], case.batch(20, 18, side="left")
        batch |= {"labels": batch["labels"][:, -5:], "logits_to_keep": 5}
    shortened = ShortenedPass(
        model, SimpleNamespace(lengths=lengths, prompt_lengths=rows), causal=True, limit=1 << 30
    )
    model.train()
    plain, expected = step(model, batch)
    why: list[str] = []
    for _ in range(2):  # the first computes what is kept, the second reads it
        model.zero_grad()
        torch.manual_seed(1)
        with said() as lines:
            out = shortened(batch, [0, 1], boundary)
        why += [
            line
            for line in lines
            if line.startswith(("nothing is left out", "prompts are not split", "prefixes are not kept"))
        ]
        out.loss.backward()
        close(out.loss.detach(), plain, "losses")  # if nothing is left out, this is the plain pass again
        same_gradients(gradients(model), expected)
    if not isinstance(shortened.part, FrozenPrefix):
        raise Outcome("off", why[0] if why else "the log gives no reason")
    if not shortened.part.columns([0, 1], boundary):
        raise Wrong("no column is left out")


@contextmanager
def said(least: int = logging.INFO) -> Iterator[list[str]]:
    """Collect what the package logs."""
    lines: list[str] = []
    handler = logging.Handler(least)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("reft_lightning")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(least)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


PROBES: dict[str, Callable[[Case], None]] = {
    "train": train, "generate": generate, "left padding": left_padding, "beams": beams, "checkpointing": checkpointing,
    "bf16": bf16, "compile": compiled, "save, load": save_load, "mixed batch": mixed_batch, "merge": merge,
    "kept prefix": kept_prefix,
}  # fmt: skip


# --- outcomes -------------------------------------------------------------------------------------------------------


def outcome(probe: Callable[[Case], None], case: Case) -> str:
    """Run a probe and return its outcome: ``works``, or a kind and a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe(case)
    except Outcome as other:
        return _short(str(other))
    except Wrong as error:
        return _short(f"wrong: {error}")
    except ValueError as error:
        return _short(f"refused: {error}")
    except Exception as error:
        return _short(f"wrong: {type(error).__name__} {error}")
    return "works"


SAME = [  # details that differ between models, machines and runs
    (r"\b\w+For(CausalLM|SequenceClassification|ConditionalGeneration)\b", "the model"),
    (r"\b(\w+\.)+0\b(\.[\w.]+)?", "a block"),
    (r"\b(layer|block) 0\b", "a layer"),
    (r"^(base: .*) by [\d.e+-]+$", r"\1"),
    (r"the options \{.*?\}: ", "the options: "),
    (r"Target module Conv1D\(.*?\)", "Conv1D"),
    (r"Target modules \{.*?\}", "Target modules q_proj, ..."),
    (r"\b\d+ (layers|columns)\b", r"some \1"),
    (r"\ba \w+(MLP|Block),", "a module that"),
]


def _short(text: str) -> str:
    """Return the first sentence of a message, without names that belong to one model."""
    kind, _, line = " ".join(text.split()).partition(": ")
    line = re.split(r"(?<=[a-z)\]'])[.;] (?=[A-Za-z])|: (?=use |give |name |leave |write )|; give", line)[0]
    text = f"{kind}: {line}"
    for pattern, instead in SAME:
        text = re.sub(pattern, instead, text)
    return text[:200]


def probe(model: str, method: str) -> dict[str, str]:
    """Return probe -> outcome for a method on a model."""
    case = Case(model, method)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.adapted()
    except ValueError as error:
        return dict.fromkeys(PROBES, _short(f"refused: {error}"))
    return {name: outcome(run, case) for name, run in PROBES.items()}


def cells(models: list[str] | None = None, names: list[str] | None = None) -> dict[str, dict[str, str]]:
    """Return ``model method`` -> probe -> outcome, for all models and methods or the given ones."""
    found = {}
    for model in models or ALL:
        for method in names or (methods() if model in MODELS else OF_RELATIVES):
            found[f"{model} {method}"] = probe(model, method)
    return found


# --- files and tables -----------------------------------------------------------------------------------------------

SIGNS = {
    "works": "✓",
    "refused": "✗",
    "off": "off",
    "base": "base",
    "warned": "≈",
    "none": "–",
    "unprobed": "·",
    "wrong": "**wrong**",
}
FEW = 6  # names in a cell of the table of reasons
PAGES = {ROOT / "README.md": "short", ROOT / "docs/explanation/capabilities.md": "long"}
BETWEEN = re.compile(
    r"(<!-- capabilities: written by `make capabilities` -->\n).*?(\n<!-- capabilities end -->)", re.DOTALL
)


def packed(found: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the cells as the file stores them: each outcome once, and its index for each model, method and probe."""
    outcomes = sorted({outcome for cell in found.values() for outcome in cell.values()})
    numbers = {text: number for number, text in enumerate(outcomes)}
    return {
        "probes": list(PROBES),
        "outcomes": outcomes,
        "cells": {key: " ".join(str(numbers[cell[name]]) for name in PROBES) for key, cell in found.items()},
    }


def unpacked(matrix: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the cells that :func:`packed` was given."""
    return {
        key: {
            name: matrix["outcomes"][int(number)]
            for name, number in zip(matrix["probes"], text.split(), strict=True)
        }
        for key, text in matrix["cells"].items()
    }


def _table(head: str, rows: dict[str, dict[str, str]]) -> str:
    lines = [f"| {head} | {' | '.join(PROBES)} |", "|---" * (len(PROBES) + 1) + "|"]
    for name, cell in rows.items():
        lines.append(f"| {name} | {' | '.join(SIGNS[cell[p].partition(':')[0]] for p in PROBES)} |")
    return "\n".join(lines)


def tables(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the text between the markers, for the README and for the documentation page."""
    by_model = {name: found[f"{name} loreft"] for name in ALL}
    titles = {name: row[0] for name, row in ALL.items()}
    short = _table("LoReFT on", {titles[name]: by_model[name] for name in MODELS})
    by_method = {f"`{name}`": found[f"llama {name}"] for name in methods()}
    counts: dict[str, int] = {}
    reasons: dict[str, tuple[set[str], set[str]]] = {}  # probe and outcome -> methods, models
    for key, cell in found.items():
        model, method = key.split(" ", 1)
        for name, text in cell.items():
            kind = text.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if kind not in ("works", "none", "unprobed"):
                where = name if len(set(cell.values())) > 1 else "attach"
                of = reasons.setdefault(f"{where} | {text}", (set(), set()))
                of[0].add(f"`{method}`")
                of[1].add(model)
    rows = ["| probe | outcome | methods | models |", "|---|---|---|---|"]
    for text, (names, models) in sorted(reasons.items()):
        listed = [titles[name] for name in ALL if name in models]
        rows.append(f"| {_escaped(text)} | {_few(sorted(names), 'methods')} | {_few(listed, 'models')} |")
    parts = [
        f"{len(found)} pairs of a model and a method, {sum(counts.values())} cells: "
        + ", ".join(f"{counts[kind]} {SIGNS[kind]}" for kind in SIGNS if kind in counts) + ".",
        "## LoReFT on each model", _table("model", {titles[name]: cell for name, cell in by_model.items()}),
        "## Each method on Llama", _table("`intervention=`", by_method),
        "## What does not work, and why", "\n".join(rows),
    ]  # fmt: skip
    return {"short": short, "long": "\n\n".join(parts)}


def _few(names: list[str], what: str) -> str:
    return "; ".join(names) if len(names) <= FEW else f"{len(names)} {what}"


def _escaped(text: str) -> str:
    probe, _, outcome = text.partition(" | ")
    return f"{probe} | " + re.sub(r"([|*_<>\[\]{}])", r"\\\1", outcome)


def write(found: dict[str, dict[str, str]]) -> None:
    """Write the outcomes to their file, and the tables to the pages."""
    MATRIX.write_text(json.dumps(packed(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    made = tables(found)
    for path, form in PAGES.items():
        text = path.read_text(encoding="utf-8")
        path.write_text(
            BETWEEN.sub(lambda m, form=form: f"{m[1]}\n{made[form]}\n{m[2]}", text), encoding="utf-8"
        )


def main() -> None:
    """Probe everything and write it, or a part and print it."""
    arguments = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=list(ALL))
    arguments.add_argument("--methods", nargs="+", choices=methods())
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found: dict[str, dict[str, str]] = {}
    for model in asked.models or ALL:
        found |= cells([model], asked.methods)
        print(f"{model}: {len(found)} pairs so far", file=sys.stderr)
    if asked.models or asked.methods:
        for key, cell in found.items():
            print(key, *(f"    {name}: {text}" for name, text in cell.items()), sep="\n")
    else:
        write(found)
    if wrong := [
        f"{key}, {name}: {text}"
        for key, cell in found.items()
        for name, text in cell.items()
        if text.startswith("wrong")
    ]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

"""A tiny model with three adapters, and a server of it on this machine."""

import contextlib
import threading
import time

import tiny
import torch
import uvicorn
from laws import shaken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.serving.app import Served, Server, build_app
from reft_lightning.serving.command import KEEP_ALIVE
from reft_lightning.serving.engine import Engine

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
NAMES = ("base", "front", "everywhere", "late")


def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def sentence_piece():
    """A tokenizer in the manner of Llama's: blanks begin words, and what has no token is written in bytes."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        "\u2581",
        "a",
        "b",
        "\u2581a",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model(dtype=torch.float32):
    """A random Llama for bytes, with adapters on its prompts, on all tokens, and on the first decoded ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = len(tokenizer())
    sizes = {**tiny.SIZES, "vocab_size": words, "max_position_embeddings": 128}
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(**sizes, **tiny.GROUPED, initializer_range=0.4)).eval()
    texts = tokenizer().batch_decode([[token] for token in range(words)], skip_special_tokens=True)
    strange = torch.tensor([not (text.isascii() and text.isprintable() and text) for text in texts])
    with torch.no_grad():  # answers that can be read
        base.lm_head.weight[strange] = 0
    base.generation_config.eos_token_id = base.generation_config.pad_token_id = None
    reft = rl.attach(base, "loreft", rank=2, positions="f2+l2")
    reft.add_adapter("everywhere", "direft", rank=2, positions="all")
    reft.add_adapter("late", "direft", rank=2, positions="decode:3")
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed)
    return reft.to(dtype).eval()


SERVED = {
    "base": Served(None),
    "front": Served("default", PromptFormat("alpaca")),
    "everywhere": Served("everywhere"),
    "late": Served("late", PromptFormat("plain", line_break=True)),
}


@contextlib.contextmanager
def server(engine=None, token=None, served=SERVED):
    """Yield the address of a running server."""
    engine = engine or Engine(model(), tokenizer(), max_batch=8)
    app = build_app(engine, served, token)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE,
    )
    running = Server(config, engine)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

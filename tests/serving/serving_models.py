"""A tiny model with three adapters, and a server of it on this machine."""

import contextlib
import queue
import threading
import time

import tiny
import torch
import uvicorn
from laws import shaken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.serving.answers import Answer
from reft_lightning.serving.app import Served, Server, build_app
from reft_lightning.serving.engine import Engine

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
NAMES = ("base", "front", "everywhere", "late")


def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def sentence_piece():
    """A tokenizer like Llama's: blanks begin words, and text without a token is encoded as bytes."""
    pieces = ["<s>", "</s>", "<unk>", "\u2581", "a", "b", "\u2581a"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def strange(tokenizer):
    """Which tokens never occur in a readable answer, (v,) bool."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], skip_special_tokens=True)
    return torch.tensor([not (text.isascii() and text.isprintable() and text) for text in texts])


def model(dtype=torch.float32):
    """A random Llama for bytes, with adapters on its prompts, on all tokens, and on the first decoded ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = len(tokenizer())
    sizes = {**tiny.SIZES, "vocab_size": words, "max_position_embeddings": 128}
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(**sizes, **tiny.GROUPED, initializer_range=0.4)).eval()
    with torch.no_grad():
        base.lm_head.weight[strange(tokenizer())] = 0
    base.generation_config.eos_token_id = base.generation_config.pad_token_id = None
    reft = rl.attach(base, "loreft", rank=2, positions="f2+l2")
    reft.add_adapter("everywhere", "direft", rank=2, positions="all")
    reft.add_adapter("late", "direft", rank=2, positions="decode:3")
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed)
    return reft.to(dtype).eval()


def two_texts(kind):
    """A random T5 or BART, with adapters on the encoder and on the decoder, and a tokenizer that ends texts."""
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    reader = byte_tokenizer(add_bos=False)
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    reader.backend_tokenizer.post_processor = end
    sizes = {
        "vocab_size": len(reader),
        "d_model": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    if kind == "t5":
        config = T5Config(
            **sizes, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0,
            tie_word_embeddings=False,
        )  # fmt: skip
        base = T5ForConditionalGeneration(config)
        with torch.no_grad():
            base.lm_head.weight.normal_()[strange(reader)] = 0
    else:
        config = BartConfig(
            **sizes, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=96, init_std=0.4,
            decoder_start_token_id=2,
        )  # fmt: skip
        base = BartForConditionalGeneration(config)
        base.final_logits_bias[:, strange(reader)] = -100
        defaults = base.generation_config
        defaults.forced_bos_token_id, defaults.num_beams, defaults.no_repeat_ngram_size = 1, 4, 2
    base.generation_config.eos_token_id = None
    reft = rl.attach(base.eval(), "direft", rank=2, positions="f2+l2", component="encoder.block_output")
    reft.add_adapter("decoder", "direft", rank=2, positions="f1+decode:20", component="decoder.block_output")
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed, size=2.0)
    return reft.double().eval(), reader


SERVED = {
    "base": Served(None),
    "front": Served("default", PromptFormat("alpaca")),
    "everywhere": Served("everywhere"),
    "late": Served("late", PromptFormat("plain", line_break=True)),
}


class Asked:
    """One request, and its answer."""

    def __init__(self, engine, text, adapter=None, **settings):
        self.parts = queue.Queue()
        settings = {"max_tokens": 6, "follows": not engine.two_texts, **settings}
        ids = engine.tokenizer(text)["input_ids"] if isinstance(text, str) else text
        self.answer = Answer(ids, self.parts.put, adapter, **settings)
        engine.submit(self.answer)

    def wait(self):
        found = []
        while not found or found[-1].finish is None:
            part = self.parts.get(timeout=60)
            if isinstance(part, Exception):
                raise part
            found.append(part)
        return "".join(part.text for part in found), found[-1].finish


@contextlib.contextmanager
def server(engine=None, token=None, served=SERVED):
    """Yield the address of a running server."""
    engine = engine or Engine(model(), tokenizer(), max_batch=8)
    app = build_app(engine, served, token)
    running = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"), engine)
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

"""One batch, many adapters: generated tokens a second against the bare model's, in one process and over HTTP.

    python experiments/speed/many_adapters.py --out experiments/speed/many_adapters.json
    python experiments/speed/many_adapters.py --requests 500 --only http --out FILE     # with memory after each hundred

First, 16 rows through ``generate`` with 1, 4 and 16 adapters in the batch: edits of the prompt only (LoReFT f7+l7), of
every token (LoReFT all), and LoRA with ``adapter_names`` of peft, all of rank 8 on all layers. PreFT (arXiv:2605.14217)
claims that edits of prompts only are served faster, the more so the more adapters there are.

Then `reft-serve` with 1, 8 and 64 adapters, asked by OpenAI's client, against requests to the base model of the same
server. Variants take turns; figures are medians of the ratios of neighbouring rounds. Weights and prompts are random:
times do not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reft_lightning as rl

RANK, ROWS, COLUMNS, NEW = 8, 16, 100, 32


def base_model(seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of SmolLM2-135M's shape in bfloat16; no token ends a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = (
        LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    )  # as what is compared with it
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def reft_with(count: int, positions: str, model: Any = None) -> rl.ReftModel:
    """Return a model with so many adapters of random parameters."""
    reft = rl.attach(model or base_model(), "loreft", rank=RANK, positions=positions)
    for number in range(1, count):
        reft.add_adapter(f"a{number}", "loreft", rank=RANK, positions=positions)
    return reft.eval()


def lora_with(count: int) -> Any:
    """Return the same of peft, with a LoRA on every linear map of the blocks."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base_model(), config)
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    return model.eval()


def names(count: int) -> list[str]:
    """Return one adapter a row, each as often as the others."""
    known = ["default", *(f"a{number}" for number in range(1, count))]
    return [known[row % count] for row in range(ROWS)]


def rate(generate: Callable[..., Any], **more: Any) -> float:
    """Return generated tokens a second."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49152, (ROWS, COLUMNS), generator=generator)
    start = time.perf_counter()
    with torch.inference_mode():
        found = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **more
        )
    assert found.shape[1] == COLUMNS + NEW
    return ROWS * NEW / (time.perf_counter() - start)


def in_one_process(rounds: int) -> list[dict[str, Any]]:
    """Measure ``generate``; return a line for each variant."""
    bare = base_model()
    variants: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    for count in (1, 4, 16):
        chosen = {"adapter_names": names(count)}
        variants[f"LoReFT f7+l7, {count}"] = (reft_with(count, "f7+l7").generate, chosen)
        variants[f"LoReFT all, {count}"] = (reft_with(count, "all").generate, chosen)
        variants[f"LoRA, {count}"] = (lora_with(count).generate, chosen)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    rate(bare.generate)
    for _ in range(rounds):
        for name, (generate, more) in variants.items():
            found = rate(generate, **more)
            ratios[name].append(found / rate(bare.generate))
            print(f"{name}: {ratios[name][-1]:.3f}", flush=True)
    return [
        {"what": "generate", "variant": name, "ratio": statistics.median(all_), "ratios": all_}
        for name, all_ in ratios.items()
    ]


def over_http(rounds: int, requests: int) -> list[dict[str, Any]]:
    """Measure `reft-serve`; return a line for each number of adapters."""
    lines = []
    for count in (1, 8, 64):
        with Serving(count) as (address, models):
            ask(address, ["base"] * 8)
            ratios, memory = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                ask(address, [models[number % count] for number in range(requests)])
                middle = time.perf_counter()
                ask(address, ["base"] * requests)
                ratios.append((time.perf_counter() - middle) / (middle - start))
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
                print(f"http, {count}: {ratios[-1]:.3f}, peak {memory[-1]} MiB", flush=True)
        line = {"what": "http", "variant": f"LoReFT f7+l7, {count}", "ratio": statistics.median(ratios)}
        lines.append({**line, "ratios": ratios, "requests": requests, "peak_mib": memory})
    return lines


class Serving:
    """A server of random adapters on this machine."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> tuple[str, list[str]]:
        import uvicorn

        from reft_lightning.base_models.loading import byte_tokenizer
        from reft_lightning.serving.app import Served, build_app
        from reft_lightning.serving.engine import Engine

        reft = reft_with(self.count, "f7+l7")
        served = {"base": Served(None)} | {name: Served(name) for name in reft.adapter_names}
        engine = Engine(reft, byte_tokenizer(), ROWS)
        engine.ends = []
        app = build_app(engine, served)
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1", reft.adapter_names

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()


def ask(address: str, models: list[str]) -> None:
    """Send all requests at once, and wait for every answer."""
    import openai

    async def one(client: openai.AsyncOpenAI, name: str) -> None:
        answer = await client.completions.create(
            model=name, prompt="x" * COLUMNS, max_tokens=NEW, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == NEW

    async def everything() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=600) as client:
            await asyncio.gather(*(one(client, name) for name in models))

    asyncio.run(everything())


def main() -> None:
    """Measure, and write what was found."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--requests", type=int, default=32)
    arguments.add_argument("--only", choices=["generate", "http"])
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()
    lines = []
    if options.only != "http":
        lines += in_one_process(options.rounds)
    if options.only != "generate":
        lines += over_http(options.rounds, options.requests)
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": ROWS, "new": NEW}
    options.out.write_text(json.dumps({**found, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Does llama.cpp compute with a control vector that ``to_gguf`` wrote what the edited model computes?

Needs ``pip install xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11739 cffi``: the first is llama.cpp built for Linux,
with its own reader of control vectors; of the second, only the declarations are used. The model, a folder of a Llama
such as stories260K, is written as a GGUF file in float32 without a vocabulary::

    python experiments/exchange/run_in_llama_cpp.py MODEL_FOLDER
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from llama_cpp_py_sync._cffi_bindings import get_ffi
from transformers import AutoModelForCausalLM

import reft_lightning as rl

LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
METHODS = {"bias": {}, "difference_in_means": {}, "lobireft": {"rank": 4}, "lofit": {}}
LAYERS = ([1, 2, 3, 4], [1], [2], [4])
PROMPT, NEXT, F32 = 9, 4, 0


def write_model(model, path: Path) -> None:
    """Write a Llama in float32; rows of queries and keys in the order of llama.cpp's rotary embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if "q_proj" in name or "k_proj" in name:
            rows, columns = tensor.shape
            tensor = tensor.view(-1, 2, config.head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), tensor.float().contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_vector(path: Path) -> tuple[int, np.ndarray]:
    """Return the width and the buffer that llama.cpp's ``common_control_vector_load`` makes of a file.

    A vector of C++ is three pointers; an entry of this one a strength and a string, which is one pointer in the binary
    interface of manylinux2014.
    """
    name = ctypes.create_string_buffer(str(path).encode())

    class Entry(ctypes.Structure):
        _fields_ = (("strength", ctypes.c_float), ("text", ctypes.c_void_p))

    class Found(ctypes.Structure):
        _fields_ = (("width", ctypes.c_int), ("begin", ctypes.c_void_p), ("end", ctypes.c_void_p),
                    ("room", ctypes.c_void_p))  # fmt: skip

    entry, found = Entry(1.0, ctypes.addressof(name)), Found()
    start = ctypes.addressof(entry)
    entries = (ctypes.c_void_p * 3)(start, start + ctypes.sizeof(Entry), start + ctypes.sizeof(Entry))
    load = ctypes.CDLL(xllamacpp.xllamacpp.__file__)[LOADER]
    load.argtypes, load.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    load(ctypes.byref(found), ctypes.byref(entries))
    size = ((found.end or 0) - (found.begin or 0)) // 4
    data = (ctypes.c_float * size).from_address(found.begin) if size else []
    return found.width, np.array(data, dtype=np.float32)


class Runner:
    """A model in llama.cpp, in float32 throughout."""

    def __init__(self, path: Path) -> None:
        self.ffi: Any = get_ffi()
        self.lib: Any = self.ffi.dlopen(xllamacpp.xllamacpp.__file__)
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        self.width = self.lib.llama_model_n_embd(self.model)
        self.layers = self.lib.llama_model_n_layer(self.model)
        self.words = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def logits(self, ids: list[int], vector: np.ndarray | None) -> np.ndarray:
        """Return the logits of a text whose first tokens are read at once, and the others one by one.

        In a context of its own: one that had another vector keeps that one's in the layers after the last of this.
        """
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.type_k, settings.type_v, settings.flash_attn_type = 128, F32, F32, 0
        context = self.lib.llama_init_from_model(self.model, settings)
        data = self.ffi.NULL if vector is None else self.ffi.from_buffer("float[]", vector)
        size = 0 if vector is None else len(vector)
        # the layers that llama.cpp's own programs give, without --control-vector-layer-range
        assert self.lib.llama_set_adapter_cvec(context, data, size, self.width, 1, self.layers) == 0
        found = []
        for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, len(ids)))]:
            batch = self.lib.llama_batch_init(end - begin, 0, 1)
            batch.n_tokens = end - begin
            for i, position in enumerate(range(begin, end)):
                batch.token[i], batch.pos[i], batch.logits[i] = ids[position], position, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            assert self.lib.llama_decode(context, batch) == 0
            for i in range(end - begin):
                row = self.lib.llama_get_logits_ith(context, i)
                found.append(np.frombuffer(self.ffi.buffer(row, 4 * self.words), dtype=np.float32).copy())
            self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return np.stack(found)


def main(folder: str) -> None:
    """Print one line of JSON for each method and list of layers."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, base.config.vocab_size, (1, PROMPT + NEXT))
    work = Path(tempfile.mkdtemp())
    write_model(base, work / "model.gguf")
    runner = Runner(work / "model.gguf")
    with torch.no_grad():
        plain = base(ids).logits[0].numpy()
    print(json.dumps({"frozen": float(np.abs(runner.logits(ids[0].tolist(), None) - plain).max())}))
    for method, settings in METHODS.items():
        for layers in LAYERS:
            reft = rl.attach(base, method, layers=layers, positions="all", **settings).eval()
            with torch.no_grad():
                for parameter in reft.interventions.parameters():
                    parameter.copy_(torch.randn_like(parameter))
                reft.scale = 0.7
                expected = reft(input_ids=ids).logits[0].numpy()
            rl.to_gguf(reft, work / "vector")
            reft.detach()
            width, vector = read_vector(work / "vector" / "control_vector.gguf")
            found = runner.logits(ids[0].tolist(), vector)
            print(json.dumps({
                "method": method, "layers": layers, "width": width, "numbers": len(vector),
                "largest difference": float(np.abs(found - expected).max()),
                "largest effect": float(np.abs(expected - plain).max()),
            }))  # fmt: skip
    writer = gguf.GGUFWriter(work / "zero.gguf", "controlvector")
    writer.add_tensor("direction.0", np.ones(base.config.hidden_size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    width, vector = read_vector(work / "zero.gguf")
    print(json.dumps({"a file with direction.0": {"width": width, "numbers": len(vector)}}))


if __name__ == "__main__":
    main(sys.argv[1])

import functools
import gc

import pytest
import tiny
import torch
from model_laws import DecoderLaws, EncoderLaws, ReftModelLaws
from transformers import AutoModelForCausalLM

from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config import compose
from reft_lightning.runs.build import model_source
from reft_lightning.storage.wheels import cache_folder


class TestLlama(DecoderLaws, ReftModelLaws):
    family = "llama"


class TestQwen3(DecoderLaws):
    family = "qwen3"


class TestGemma3(DecoderLaws):
    family = "gemma3"


class TestMistral(DecoderLaws):
    family = "mistral"


class TestGPT2(DecoderLaws):
    family = "gpt2"


class TestGPTJ(DecoderLaws):
    family = "gptj"
    recomputed = {"atol": 1e-7, "rtol": 1e-4}  # noqa: RUF012  its attention runs in float32 in a float64 model


class TestGPTNeoX(DecoderLaws):
    family = "gpt_neox"


class TestOPT(DecoderLaws):
    family = "opt"


class TestFalcon(DecoderLaws):
    family = "falcon"


class TestBERT(EncoderLaws, ReftModelLaws):
    family = "bert"


class TestRoBERTa(EncoderLaws):
    family = "roberta"


@pytest.mark.shared
class TestStories260K(DecoderLaws):
    @pytest.fixture(autouse=True)
    def _folder(self, shared):
        self.folder = shared / "models" / "stories260K"

    def make_base(self, dtype=torch.float64):
        return tiny.copied(stories260k(self.folder)).to(dtype)


@functools.cache
def stories260k(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.wheel
class TestSmolLM2(DecoderLaws, ReftModelLaws):
    @pytest.fixture(autouse=True)
    def _memory(self):
        """Free the models of a test, of a gigabyte each: hooks tie them in circles, which collectors find late."""
        yield
        gc.collect()

    def make_base(self, dtype=torch.float64):
        return tiny.copied(smollm2()).to(dtype)


@functools.cache
def smollm2():
    settings = compose.compose(["model=smollm2_135m", "model.dtype=float32"])
    if not (cache_folder() / "models").is_dir():
        pytest.skip("SmolLM2 is not in the cache: run `make quickstart` once")
    return load_base_model(**model_source(settings))[0]

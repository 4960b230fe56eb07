import pytest
import torch
from model_laws import DecoderLaws, EncoderLaws
from transformers import AutoModelForCausalLM


class TestLlama(DecoderLaws):
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


class TestBERT(EncoderLaws):
    family = "bert"


class TestRoBERTa(EncoderLaws):
    family = "roberta"


@pytest.mark.shared
class TestStories260K(DecoderLaws):
    @pytest.fixture(autouse=True)
    def _folder(self, shared):
        self.folder = shared / "models" / "stories260K"

    def make_base(self, dtype=torch.float64):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)

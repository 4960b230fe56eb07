"""The output head of a loaded model reads its columns in one product, with the same logits."""

import pytest
import tiny
import torch
from adapted_models import adapted
from torch.utils._python_dispatch import TorchDispatchMode
from training_passes import attached

from reft_lightning.adapters.adapt import adapt
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.base_models.output_head import join_columns

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MODELS = [
    *(("loreft", family) for family in ("llama", "gpt2", "gptj", "opt", "gemma3")),
    ("peft/lora", "llama"),
]


class HeadProducts(TorchDispatchMode):
    """Notes the name and the first operand's shape of every product with the head's weights."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            first, second = args[-2:]
            if tiny.VOCABULARY in second.shape:
                self.found.append((name, tuple(first.shape)))
        return function(*args, **(kwargs or {}))


def built(method, family):
    model = attached(family, torch.float32) if method == "loreft" else adapted(family, method)
    join_columns(model.base_model)
    return model


@pytest.mark.parametrize(("method", "family"), MODELS)
def test_logits_of_the_last_columns_are_one_product(method, family):
    model, batch = built(method, family), tiny.padded(tiny.rows(5, 4, 7), "left")
    with torch.no_grad():
        expected = model(**batch).logits[:, -3:]
        with HeadProducts() as products:
            found = model(**batch, logits_to_keep=3).logits
    *_, (name, shape) = products.found  # GPT-2's keys, queries and values are as wide as the vocabulary, too
    assert name in ("mm", "addmm")
    assert shape == (3 * 3, tiny.WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_loaded_models_have_it_and_attaching_adds_nothing():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, _ = load_base_model(
        source="random", tokenizer="bytes", config={"model_type": "llama", "num_key_value_heads": 2, **size}
    )
    hooks = len(base.lm_head._forward_pre_hooks)
    assert hooks == 1
    adapt(base, "frozen")
    adapt(base, "loreft", rank=2)
    assert len(base.lm_head._forward_pre_hooks) == hooks


@pytest.mark.parametrize("method", ["loreft", "peft/lora"])
def test_the_first_logits_of_a_generation_are_one_product(method):
    model, batch = built(method, "llama"), tiny.padded(tiny.rows(5, 4, 7), "left")
    with HeadProducts() as products:
        model.generate(**batch, max_new_tokens=3)
    assert products.found == [("mm", (3, tiny.WIDTH))] * 3


def test_the_gradients_of_the_last_columns_are_one_product():
    reft, batch = built("loreft", "llama"), tiny.padded(tiny.rows(5, 4, 7), "left")
    labels = batch["input_ids"][:, -3:]
    reft(**batch)  # the first batch with padding on the left: it is tried how the model reads
    with HeadProducts() as products:
        prompt = batch["attention_mask"].bool()
        reft(**batch, labels=labels, logits_to_keep=3, prompt_mask=prompt).loss.backward()
    forward, backward = products.found
    assert forward == ("mm", (9, tiny.WIDTH))
    assert backward == ("mm", (9, tiny.VOCABULARY))

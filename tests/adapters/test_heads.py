"""A classifier's head is trained by default, and tensors that share memory are trained and saved once."""

import pytest
import tiny
import torch
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from transformers.models.auto import AutoModelForSequenceClassification

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.adapters.saving import load_state
from reft_lightning.integrations.transformers import as_pretrained
from reft_lightning.interventions import Intervention

BATCH = tiny.padded(tiny.rows(5, 3), "left")
METHODS = ["loreft", "none", "peft/lora", "bitfit", "full", "loreft + peft/lora"]


def build(cls, config, seed=0):
    torch.manual_seed(seed)
    return (cls(config) if cls is not AutoModelForSequenceClassification else cls.from_config(config)).eval()


BERT = tiny.ENCODERS["bert"]()
SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
CLASSIFIERS = {
    "BERT": (AutoModelForSequenceClassification, BERT, {"bert.pooler", "classifier"}),
    "RoBERTa": (AutoModelForSequenceClassification, tiny.ENCODERS["roberta"](), {"classifier"}),
    "DistilBERT": (
        AutoModelForSequenceClassification,
        DistilBertConfig(vocab_size=48, dim=16, n_layers=2, n_heads=2, hidden_dim=16),
        {"pre_classifier", "classifier"},
    ),
    "DeBERTa": (AutoModelForSequenceClassification, DebertaV2Config(**SMALL), {"pooler", "classifier"}),
    "Llama": (LlamaForSequenceClassification, tiny.DECODERS["llama"](pad_token_id=0), {"score"}),
    "GPT-2": (AutoModelForSequenceClassification, tiny.DECODERS["gpt2"](pad_token_id=0), {"score"}),
    "tokens": (BertForTokenClassification, BERT, {"classifier"}),
    "spans": (BertForQuestionAnswering, BERT, {"qa_outputs"}),
    "choices": (BertForMultipleChoice, BERT, {"bert.pooler", "classifier"}),
}


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_of_a_classifier_is_trained_and_saved(name, tmp_path):  # as PEFT does by task type
    cls, config, heads = CLASSIFIERS[name]
    reft = rl.attach(build(cls, config), rank=2, layers=[0]).eval()
    assert set(reft.config.heads) == heads
    trained = learning(reft.base_model)
    inside = tuple(f"{head}." for head in heads)
    assert trained == {n for n, _ in reft.base_model.named_parameters() if n.startswith(inside)}
    with torch.no_grad():
        for parameter in (p for p in reft.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(build(cls, config), tmp_path).eval()
    batch = {key: value[:, None] for key, value in BATCH.items()} if name == "choices" else BATCH
    if name != "choices":  # rows of several texts are not read
        assert torch.equal(again(**batch)[0], reft(**batch)[0])
    for n, p in reft.base_model.named_parameters():
        assert torch.equal(p, again.base_model.get_parameter(n)), n


@pytest.mark.parametrize(
    ("cls", "config", "wrap"),
    [
        (BertForTokenClassification, BERT, as_pretrained),
        (BertForMaskedLM, BERT, lambda reft: reft),
        (LlamaForTokenClassification, tiny.DECODERS["llama"](pad_token_id=0), lambda reft: reft),
    ],
)
def test_labels_of_a_tagger_s_tokens_leave_the_text_a_prompt(cls, config, wrap):
    reft = rl.attach(build(cls, config), rank=2, positions="f2+l2")
    labels = torch.where(BATCH["attention_mask"].bool(), 1, -100)
    labels[0, 0] = -100  # as of [CLS]
    expected = reft.eval()(**BATCH).logits  # as it is used
    model = wrap(reft.train())
    reft.base_model.eval()  # without dropout
    trained = model(**BATCH, labels=labels)
    assert torch.equal(trained.logits, expected)
    trained.loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_classifier_s_head(method):
    name, _, beside = method.partition(" + ")
    settings = {"rank": 2} if name == "loreft" else {}
    settings |= {"beside": beside} if beside else {}
    model = adapt(tiny.model("bert"), name, **settings)
    head = sum(p.numel() for p in model.parameter_roles()["head"])
    bert = tiny.model("bert")
    assert head == sum(p.numel() for part in (bert.bert.pooler, bert.classifier) for p in part.parameters())
    given = adapt(tiny.model("bert"), name, heads="auto", **settings)
    assert model.parameter_count() == given.parameter_count()


@pytest.mark.parametrize("method", ["loreft", "peft/lora", "bitfit"])
def test_heads_are_left_alone_on_request(method):
    for none in (False, [], ()):
        model = adapt(tiny.model("bert"), method, heads=none, **({"rank": 2} if method == "loreft" else {}))
        assert model.config.heads == []
        assert model.parameter_roles()["head"] == []


def test_a_frozen_model_trains_no_head():
    assert learning(adapt(tiny.model("bert"), "frozen")) == set()


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_models_without_a_head_of_a_task_have_none(base):
    model = tiny.model("llama") if base == "llama" else build(BertModel, BERT)
    reft = rl.attach(model, rank=2)
    assert reft.config.heads == []
    assert learning(reft.base_model) == set()


def test_heads_are_counted_neither_as_trained_nor_as_base():
    count = rl.count_parameters(BERT, "loreft", rank=2, task="sequence_classification")
    without = rl.count_parameters(BERT, "loreft", rank=2, task="sequence_classification", heads=False)
    assert count.trainable == without.trainable
    assert without.base - count.base == 16 * 16 + 16 + 16 * 2 + 2  # pooler and classifier


# --- shared memory ---------------------------------------------------------------------------------------------------


def tied(family):
    if family == "gpt2":
        return build(
            GPT2LMHeadModel, tiny.DECODERS["gpt2"](initializer_range=0.4, eos_token_id=2, bos_token_id=1)
        )
    return build(LlamaForCausalLM, tiny.DECODERS["llama"](initializer_range=0.4, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("method", "family", "which"),
    [*(("loreft", "llama", which) for which in ("head", "embeddings", "head+embeddings", "embeddings+head")),
     ("none", "llama", "head"), ("full", "llama", "embeddings+head"), ("bitfit", "gpt2", "head+embeddings"),
     ("full", "gpt2", "head")],
)  # fmt: skip
def test_a_tied_head_is_trained_and_saved_once(method, family, which, tmp_path):
    names = {"head": "lm_head", "embeddings": "transformer.wte" if family == "gpt2" else "model.embed_tokens"}
    settings = {"heads": [names[part] for part in which.split("+")]}
    settings |= {"rank": 2} if method == "loreft" else {}
    model = adapt(tied(family), method, **settings).eval()
    head = model.parameter_roles()["head"]
    assert [p.numel() for p in head] == [tiny.VOCABULARY * tiny.WIDTH]
    everything = [p for parameters in model.parameter_roles().values() for p in parameters]
    assert len({id(p) for p in everything}) == len(everything)
    unchanged = tied(family)(**BATCH).logits
    with torch.no_grad():
        for parameter in everything:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    again = adapt(tied(family), method, **settings).eval()
    again.load_adapter_state_dict(load_state(tmp_path))
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    positions = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    base = tied(family)(**BATCH, position_ids=positions).logits
    with model.disabled():
        assert torch.equal(model(**BATCH, position_ids=positions).logits, base)
    assert not torch.equal(model(**BATCH).logits, unchanged)
    assert len(load_state(tmp_path)) == len(everything)


def test_a_head_inside_a_head_is_refused_before_training():  # peft: KeyError when it is saved
    inside = ["bert.pooler", "bert.pooler.dense"]
    for method, heads in (("loreft", ["classifier"] * 2), ("peft/lora", inside), ("bitfit", inside[::-1])):
        with pytest.raises(ValueError, match=r"is part of the head .*: name it only once"):
            adapt(tiny.model("bert"), method, heads=heads, **({"rank": 2} if method == "loreft" else {}))


class Twice(Intervention, name="test_twice"):
    """Its two matrices are one."""

    def __init__(self, dim):
        super().__init__(dim)
        self.up = torch.nn.Linear(dim, dim, bias=False)
        self.down = torch.nn.Linear(dim, dim, bias=False)
        self.down.weight = self.up.weight
        self.register_buffer("first", torch.zeros(dim))
        self.register_buffer("view", self.first[:2])

    def edit(self, h):
        return self.down(self.up(h))


def test_an_intervention_may_share_its_tensors(tmp_path):
    reft = rl.attach(tiny.model("llama"), "test_twice").eval()
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(again(**BATCH).logits, reft(**BATCH).logits)
    assert "interventions.0.0.down.weight" not in load_state(tmp_path)

"""Baselines with the calls of a ReFT model: the laws of adapted models, peft's own view of them, and whole runs."""

import json
from types import SimpleNamespace

import architectures
import pytest
import short_runs
import tiny
import torch
from adapted_models import ALL, LLAMA_7B, OPTIONS, PEFT, VIRTUAL, adapted, logits_of
from peft import PeftModel, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DynamicCache,
)

from reft_lightning.adapters.adapt import adapt, build_on_meta
from reft_lightning.adapters.baselines.in_place import Baseline
from reft_lightning.adapters.baselines.peft import peft_config
from reft_lightning.adapters.methods import METHODS
from reft_lightning.adapters.saving import load_state
from reft_lightning.base_models.caches import CACHE
from reft_lightning.config import compose
from reft_lightning.evaluation import Decoding
from reft_lightning.evaluation.decoding import generate_ids
from reft_lightning.runs import chat, experiment
from reft_lightning.runs.evaluate import evaluate

# peft 0.21, called directly here, reads a property that transformers 5.23 renames
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ENDLESS = SimpleNamespace(eos_token_id=999, pad_token_id=tiny.PAD)  # a token that no model here says
TINY = {
    "peft/road": ["intervention.options.group_size=4"],
    "peft/oft": ["intervention.options.oft_block_size=8"],
    "peft/vera": ["intervention.options.r=4"],
}
OURS = ["intervention.rank=8", "intervention.positions=f7+l7"]  # the defaults, which short_runs changes


# --- the laws of adapted models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["peft/lora", *VIRTUAL, "full"])
def test_checking_a_target_gives_the_ids_of_plain_decoding(method):
    model, texts = adapted("llama", method), tiny.rows(5, 2, 7, 4)
    prompts = {"boundary": 7, **tiny.prompt_target(texts, tiny.rows(0, 0, 0, 0))}
    plain = generate_ids(model, prompts, ENDLESS, Decoding(6, verify=False))
    drafts = [plain[0, :4], torch.cat([plain[1, :2], (plain[1, 2:3] + 1) % tiny.VOCABULARY]), plain[2, :1]]
    drafts.append(plain[3])
    batch = {**tiny.prompt_target(texts, drafts), "boundary": 7}
    assert torch.equal(generate_ids(model, batch, ENDLESS, Decoding(6)), plain)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "peft/lora"),
        *((f, method) for f in ("llama", "gpt2", "opt", "gemma3") for method in VIRTUAL),
    ],
)
def test_beams_and_caches_of_other_models_agree(family, method):
    model, batch = adapted(family, method), tiny.padded(tiny.rows(5, 2), "left")
    search = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    found = model.generate(**batch, **search)
    assert found.shape == (4, 9)
    assert torch.equal(model.generate(**batch, **search, use_cache=False), found)
    alone = model.generate(input_ids=batch["input_ids"][1:, 3:], **search)  # its row, without padding
    assert torch.equal(alone[:, 2:], found[2:, 5:])


@pytest.mark.parametrize("method", VIRTUAL)
def test_a_cache_of_an_earlier_call_is_read_once(method):
    model, (text,) = adapted("llama", method), tiny.rows(8)
    with torch.no_grad():
        first = model(input_ids=text[None, :5], use_cache=True)
        then = model(input_ids=text[None, 5:], past_key_values=first.past_key_values)
    whole = logits_of(model, {"input_ids": text[None]})
    torch.testing.assert_close(then.logits, whole[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", VIRTUAL)
def test_generation_refuses_a_cache_that_holds_virtual_tokens(method):
    model, first, whole = adapted("llama", method), *(tiny.padded(tiny.rows(n, n)) for n in (6, 8))
    model.generate(**first, past_key_values=DynamicCache(), max_new_tokens=2)
    cache = model(**first, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=f"{method} puts 3 virtual tokens .*: leave out the cache"):
        model.generate(**whole, past_key_values=cache, max_new_tokens=2)
    with model.disabled():
        model.generate(**whole, past_key_values=model(**first, use_cache=True)[CACHE], max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # a mask, and one for each kind of attention
def test_virtual_tokens_refuse_a_static_cache(family):
    static = {"cache_implementation": "static", "max_new_tokens": 2}
    with pytest.raises(ValueError, match="generate with a dynamic one"):
        adapted(family, VIRTUAL[0]).generate(**tiny.padded(tiny.rows(6, 4)), **static)


# --- parameters and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), [c for c in ALL if c[1] in PEFT])
def test_peft_loads_what_is_saved(family, method, tmp_path):
    model, batch = adapted(family, method), tiny.padded(tiny.rows(6, 6))
    model.config.base_model = "some/model"
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "some/model"
    assert said["task_type"] == ("SEQ_CLS" if family in tiny.ENCODERS else "CAUSAL_LM")
    theirs = PeftModel.from_pretrained(tiny.model(family), tmp_path).eval()
    found = logits_of(theirs, batch)
    torch.testing.assert_close(found[:, -6:], logits_of(model, batch)[:, -6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", PEFT)
def test_the_count_is_pefts_own(method):
    config = peft_config(METHODS[method], OPTIONS.get(method, {}))
    config.task_type = "CAUSAL_LM"
    theirs, _ = get_peft_model(tiny.model("llama"), config).get_nb_trainable_parameters()
    count = adapted("llama", method).parameter_count()
    base = sum(p.numel() for p in tiny.model("llama").parameters())
    assert count == (theirs, base, pytest.approx(100 * theirs / base))


def test_llm_adapters_lora_has_its_published_size():
    chosen = compose.compose(
        ["model=tiny_random", "data=boolq", "intervention=peft/lora_llm_adapters"]
    ).intervention
    count = adapt(build_on_meta(LLAMA_7B), chosen.method, **chosen.options).parameter_count()
    assert count.trainable == 56_098_816
    # Table 1 of Wu et al. 2024 counts the adapter into the base
    assert 100 * count.trainable / (count.base + count.trainable) == pytest.approx(0.826, abs=5e-4)


def test_vectors_and_biases_never_decay():
    for method in ("peft/ia3", "peft/road", "peft/vera"):
        roles = adapted("llama", method).parameter_roles()
        assert roles["bias"]
        assert not roles["weight"]
    roles = adapted("bert", "bitfit").parameter_roles()
    assert not roles["weight"]
    roles = adapted("llama", "peft/dora").parameter_roles()
    assert (len(roles["weight"]), len(roles["bias"])) == (12, 6)  # A and B; magnitudes
    roles = adapted("llama", "peft/lora", r=1).parameter_roles()
    assert not roles["bias"]  # A and B are matrices at any rank


def test_a_head_that_peft_would_take_by_the_end_of_its_name_is_refused():
    config = DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    model = DistilBertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"would train pre_classifier besides the heads classifier"):
        adapt(model, "peft/lora", heads=["classifier"], target_modules=["q_lin"])


@pytest.mark.parametrize(
    "more", [["intervention=full"], ["intervention.heads=[lm_head]"]], ids=lambda m: m[0]
)
def test_a_head_that_shares_the_embeddings_is_not_parted_from_them(more, tmp_path):
    data = short_runs.write_rows(tmp_path / "rows")
    tied = ["model.dtype=bfloat16", "+model.config.tie_word_embeddings=true", *more]
    if more == ["intervention=full"]:
        tied += OURS
    with pytest.raises(experiment.SetupError, match=r"ties its head to its embeddings"):
        short_runs.run(data, tmp_path / "run", *tied)


def test_a_missing_file_is_named(tmp_path):
    adapted("llama", "peft/lora").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not hold an adapter"):
        load_state(tmp_path / "..")


# --- what is refused ----------------------------------------------------------------------------------------------


def test_unknown_methods_and_options_name_the_nearest():
    arguments = ["model=tiny_random", "data=boolq"]
    for overrides, message in (
        (["intervention.method=peft/lorra"], r"unknown baseline 'peft/lorra'.*did you mean 'peft/lora'"),
        (["intervention=peft/lora", "+intervention.options.lora_alhpa=3"], r"did you mean 'lora_alpha'"),
        (["intervention=peft/lora", "+intervention.options.bias=all"], r"leave out the option 'bias'"),
        (["intervention=peft/lora", "+intervention.options.init_lora_weights=pissa"], r"got 'pissa', which"),
        (
            ["intervention=peft/lora", "+intervention.options.layer_replication=[[0,2]]"],
            r"no option 'layer_replic",
        ),
        (["intervention=full", "+intervention.options.r=3"], r"full takes no option 'r'"),
        (["intervention/peft=lora"], r"write intervention=peft/lora"),
        (["intervention.method=lora"], r"unknown intervention 'lora'"),
    ):
        with pytest.raises(compose.CompositionError, match=message):
            compose.compose([*arguments, *overrides])
    assert "use_dora" not in METHODS["peft/dora"].options()


@pytest.mark.parametrize("method", ["peft/prompt_tuning", "peft/prefix_tuning"])
def test_virtual_tokens_before_a_running_state_are_refused_and_before_a_window_are_warned_of(method, caplog):
    base = architectures.build(AutoModelForCausalLM, CONFIG_MAPPING["mamba"])
    said = r"before the padding of a row, and 4 layers of MambaForCausalLM keep a running"
    with pytest.raises(ValueError, match=said):
        adapt(base, method, num_virtual_tokens=2)
    assert not caplog.messages
    adapted("mistral", method)
    assert "layers of MistralForCausalLM look back at 6 columns: the outputs" in caplog.text


def test_a_model_without_biases_is_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no parameters that bitfit trains"):
        adapted("llama", "bitfit")


def test_settings_of_interventions_are_refused_before_weights_are_loaded(tmp_path):
    data = short_runs.write_rows(tmp_path / "rows")
    settings = short_runs.config(data)
    settings.intervention.method = "peft/lora"  # without a command line, the adapter itself refuses them
    with pytest.raises(experiment.SetupError, match=r"peft/lora takes no option 'positions'"):
        experiment.run(settings, tmp_path / "run")
    for override in ("intervention.rank=4", "intervention.positions=f1", "intervention.layers=[0]"):
        with pytest.raises(
            compose.CompositionError, match=r"does not apply to peft/lora.*intervention.options"
        ):
            short_runs.run(data, tmp_path / "run", "intervention=peft/lora", *OURS, override)
    arguments = ("intervention=peft/prefix_tuning", *OURS, "model.gradient_checkpointing=true")
    with pytest.raises(experiment.SetupError, match=r"leave out model.gradient_checkpointing"):
        short_runs.run(data, tmp_path / "run", *arguments)
    with pytest.raises(experiment.SetupError, match=r"no parameters that bitfit trains"):
        short_runs.run(data, tmp_path / "run", "intervention=bitfit", *OURS)


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"))


def test_a_run_is_evaluated_again_and_talked_to(data, tmp_path):
    arguments = ("intervention=peft/prompt_tuning", *OURS, "trainer.max_epochs=1", "optimizer.lr=0.3")
    result = short_runs.run(data, tmp_path, *arguments, "intervention.options.num_virtual_tokens=3")
    assert result["trainable_parameters"] == 3 * 32
    saved = short_runs.checkpoint(tmp_path)["state_dict"]
    assert saved.keys() == {f"adapter.{name}" for name in load_state(tmp_path / "adapter")}
    again = evaluate(tmp_path, "validation")
    assert again["metrics"]["val/loss"] == pytest.approx(result["metrics"]["val/loss"])
    talk = chat.Conversation(*chat.load(tmp_path), max_new_tokens=6)
    base, said = talk.ask("is zorb kept?\n")
    assert base != said
    assert isinstance(talk.model, Baseline)


def test_a_frozen_model_is_evaluated_and_nothing_else(data, tmp_path):
    result = short_runs.run(data, tmp_path, "intervention=frozen", *OURS)
    assert (result["status"], result["steps"], result["trainable_parameters"]) == ("complete", 0, 0)
    assert {"val/loss", "test/accuracy"} <= result["metrics"].keys()
    assert not (tmp_path / "checkpoints").exists()
    again = evaluate(tmp_path, "validation")
    assert again["metrics"]["val/loss"] == result["metrics"]["val/loss"]


@pytest.mark.parametrize("method", ["peft/prompt_tuning", "bitfit"])
def test_a_classifier_is_trained_with_its_head(method, root, tmp_path):
    config = compose.compose(
        [
            "model=tiny_random", "model.config.model_type=bert", "data=glue_rte", f"intervention={method}",
            "data.source=local", f"data.path='{root / 'tests/fixtures/glue'}'", "data.batch_size=4",
            "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    result = experiment.run(config, tmp_path)
    head = 32 * 32 + 32 + 2 * 32 + 2  # BERT's pooler and classifier
    assert (result["status"], result["head_parameters"]) == ("complete", head)
    # 20 virtual tokens; every bias of 2 layers of width 32 and 64
    counts = {"peft/prompt_tuning": 20 * 32, "bitfit": 2 * (7 * 32 + 64) + 32}
    assert result["trainable_parameters"] == counts[method]
    again = evaluate(tmp_path, "validation")
    assert again["metrics"]["val/loss"] == pytest.approx(result["metrics"]["val/loss"])


@pytest.mark.parametrize(
    "method", [m for m in [*PEFT, "full"] if m not in ("peft/lora", "peft/prompt_tuning")]
)
@pytest.mark.slow
def test_every_method_runs_by_configuration_alone(method, data, tmp_path):
    arguments = (f"intervention={method}", *OURS, *TINY.get(method, []), "trainer.max_epochs=1")
    result = short_runs.run(data, tmp_path, *arguments)
    assert result["status"] == "complete"
    assert result["trainable_parameters"] > 0
    again = evaluate(tmp_path, "validation")
    assert again["metrics"]["val/loss"] == pytest.approx(result["metrics"]["val/loss"])

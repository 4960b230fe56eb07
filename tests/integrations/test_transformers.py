"""Trainer, pipelines and Accelerate with a ReftModel: it trains, saves, loads, resumes and answers as it does alone."""

import copy
import pickle

import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from laws import shaken
from readme import code_with
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)
from transformers.models.auto import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.integrations.transformers import as_pretrained

SETTINGS = {"rank": 2, "positions": "f1+l2"}
CONFIG, TENSORS, WEIGHTS = "reft_config.json", "reft.safetensors", "model.safetensors"


def attached(family="llama", **settings):
    torch.manual_seed(3)
    return rl.attach(tiny.model(family), "loreft", **(SETTINGS | settings))


def trained_tensors(reft):
    return {name: tensor.clone() for name, tensor in reft.adapter_state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


def rows(count=8, prompt=5, target=4):
    """Token rows of a prompt and a target, as a data set; with a column that no model takes."""
    ids = torch.stack(tiny.rows(*[prompt + target] * count))
    labels = ids.clone()
    labels[:, :prompt] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({**{k: v.tolist() for k, v in columns.items()}, "source": ["invented"] * count})


def batch_of(dataset):
    columns = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor([row[name] for row in dataset]) for name in columns}


def trainer(model, folder, dataset=None, **arguments):
    given = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05,
             "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    dataset, settings = dataset or rows(), TrainingArguments(str(folder), **given | arguments)
    splits = {"train_dataset": dataset, "eval_dataset": dataset}
    return Trainer(model=model, args=settings, data_collator=default_data_collator, **splits)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_in_the_mode_that_the_model_is_in(training):
    reft = attached(dropout=0.5).train(training)
    model, ids = as_pretrained(reft), batch_of(rows())["input_ids"]
    assert (model.training, reft.training) == (training, training)
    reft.eval()  # a pass without labels, which training refuses
    assert torch.equal(model(ids).logits, reft(ids).logits)


# --- Trainer -------------------------------------------------------------------------------------------------------


def test_trainer_trains_the_adapter_and_saves_nothing_of_the_base(tmp_path):
    reft = attached()
    base = {name: parameter.clone() for name, parameter in reft.base_model.named_parameters()}
    first = trained_tensors(reft)
    before = reft.eval()(**batch_of(rows())).loss.item()
    work = trainer(as_pretrained(reft), tmp_path)
    assert work.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)
    work.train()
    after = reft.eval()(**batch_of(rows())).loss.item()
    assert after < before - 0.05
    assert_same(base, dict(reft.base_model.named_parameters()))
    work.save_model(tmp_path / "best")
    for folder in ("best", "checkpoint-4"):
        assert load_file(tmp_path / folder / WEIGHTS).keys() == first.keys()
        again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / folder).eval()
        assert_same(trained_tensors(again), trained_tensors(reft))
        assert again(**batch_of(rows())).loss.item() == after


def test_the_best_checkpoint_is_the_one_that_is_loaded_at_the_end(tmp_path):
    reft = attached()
    best = {"metric_for_best_model": "loss", "greater_is_better": True}  # the worst, so not the last
    work = trainer(as_pretrained(reft), tmp_path, load_best_model_at_end=True, **best)
    work.train()
    assert work.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same(trained_tensors(reft), load_file(tmp_path / "checkpoint-2" / TENSORS))
    last = load_file(tmp_path / "checkpoint-4" / TENSORS)
    assert not torch.equal(reft.interventions["0"][0].basis, last["interventions.0.0.basis"])


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer(as_pretrained(attached()), tmp_path).train()
    other = trainer(as_pretrained(attached(rank=4)), tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        other.train(resume_from_checkpoint=True)


def test_columns_that_the_model_takes_stay_and_others_go(tmp_path):
    dataset = rows().add_column("prompt_mask", [[True] * 2 + [False] * 7] * 8)
    work = trainer(as_pretrained(attached()), tmp_path, dataset)
    taken = {"input_ids", "attention_mask", "labels", "prompt_mask"}
    assert next(iter(work.get_train_dataloader())).keys() == taken


def test_without_labels_the_prompt_has_to_be_named(tmp_path):
    smoothed = trainer(as_pretrained(attached()), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="pass prompt_mask"):
        smoothed.train()
    dataset = rows().add_column("prompt_mask", [[True] * 5 + [False] * 4] * 8)
    trainer(as_pretrained(attached()), tmp_path, dataset, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_loss_of_one_s_own_gets_the_prompt_from_the_collator_of_the_page(side, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    lengths = {5: 9, 3: 4, 2: 6}  # of prompts, and of prompts with their targets
    dataset = [
        {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
        for (prompt, whole), ids in zip(lengths.items(), ([7] * 9, [8] * 4, [9] * 6), strict=True)
    ]
    scope = {"collator": DataCollatorForSeq2Seq(tokenizer)}
    definition, _, _ = code_with("def with_prompt").partition("\n\n\n")
    exec(definition, scope)
    reft = attached()
    work = trainer(as_pretrained(reft), tmp_path, Dataset.from_list(dataset), label_smoothing_factor=0.1)
    work.data_collator = scope["with_prompt"]
    batch = work.data_collator(dataset)
    assert batch["prompt_mask"].sum(-1).tolist() == list(lengths)
    found = work.compute_loss(as_pretrained(reft).train(), dict(batch))
    labels = batch.pop("labels")
    known = reft(**batch, labels=labels)  # the prompt is found from the labels
    expected = work.label_smoother(known, labels, shift_labels=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrap", [as_pretrained, lambda reft: reft])
def test_packed_rows_are_refused(wrap):
    ids = torch.stack(tiny.rows(8))
    labels = torch.where(torch.arange(8) % 4 < 2, -100, ids)
    with pytest.raises(ValueError, match="packing=False"):
        wrap(attached())(input_ids=ids, labels=labels, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))


def test_gradients_are_the_same_with_gradient_checkpointing():
    found = []
    for checkpointing in (False, True):
        reft = attached()
        model = as_pretrained(reft).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert any(getattr(m, "gradient_checkpointing", False) for m in reft.base_model.modules())
        model(**batch_of(rows())).loss.backward()
        found.append({n: p.grad.clone() for n, p in reft.named_parameters() if p.grad is not None})
    assert found[0]
    assert_same(*found)


def test_a_classifier_trains_and_saves_its_head(tmp_path):
    reft = attached("bert", positions="f1")
    ids = torch.stack(tiny.rows(*[6] * 8))
    columns = {"input_ids": ids, "token_type_ids": (torch.arange(6) > 3).long().expand(8, 6)}
    columns = {name: column.tolist() for name, column in columns.items()}
    dataset = Dataset.from_dict({**columns, "label": [0, 1] * 4, "source": ["invented"] * 8})
    work = trainer(as_pretrained(reft), tmp_path, dataset)
    batch = next(iter(work.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "token_type_ids", "labels"}
    work.train()
    again = rl.ReftModel.from_pretrained(tiny.model("bert"), tmp_path / "checkpoint-4").eval()
    torch.testing.assert_close(again(**batch).logits, reft.eval()(**batch).logits, rtol=0, atol=0)


def test_what_trainer_pushes_is_an_adapter_that_loads(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    pushed = {}

    def upload(self, *, repo_id, folder_path, ignore_patterns, **_):
        pushed[repo_id] = ignore_patterns
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: type("Url", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    reft = attached()
    work = trainer(as_pretrained(reft), tmp_path, hub_model_id="me/it")
    work.train()
    work.push_to_hub()
    assert "checkpoint-*" in pushed["me/it"]
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert_same(trained_tensors(again), trained_tensors(reft))


# --- pipelines and Accelerate --------------------------------------------------------------------------------------


def test_a_pipeline_writes_what_the_model_generates(caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, **sizes, initializer_range=0.4, pad_token_id=0, eos_token_id=2)
    reft = rl.attach(AutoModelForCausalLM.from_config(config), "loreft", **SETTINGS).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.5)
    tokenizer = byte_tokenizer()
    write = pipeline("text-generation", model=as_pretrained(reft), tokenizer=tokenizer)
    texts = ["Good morning", "It"]
    found = write(texts, batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False)
    for text, answers in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new = reft.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answers == [{"generated_text": tokenizer.decode(new, skip_special_tokens=True)}]
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("positions", ["f1+l2", "l1+decode:3", "all"])
def test_a_draft_is_what_the_model_itself_would_write(positions):
    reft = attached(positions=positions).eval()
    shaken(reft.interventions)
    ids, settings = torch.stack(tiny.rows(7)), {"max_new_tokens": 18, "do_sample": False}
    expected = reft.generate(ids, **settings)
    draft = as_pretrained(copy.deepcopy(reft)).eval()
    draft.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    passes = []
    reft.base_model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(reft.generate(ids, assistant_model=draft, **settings), expected)
    assert len(passes) == 3  # of six tokens each: no draft was rejected


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="several texts into one row"):
        as_pretrained(attached()).generate_batch([[5, 6, 7]])


def test_accelerate_saves_and_loads_the_adapter(tmp_path):
    accelerator = Accelerator(cpu=True)
    reft = attached()
    model = as_pretrained(reft)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step():
        accelerator.backward(model(**batch_of(rows())).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = trained_tensors(reft)
    accelerator.save_state(tmp_path / "state")
    assert load_file(tmp_path / "state" / WEIGHTS).keys() == kept.keys()
    step()
    assert not torch.equal(reft.interventions["0"][0].basis, kept["interventions.0.0.basis"])
    accelerator.load_state(tmp_path / "state")
    assert_same(trained_tensors(reft), kept)
    how = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter", state_dict=state, **how)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "adapter")
    assert_same(trained_tensors(again), kept)


def test_a_state_in_shards_is_refused_before_a_file_is_written(tmp_path):
    state = {name: tensor.flatten()[:1] for name, tensor in attached().adapter_state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        as_pretrained(attached()).save_pretrained(tmp_path / "new", state_dict=state)
    assert not (tmp_path / "new").exists()


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_computes_what_the_reft_model_computes(family):
    reft = attached(family).eval()
    model = as_pretrained(reft)
    base = reft.base_model
    batch = batch_of(rows()) if family in tiny.DECODERS else {"input_ids": torch.stack(tiny.rows(6, 6))}
    torch.testing.assert_close(model(**batch).logits, reft(**batch).logits, rtol=0, atol=0)
    assert model.config is base.config
    assert (model.device, model.dtype, model.can_generate()) == (base.device, base.dtype, base.can_generate())
    if family in tiny.DECODERS:
        assert model.generation_config is base.generation_config
        ids = batch["input_ids"][:, :5]
        new = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(ids, **new), reft.generate(ids, **new))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_same_model_with_parameters_of_its_own(again):
    model = as_pretrained(attached().eval())
    other = again(model)
    assert (type(other).__name__, other.training) == (type(model).__name__, False)
    ids = torch.stack(tiny.rows(6, 6))
    expected = model(ids).logits
    torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=0)
    shaken(other.reft.interventions)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert (other(ids).logits - expected).abs().max() > 1e-3


def test_embeddings_of_new_tokens_go_into_the_base(tmp_path):
    reft = attached().eval()
    ids, new = torch.stack(tiny.rows(6)), tiny.VOCABULARY + 2
    expected = reft(ids).logits
    model = as_pretrained(reft)
    assert model.resize_token_embeddings(new, mean_resizing=False) is reft.base_model.get_input_embeddings()
    assert model.config.vocab_size == new
    torch.testing.assert_close(model(ids).logits[..., : tiny.VOCABULARY], expected, rtol=0, atol=0)
    assert model(torch.tensor([[new - 1]])).logits.shape[-1] == new
    assert not any(parameter.requires_grad for parameter in reft.base_model.parameters())


def test_the_configuration_of_the_base_stays_as_it_was():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    before = copy.deepcopy(vars(base.config))
    model = as_pretrained(rl.attach(base, "loreft", **SETTINGS))
    assert vars(base.config) == before
    assert model.config._attn_implementation == "eager"


def test_a_name_that_it_does_not_have_is_an_error():
    with pytest.raises(AttributeError, match="generat_config"):
        as_pretrained(attached()).generat_config  # noqa: B018


@pytest.mark.parametrize("second", [False, True], ids=["one", "two"])
def test_a_resumed_training_of_adapters_is_the_one_that_was_not_interrupted(tmp_path, second):
    def made():
        reft = attached()
        if second:
            reft.add_adapter("style", "direft", rank=2, positions="l1")
            reft.set_adapter(["default", "style"])
        return reft

    whole, resumed = made(), made()
    trainer(as_pretrained(whole), tmp_path).train()
    trainer(as_pretrained(resumed), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(trained_tensors(resumed), trained_tensors(whole))
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / "checkpoint-4")
    if second:
        again.load_adapter(tmp_path / "checkpoint-4" / "style", "style")
    assert_same(trained_tensors(again), trained_tensors(whole))

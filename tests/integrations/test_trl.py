"""trl's SFTTrainer with a ReftModel: its fused losses are those of the model's own forward pass."""

import pytest
import torch
from datasets import Dataset
from readme import BLOCKS
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.integrations.transformers import as_pretrained

trl = pytest.importorskip("trl", reason="trl is not installed")
# trl's own defaults
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

ROWS = {
    "prompt": ["Hello there, ", "Hi, ", "Good morning, "],
    "completion": ["you", "to you", "sir or madam"],
}


GIVEN = {"learning_rate": 0.05, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}


def base():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, **sizes, initializer_range=0.4, pad_token_id=0, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def attached():
    reft = rl.attach(base(), "loreft", rank=2, positions="f1+l2")
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(torch.randn_like(parameter))
    return reft


def trainer(reft, folder, rows=ROWS, **arguments):
    given = GIVEN | {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 3, **arguments}
    return trl.SFTTrainer(
        model=as_pretrained(reft),
        args=trl.SFTConfig(str(folder), **given),
        train_dataset=Dataset.from_dict(rows),
        processing_class=byte_tokenizer(),
    )


def test_the_fused_loss_is_that_of_the_reft_model(tmp_path):
    reft = attached()
    work = trainer(reft, tmp_path)
    batch = next(iter(work.get_train_dataloader()))
    work.model.eval()
    fused = work.model(**batch, fused_lm_head=True)
    out = reft(**batch)
    torch.testing.assert_close(fused.loss, out.loss, rtol=1e-5, atol=0)
    labels = batch["labels"][:, 1:]
    expected = out.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(
        fused.log_probs, expected.masked_fill(labels == -100, 0.0), rtol=1e-5, atol=1e-5
    )
    wanted = [p for p in reft.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(fused.loss, wanted), torch.autograd.grad(out.loss, wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_trains_and_saves_the_adapter_only(tmp_path, checkpointing):
    reft = attached()
    before = {name: parameter.clone() for name, parameter in reft.named_parameters()}
    trainer(reft, tmp_path, gradient_checkpointing=checkpointing).train()
    changed = {name for name, p in reft.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("base_model.")}
    again = rl.ReftModel.from_pretrained(base(), tmp_path / "checkpoint-2").eval()
    ids = torch.tensor([[1, 80, 90, 100]])
    torch.testing.assert_close(again(ids).logits, reft.eval()(ids).logits, rtol=0, atol=0)


def dpo(model, folder, **given):
    given |= {"max_steps": 1}
    chosen, rejected = ROWS["completion"], ["no one", "them", "all"]
    pairs = Dataset.from_dict({"prompt": ROWS["prompt"], "chosen": chosen, "rejected": rejected})
    settings = trl.DPOConfig(str(folder), **given)
    return trl.DPOTrainer(
        model, ref_model=base(), args=settings, train_dataset=pairs, processing_class=byte_tokenizer()
    )


def grpo(model, folder, **given):
    given |= {
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "num_generations": 2,
    }  # rewards of the first step
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(str(folder), max_completion_length=6, **given),
        train_dataset=Dataset.from_dict({"prompt": ROWS["prompt"]}),
        processing_class=byte_tokenizer(),
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by trl
@pytest.mark.parametrize("make", [dpo, grpo])
def test_preferences_and_rewards_train_the_adapter_with_the_prompts_of_the_rows(make, tmp_path):
    reft = attached()
    before = {name: parameter.clone() for name, parameter in reft.named_parameters()}
    work = make(as_pretrained(reft), tmp_path, **GIVEN, save_strategy="no")
    texts = []

    def read(model, args, inputs):
        for ids, prompt in zip(inputs["input_ids"], inputs["prompt_mask"], strict=True):
            texts.append(byte_tokenizer().decode(ids[prompt], skip_special_tokens=True))

    work.model.register_forward_pre_hook(read, with_kwargs=True)
    work.train()
    assert set(texts) == set(ROWS["prompt"])
    changed = {name for name, p in reft.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("base_model.")}


def test_several_texts_in_a_row_are_refused(tmp_path):
    work = trainer(attached(), tmp_path, packing=True, max_length=40)
    with pytest.raises(ValueError, match="packing=False"):
        work.train()


def test_texts_without_a_prompt_are_refused_where_positions_need_one(tmp_path):
    with pytest.raises(ValueError, match="no prompt for the positions"):
        trainer(attached(), tmp_path, {"text": ["It rained.", "All day."]}).train()


def test_the_example_of_the_page_trains(tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if b.page == "docs/integrations.md" and "import trl" in b.text]
    monkeypatch.chdir(tmp_path)
    reft = attached()
    exec(block.text, {"model": as_pretrained(reft), "Dataset": Dataset, "tokenizer": byte_tokenizer()})
    again = rl.ReftModel.from_pretrained(base(), "tuned/checkpoint-2")
    assert torch.equal(again.interventions["0"][0].basis, reft.interventions["0"][0].basis)

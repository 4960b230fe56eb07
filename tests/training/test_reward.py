"""Reward models: the loss matches its formula, padding and end of text change nothing, and a run learns to rank."""

import csv
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
import tiny
import torch
from laws import shaken
from transformers import AutoModelForSequenceClassification, LlamaConfig

import reft_lightning as rl
from reft_lightning.config import compose
from reft_lightning.data.encoding import Encoded
from reft_lightning.data.example import Example
from reft_lightning.data.pairs import collate_pairs
from reft_lightning.data.preferences import whole_texts
from reft_lightning.runs import evaluate, experiment
from reft_lightning.runs.build import outline, prepare
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.training.objectives import Reward

PROMPTS, CHOSEN, REJECTED = tiny.rows(6, 3, 4), tiny.rows(3, 2, 1, seed=1), tiny.rows(2, 4, 1, seed=2)


def module_of(model):
    logged = {}
    return SimpleNamespace(model=model, log=lambda name, value: logged.update({name: value}), logged=logged)


def reward_model(**settings):
    config = LlamaConfig(
        **tiny.SIZES, **tiny.GROUPED, num_labels=1, pad_token_id=tiny.PAD, initializer_range=0.4
    )
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_config(config).double()
    reft = rl.attach(base, "loreft", **{"rank": 2, "positions": "f1+l1", **settings})
    shaken(reft.double().interventions)
    return reft.train()


def pair(prompt, chosen, rejected, pad=tiny.PAD):
    example = Example("t", "p", "y", "y", ("y", "n"))
    rows = [Encoded(prompt.tolist(), [*answer.tolist(), pad], example) for answer in (chosen, rejected)]
    return tuple(rows)


def batch_of(pairs):
    return collate_pairs(partial(whole_texts, tiny.PAD), pairs)


PAIRS = [pair(*texts) for texts in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]


def test_the_loss_is_bradley_and_terrys():
    reft = reward_model()
    module = module_of(reft)
    loss = Reward().loss(module, batch_of(PAIRS))
    losses = []
    for prompt, *answers in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        states = [
            reft(torch.cat([prompt, answer])[None], output_hidden_states=True).hidden_states[-1][0, -1]
            for answer in answers
        ]
        chosen, rejected = (state @ reft.base_model.score.weight[0] for state in states)
        losses.append(-torch.log(1 / (1 + torch.exp(-(chosen - rejected)))))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-12, rtol=1e-10)
    loss.backward()
    assert reft.base_model.score.weight.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in reft.interventions.parameters())
    assert module.logged.keys() == {"train/margin", "train/pair_accuracy"}


def test_pairs_read_alone_have_the_rewards_of_the_batch():
    reft = reward_model()
    alone = torch.stack([Reward().loss(module_of(reft), batch_of([one])) for one in PAIRS])
    torch.testing.assert_close(
        Reward().loss(module_of(reft), batch_of(PAIRS)), alone.mean(), atol=1e-12, rtol=1e-10
    )


def test_the_last_token_is_edited_where_the_head_reads():
    """An edit of the end-of-text token, which a decoder's head treats as padding, would have no gradient."""
    reft = reward_model(positions="l1", layers=[tiny.LAYERS - 1])
    Reward().loss(module_of(reft), batch_of(PAIRS)).backward()
    assert all(p.grad.abs().max() > 0 for p in reft.interventions.parameters())


def test_texts_are_prompts_and_answers_without_the_end_of_text():
    batch = batch_of(PAIRS[:1])
    whole = torch.cat([PROMPTS[0], CHOSEN[0]])
    assert batch["input_ids"][0, : len(whole)].tolist() == whole.tolist()
    assert batch["attention_mask"].sum(-1).tolist() == [
        len(PROMPTS[0]) + len(answers[0]) for answers in (CHOSEN, REJECTED)
    ]
    cut = Encoded([5, 6], [7, 8], PAIRS[0][0].example, cut_target=3)
    assert batch_of([(cut, cut)])["input_ids"][0].tolist() == [5, 6, 7, 8]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    for split, numbers in (("train", range(24)), ("test", range(24, 32))):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "good", "bad"])
            for i in numbers:
                writer.writerow([f"what is {i}?", f"it is {i} zz", f"never mind {i} qq"])
    return folder


def arguments(rows, *overrides):
    return [
        "model=tiny_random", "data=custom", f"data.path='{rows}'", "data.prompt=question", "data.target=good",
        "data.options=[good,bad]", "data.validation_size=4", "data.batch_size=4", "objective=reward",
        "intervention.rank=2", "intervention.positions=f1+l1", "trainer.accelerator=cpu", "trainer.max_epochs=4",
        "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "optimizer.lr=2e-2", *overrides,
    ]  # fmt: skip


def test_a_run_learns_to_rank_and_its_adapter_has_the_head(rows, tmp_path):
    """The chosen answers are those with lower rewards from the untrained head."""
    chosen = ("data.target=bad", "data.options=[good,bad]", "evaluate_base=true")
    results = experiment.run(compose.compose(arguments(rows, *chosen)), tmp_path)
    losses = list(short_runs.logged(tmp_path, "train/loss").values())
    assert losses[-1] < 0.5 * losses[0]
    assert results["monitor"] == "val/pair_accuracy"
    assert results["metrics"]["base/test/custom/pair_accuracy"] == 0.0
    assert results["metrics"]["test/custom/pair_accuracy"] == 1.0
    assert results["counts"]["test/custom/pair_accuracy"]["total"] == 8
    assert results["head_parameters"] == 32
    for row in short_runs.predictions(tmp_path, "reft_test"):
        assert row["correct"]
        assert row["rewards"][0] > row["rewards"][1]
        assert row["answer"] == row["gold"] != row["rejected"]
    config = json.loads((tmp_path / "adapter" / "reft_config.json").read_text())
    assert config["heads"] == ["score"]
    again = evaluate.evaluate(tmp_path, "test", None)
    assert again["metrics"]["test/custom/pair_accuracy"] == 1.0


@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_published_preference_pairs_are_pairs(tmp_path, objective):
    """Rows as in UltraFeedback; only a reward model ranks their answers."""
    place = Path(__file__).parents[1] / "fixtures" / "instruction"
    overrides = [
        "model=tiny_random", "data=ultrafeedback", "data.source=local", f"data.path='{place}'",
        "data.train_tasks=null", "data.tasks=[ultrafeedback_binarized]", "data.validation_size=2",
        "data.max_length=160", f"objective={objective}", "intervention=bias",
        "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
        *(["decoding.max_new_tokens=2"] if objective != "reward" else []),
    ]  # fmt: skip
    results = experiment.run(compose.compose(overrides), tmp_path)
    assert results["monitor"] == ("val/pair_accuracy" if objective == "reward" else "val/loss")
    ranked = [name for name in results["metrics"] if name.endswith("accuracy") and name.startswith("val/")]
    assert bool(ranked) == (objective == "reward")


def test_a_step_in_parts_is_the_whole_step(rows, tmp_path):
    losses = []
    for size, parts in ((4, 1), (2, 2)):
        more = (f"data.batch_size={size}", f"trainer.accumulate_grad_batches={parts}", "model.dtype=float32",
                "data.group_by_length=false", "trainer.max_epochs=1", "test=false")  # fmt: skip
        experiment.run(compose.compose(arguments(rows, *more)), tmp_path / str(size))
        losses.append(list(short_runs.logged(tmp_path / str(size), "train/loss").values()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=glue_rte", "data.prompt=null", "data.target=null", "data.options=null"],
            "are not text questions with options",
        ),
        (["decoding.max_new_tokens=3"], "decoding.max_new_tokens does not apply"),
        (["kept.limit_gb=1"], "runs its own passes"),
        (["checkpoint.monitor=val/option_accuracy"], "must be one of val/loss, val/pair_accuracy"),
    ],
)
def test_what_a_reward_model_has_no_use_for_is_refused(rows, overrides, message):
    with pytest.raises(ValueError, match=message):
        prepare(compose.compose(arguments(rows, *overrides)))


def test_a_reward_model_is_not_talked_to(rows):
    config = compose.compose(arguments(rows))
    assert outline(config).hf_config.num_labels == 1
    with pytest.raises(ValueError, match="does not generate text"):
        PromptFormat.of(config, "here")

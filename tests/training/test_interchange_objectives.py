"""Interchange objectives: their formulas, and runs on rows with two prompts, with interchange accuracy."""

import csv
import math
from types import SimpleNamespace

import pytest
import short_runs
import tiny
import torch
from laws import shaken

import reft_lightning as rl
from reft_lightning.config import compose
from reft_lightning.inspection.plan import plan
from reft_lightning.runs import experiment
from reft_lightning.runs.build import outline
from reft_lightning.training.objectives import CDAS, Interchange

PROMPTS, TARGETS, SOURCES = tiny.rows(6, 3, 4), tiny.rows(3, 2, 1, seed=1), tiny.rows(4, 7, 5, seed=4)


def batch():
    sources = tiny.padded(SOURCES, "left")
    return tiny.prompt_target(PROMPTS, TARGETS) | {
        "boundary": 6,
        "rows": torch.arange(3),
        "source_ids": sources["input_ids"],
        "source_mask": sources["attention_mask"],
    }


def module_of(model, step=0):
    logged = {}
    forward = lambda inputs, batch: model(**inputs)  # noqa: E731
    return SimpleNamespace(model=model, output_of=forward, global_step=step, total_steps=4, logged=logged,
                           log=lambda name, value: logged.update({name: value}))  # fmt: skip


def attached(method, **settings):
    torch.manual_seed(2)
    reft = rl.attach(tiny.model("llama", torch.float64), method, **settings)
    shaken(reft.to(torch.float64).interventions)
    return reft.train()


def distributions(model, prompt, target, **more):
    """Return p(. | prompt, target so far) at each token of the target."""
    ids = torch.cat([prompt, target])[None]
    mask = torch.arange(ids.shape[1])[None] < len(prompt)
    logits = model(ids, prompt_mask=mask, **more).logits[0]
    return logits[len(prompt) - 1 : -1].softmax(-1)


def test_interchange_is_the_loss_of_the_counterfactual_target():
    reft = attached("das", rank=3, positions="l2", layers=[1])
    module = module_of(reft)
    loss = Interchange().loss(module, batch())
    losses, right = [], []
    for prompt, target, source in zip(PROMPTS, TARGETS, SOURCES, strict=True):
        p = distributions(reft, prompt, target, source_ids=source[None])
        losses += [-math.log(row[token].item()) for row, token in zip(p, target, strict=True)]
        right.append(bool((p.argmax(-1) == target).all()))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert module.logged["train/iia"].item() == pytest.approx(sum(right) / 3)
    loss.backward()
    assert reft.interventions["1"][0].basis.grad.abs().max() > 0


def test_cdas_is_its_formula():
    reft = attached("cdas", positions="all", layers=[1])
    loss = CDAS().loss(module_of(reft), batch())
    found = []
    for prompt, target, source in zip(PROMPTS, TARGETS, SOURCES, strict=True):
        edited = distributions(reft, prompt, target, source_ids=source[None])
        with torch.no_grad(), reft.disabled():
            goal = distributions(reft, source, target)
        for p, q in zip(edited, goal, strict=True):
            m = (p + q) / 2
            found.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    torch.testing.assert_close(loss, torch.stack(found).mean(), atol=1e-6, rtol=1e-6)
    loss.backward()
    assert reft.interventions["1"][0].basis.grad.abs().max() > 0


def test_the_temperature_goes_with_the_steps():
    reft = attached("boundless_das", positions="l1", layers=[1])
    for step, annealed in ((0, 0.0), (3, 0.75), (9, 1.0)):
        module = module_of(reft, step)
        Interchange().loss(module, batch())
        assert reft.interventions["1"][0].annealed == annealed
    edge = min(max(10 * reft.interventions["1"][0].boundary.item(), 1e-3), 1.0)
    assert module.logged["train/penalty"].item() == pytest.approx(edge)


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("interchange") / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["base", "source", "label", "yes", "no"])
        writer.writerows(
            [f"is {i} even?", f"is {7 * i % 31} even, too?", ["no", "yes"][i % 2], "yes", "no"]
            for i in range(24)
        )
    return path


def arguments(rows, *overrides):
    return [
        "model=tiny_random", "data=custom", f"data.path={rows}", "data.prompt=base", "data.source_prompt=source",
        "data.target=label", "data.options=[yes,no]", "data.validation_size=6", "data.batch_size=4",
        "decoding.max_new_tokens=3", "intervention=das", "intervention.rank=2", "objective=interchange",
        "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "optimizer.lr=2e-2", *overrides,
    ]  # fmt: skip


CASES = {
    "das": [],
    "boundless_das": ["intervention=boundless_das", "trainer.accumulate_grad_batches=2"],
    "cdas": ["intervention=cdas", "objective=cdas", "intervention.layers=[1]"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_reads_both_prompts_in_training_and_evaluation(rows, tmp_path, case):
    config = compose.compose(arguments(rows, *CASES[case], "trainer.max_epochs=1"))
    results = experiment.run(config, tmp_path / "run")
    assert {"val/custom/accuracy", "val/custom/option_accuracy", "val/loss"} <= results["metrics"].keys()
    if case != "cdas":
        assert short_runs.logged(tmp_path / "run", "train/iia")


def test_scores_are_those_of_exchanged_prompts(rows):
    """Every kind of evaluation reads the source: loss, options, verified and plain decoding."""
    objects = experiment.build(compose.compose(arguments(rows)))
    module, data = objects.module.eval(), objects.data
    (loader,) = data.val_dataloader()
    (batch,) = loader
    found = {}
    for verify in (True, False):
        module.decoding = type(module.decoding)(max_new_tokens=3, verify=verify)
        module.predictions = []
        module.validation_step(batch, 0)
        found[verify] = [row["generated"] for row in module.predictions]
    assert found[True] == found[False]
    direct = objects.model.generate(
        input_ids=batch["input_ids"][:, : batch["boundary"]],
        attention_mask=batch["attention_mask"][:, : batch["boundary"]],
        source_ids=batch["source_ids"], source_mask=batch["source_mask"], max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    texts = data.tokenizer.batch_decode(direct[:, batch["boundary"] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [text.strip() for text in found[True]]


def test_rows_that_do_not_bring_a_source_are_refused_before_a_weight_is_loaded(rows):
    for overrides, said in (
        (["data.source_prompt=null"], "das uses hidden states of other texts: name their column"),
        (["intervention=loreft"], "data.source_prompt does not apply to loreft"),
        (["data.source_prompt=sorce"], "no column 'sorce'.*did you mean 'source'"),
        (
            ["intervention=loreft", "data.source_prompt=null"],
            "Interchange inserts hidden states .* loreft does not take any",
        ),
        (["intervention.positions=all"], "das exchanges tokens between prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            outline(compose.compose(arguments(rows, *overrides)))
    with pytest.raises(
        ValueError, match=r"DifferenceInMeans works only with intervention=difference_in_means; got bias"
    ):
        outline(compose.compose([
            "model=tiny_random", "data=custom", f"data.path={rows}", "data.prompt=base", "data.target=label",
            "data.options=[yes,no]", "intervention=bias", "objective=difference_in_means", "optimizer=closed_form",
            "trainer=closed_form", "scheduler=constant",
        ]))  # fmt: skip


def test_a_plan_counts_the_other_prompt_among_the_inputs(rows):
    assert plan(compose.compose(arguments(rows)))["trainable_parameters"] > 0
    assert plan(compose.compose(arguments(rows)), prompt=8, target=2)["batches"]["given"]["rows"] == 4


@pytest.mark.parametrize("objective", ["dpo", "reps", "reward"])
def test_two_answers_are_not_compared_under_another_text(rows, objective):
    overrides = [o for o in arguments(rows) if not o.startswith(("objective=", "decoding."))]
    with pytest.raises(ValueError, match=r"compares two answers and does not support data.source_prompt"):
        outline(compose.compose([*overrides, f"objective={objective}"]))

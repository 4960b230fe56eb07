"""Objectives: today's loss bit for bit, preferences against their formulas, and a custom objective in ten lines."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import short_runs
import tiny
import torch
import torch.nn.functional as F
from laws import D, shaken, tokens

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.config import compose
from reft_lightning.data.example import Example
from reft_lightning.data.pairs import rejected
from reft_lightning.runs import experiment
from reft_lightning.runs.build import build, outline, prepare
from reft_lightning.training.objectives import DPO, SFT, Objective, RePS, inputs_of, reference

PROMPTS, CHOSEN, REJECTED = tiny.rows(6, 3, 4), tiny.rows(3, 2, 1, seed=1), tiny.rows(2, 4, 1, seed=2)


def attached(method="bias", dtype=torch.float64, **settings):
    torch.manual_seed(2)
    reft = rl.attach(tiny.model("llama", dtype), method, **{"positions": "all", **settings})
    shaken(reft.to(dtype).interventions)
    return reft.train()


def pairs():
    """Three pairs in the loader's layout."""
    batch = tiny.prompt_target([*PROMPTS, *PROMPTS], [*CHOSEN, *REJECTED])
    return batch | {"boundary": 6, "rows": torch.arange(6)}


def module_of(model):
    logged = {}
    forward = lambda inputs, batch: model(**inputs)  # noqa: E731
    return SimpleNamespace(model=model, output_of=forward, log=lambda name, value: logged.update({name: value}),
                           logged=logged)  # fmt: skip


def log_p(model, prompt, target, **more):
    """Return log p(target | prompt), token by token."""
    ids = torch.cat([prompt, target])[None]
    mask = torch.arange(ids.shape[1])[None] < len(prompt)
    logits = model(ids, prompt_mask=mask, **more).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(target)])


def test_supervised_finetuning_is_the_loss_of_the_model():
    reft = attached("loreft", torch.float32, rank=2, positions="f2+l1")
    batch = tiny.prompt_target(PROMPTS, CHOSEN) | {"boundary": 6, "rows": torch.arange(3)}
    module = module_of(reft)
    loss = SFT().loss(module, batch)
    kept = batch["input_ids"].shape[1] - 6 + 1
    names = ("input_ids", "attention_mask", "prompt_mask")
    plain = reft(**{n: batch[n] for n in names}, labels=batch["labels"][:, -kept:], logits_to_keep=kept).loss
    assert torch.equal(loss, plain)
    assert module.logged == {}


def test_dpo_is_its_formula():
    reft, beta = attached(), 0.3
    module = module_of(reft)
    loss = DPO(beta).loss(module, pairs())
    losses = []
    for prompt, *answers in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        policy = [log_p(reft, prompt, target).sum() for target in answers]
        with torch.no_grad(), reft.disabled():
            base = [log_p(reft, prompt, target).sum() for target in answers]
        margin = beta * (policy[0] - base[0]) - beta * (policy[1] - base[1])
        losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in reft.interventions.parameters())
    assert module.logged.keys() == {"train/margin", "train/pair_accuracy"}


def test_dpo_starts_at_the_base_model_and_leaves_it():
    reft = rl.attach(tiny.model("llama"), "bias", positions="all").train()
    optimizer = torch.optim.AdamW(reft.interventions.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        loss = DPO().loss(module_of(reft), pairs())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert losses[-1] < 0.8 * losses[0]


def test_reps_is_its_formula():
    reft = attached()
    loss = RePS([2.0]).loss(module_of(reft), pairs())
    losses = []
    for prompt, *answers in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        strong = {"adapter_names": [("default", 2.0)]}
        a = [log_p(reft, prompt, target, **strong).mean() for target in answers]
        with reft.nulled():
            null = [log_p(reft, prompt, target).mean() for target in answers]
        with torch.no_grad(), reft.disabled():
            base = [log_p(reft, prompt, target).sum() for target in answers]
        towards = max(base[1] - base[0], 1) * a[0] - a[1]
        away = max(base[0] - base[1], 1) * null[1] - null[0]
        losses.append(-F.logsigmoid(towards) - F.logsigmoid(away))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)


def test_strengths_are_drawn_by_row():
    reft = attached()
    seen = []
    reft.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("adapter_names")), with_kwargs=True
    )
    torch.manual_seed(0)
    RePS().loss(module_of(reft), pairs())
    drawn = [strength for names in seen if names for _, strength in names]
    assert len(drawn) == 6
    assert len(set(drawn)) > 1
    assert set(drawn) <= set(map(float, range(2, 21, 2)))


def test_a_nulled_edit_removes_its_direction():
    h = tokens(dtype=torch.float64)
    bias = shaken(rl.Bias(D)).double()
    nulled, along = bias(h, nulled=True), h @ bias.bias
    expected = h - along.clamp(min=0)[:, None] * bias.bias / bias.bias.norm() ** 2
    torch.testing.assert_close(nulled, expected, atol=1e-12, rtol=1e-12)
    assert (nulled @ bias.bias).max() < 1e-9
    assert torch.equal(rl.Bias(D)(tokens(), nulled=True), tokens())  # without a direction
    loreft = shaken(rl.LoReFT(D, 3)).double()
    assert (loreft(h, nulled=True) @ loreft.R.mT).abs().max() < 1e-9
    reft = attached("red")
    with pytest.raises(ValueError, match=r"RED has no null\(h\).*bias.*can"), reft.nulled():
        pass


# --- one's own --------------------------------------------------------------------------------------------------------


class Distil(Objective):
    """Match the distributions of the frozen base at a given temperature."""

    def __init__(self, temperature=2.0):
        self.temperature = temperature

    def loss(self, module, batch):
        inputs = inputs_of(batch)
        with torch.no_grad(), module.model.disabled():
            goal = (module.model(**inputs).logits / self.temperature).softmax(-1)
        return F.cross_entropy(module.model(**inputs).logits.mT / self.temperature, goal.mT)


def test_ones_own_objective_takes_ten_lines():
    reft = attached("direft", rank=2)
    with torch.no_grad():
        before = Distil().loss(module_of(reft), pairs())
    optimizer = torch.optim.AdamW(reft.interventions.parameters(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        loss = Distil().loss(module_of(reft), pairs())
        loss.backward()
        optimizer.step()
    assert loss < before


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "good", "bad"])
        for i in range(20):
            writer.writerow([f"what is {i}?", f"it is {i} of them", f"never mind number {i}"])
    return path


def arguments(rows, *overrides):
    return [
        "model=tiny_random", "data=custom", f"data.path={rows}", "data.prompt=question", "data.target=good",
        "data.options=[good,bad]", "data.validation_size=4", "data.batch_size=4", "decoding.max_new_tokens=2",
        "intervention=bias", "intervention.positions=all", "trainer.accelerator=cpu", "trainer.max_epochs=3",
        "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "optimizer.lr=2e-2", *overrides,
    ]  # fmt: skip


CLOSED = [
    "intervention=difference_in_means", "objective=difference_in_means", "optimizer=closed_form", "optimizer.lr=1.0",
    "scheduler=constant", "trainer=closed_form", "trainer.max_epochs=1",
]  # fmt: skip


def test_the_closed_form_is_accepted(rows):
    outline(compose.compose(arguments(rows, *CLOSED)))


@pytest.mark.parametrize("objective", ["dpo", "reps"])
def test_a_run_learns_preferences(rows, tmp_path, objective):
    results = experiment.run(compose.compose(arguments(rows, f"objective={objective}")), tmp_path)
    losses = list(short_runs.logged(tmp_path, "train/loss").values())
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert short_runs.logged(tmp_path, "train/pair_accuracy")
    assert results["monitor"] == "val/option_accuracy"
    assert "val/option_accuracy" in results["metrics"]


def test_a_step_in_parts_is_the_whole_step(rows, tmp_path):
    """The mean over the pairs of a step, however it is divided; 15 pairs, with three in the last step."""
    settings = (
        "objective=dpo",
        "data.group_by_length=false",
        "data.validation_size=5",
        "model.dtype=float32",
        "trainer.max_epochs=1",
    )
    losses = []
    for size, parts in ((4, 1), (2, 2)):
        more = (f"data.batch_size={size}", f"trainer.accumulate_grad_batches={parts}")
        folder = tmp_path / str(size)
        experiment.run(compose.compose(arguments(rows, *settings, *more)), folder)
        losses.append(list(short_runs.logged(folder, "train/loss").values()))
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=dpo", "objective.options.beta=-1"], "beta must be above 0"),
        (["objective=dpo", "+objective.options.betta=1"], "DPO does not take 'betta'; did you mean 'beta'"),
        (["objective._target_=torch.optim.SGD"], "not a subclass of"),
        (["objective=reps", "intervention=red"], r"RED has no null\(h\)"),
        (
            ["objective=reps", "intervention=peft/lora", "intervention.positions=f7+l7"],
            "needs edits with adjustable strength",
        ),
        (["objective=dpo", "kept.limit_gb=1"], "runs its own passes"),
        (["objective=dpo", "objective.options.beta=abc"], "beta must be above 0; got abc"),
        (["objective=reps", "objective.options.strengths=3"], "must be a list of finite numbers; got 3"),
        (["objective=reps", "objective.options.strengths=[a]"], "must be a list of finite numbers"),
        (["objective=reps", "intervention.heads=[lm_head]"], "trained heads .lm_head. have none"),
        ([*CLOSED, "scheduler=linear"], "over all rows: it needs scheduler=constant"),
        ([*CLOSED, "optimizer=adamw"], "over all rows: it needs optimizer=closed_form"),
        ([*CLOSED, "trainer.max_epochs=2"], "over all rows: it needs trainer=closed_form"),
        ([*CLOSED, "callbacks=penalty_linear"], "over all rows: it needs callbacks without a penalty"),
        ([*CLOSED, "intervention.beside=peft/lora"], "over all rows: it needs intervention.beside=null"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights(rows, overrides, message):
    with pytest.raises(ValueError, match=message):
        outline(compose.compose(arguments(rows, *overrides)))


def test_rows_need_an_answer_to_reject(rows):
    with pytest.raises(ValueError, match=r"pairs.csv.*a pair needs two options"):
        build(compose.compose([*arguments(rows, "objective=dpo"), "data.options=null"]))


def test_of_several_wrong_options_the_next_is_rejected():
    example = Example("t", "p", "b", "b", ("a", "b", "c"))
    assert rejected(example).target == "c"
    assert rejected(replace(example, target="c")).target == "a"
    assert rejected(replace(example, options=("b", "x"))).target == "x"
    assert (
        rejected(replace(example, options=("b", "  ", "x"))).target == "x"
    )  # an option without text does not count
    assert rejected(replace(example, target=" b", options=("x", "y"))).target == "x"


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_two_answers_follow_one_prompt_however_long_they_are(tmp_path, objective):
    """A longer answer leaves less of a long prompt; the shorter answer then follows the same prompt."""
    for split in ("train", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "good", "bad"])
            writer.writerows(
                [f"what is the {split} number {i:02}?", "yes", f"no, {i} of them"] for i in range(9)
            )
    overrides = arguments(tmp_path, f"objective={objective}", "data.max_length=30")
    if objective == "reward":
        overrides.remove("decoding.max_new_tokens=2")
    data = prepare(compose.compose(overrides)).data
    for i in range(len(data.train_rows)):
        chosen, other = data.train_rows[i]
        assert chosen.cut_prompt == other.cut_prompt > 0
        assert chosen.prompt_ids == other.prompt_ids
        assert len(chosen) < len(other) == 30


def test_the_reference_is_the_base_without_dropout_and_gradient():
    reft = attached("direft", rank=2, dropout=0.5)
    reft.base_model.config.attention_dropout = 0.5
    for block in reft.base_model.model.layers:
        block.self_attn.attention_dropout = 0.5
    inputs = inputs_of(pairs())
    with reference(reft):
        logits = reft(**inputs).logits
    assert reft.training
    assert reft.base_model.training
    assert not logits.requires_grad
    base = {k: v for k, v in inputs.items() if k != "prompt_mask"}
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reft.base_model.eval()(**base, position_ids=position_ids).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("trained", ["full", "head"])
def test_the_reference_may_be_asked_after_the_policy(trained):
    if trained == "full":
        model = adapt(tiny.model("llama", torch.float64), "full", heads=[]).train()
    else:
        model = attached(heads=["lm_head"])
    inputs = inputs_of(pairs())
    alone = torch.autograd.grad(model(**inputs).loss, [p for p in model.parameters() if p.requires_grad])
    loss = model(**inputs).loss
    with reference(model):
        model(**inputs)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, alone, found))

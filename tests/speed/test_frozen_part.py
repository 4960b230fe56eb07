"""The constant part of a training pass: the same losses and gradients as the plain pass, kept and never stale."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import short_runs
import tiny
import torch
from laws import shaken
from training_passes import BATCH, ROWS, Rows, assert_same_training, attached, batches, encoded, train

import reft_lightning as rl
from reft_lightning.config import compose
from reft_lightning.data.encoding import Collator, target_only
from reft_lightning.runs import experiment
from reft_lightning.runs.experiment import SetupError
from reft_lightning.speed import row_store
from reft_lightning.speed.choose_part import training_pass
from reft_lightning.speed.frozen_part import ConstantInput, ConstantPrefix, last_constant_block, tokens_behind

PLENTY = 10**8
# positions, layers, limit (of float64) -> what is left out
CASES = {
    "a split prefix": ("l2", "all", 0, ConstantPrefix),
    "a kept prefix": ("l2", "all", PLENTY, ConstantPrefix),
    "a prefix before the target": ("decode:1", [0, 2], PLENTY, ConstantPrefix),
    "both": ("l1", [2], 24_000, ConstantInput),  # a third of the keys and values would fit
    "the input of the last layer": ("f2+l2", [2], PLENTY, ConstantInput),
    "some rows' input": ("f2+l2", [1], 10_000, ConstantInput),
}


def compare(family, case, steps, dtype=torch.float64, tolerance=1e-10, **settings):
    positions, layers, limit, part = CASES[case]
    rows = encoded()
    plain, short = (attached(family, dtype, positions=positions, layers=layers, **settings) for _ in range(2))
    run = training_pass(short, rows, causal=True, limit=limit * dtype.itemsize // 8)
    assert type(run.part) is part
    assert_same_training(plain, short, run, rows, steps, tolerance)
    assert run.first_batch.refused is False
    return run


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_give_the_losses_and_gradients_of_the_plain_pass(case):
    compare("llama", case, steps=50)


@pytest.mark.parametrize("case", CASES)
def test_the_same_in_float32(case):
    compare("llama", case, steps=50, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen3", "falcon"])
@pytest.mark.parametrize("case", ["a split prefix", "a kept prefix", "the input of the last layer"])
def test_other_architectures_give_the_same(family, case):
    # Falcon and OPT compute some of their norms in float32
    compare(family, case, steps=6, tolerance=2e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_sliding_window_is_split_and_its_layers_are_kept_instead_of_its_prefixes(family):
    rows = encoded()
    assert isinstance(compare(family, "a split prefix", steps=6, tolerance=2e-6).part, ConstantPrefix)
    reft = attached(family, positions="l2", layers=[1])
    assert isinstance(training_pass(reft, rows, causal=True, limit=PLENTY).part, ConstantInput)


@pytest.mark.parametrize("case", ["a kept prefix", "the input of the last layer"])
@pytest.mark.parametrize(
    "settings", [{"dropout": 0.5}, {"tied": "group"}, {"component": "mlp_output"}], ids=str
)
def test_dropout_tying_and_components_change_nothing(case, settings):
    compare("llama", case, steps=6, **settings)


def test_prompts_too_short_for_their_positions_are_as_in_the_plain_pass():
    rows = encoded(shortest=1)
    plain, short = (attached("llama", positions="l9") for _ in range(2))
    run = training_pass(short, rows, causal=True, limit=PLENTY)
    expected, losses = train(plain, rows, steps=12)[0], train(short, rows, run, steps=12)[0]
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-10)


def test_a_bfloat16_base_gives_nearly_the_same():
    compare("llama", "a kept prefix", steps=4, dtype=torch.bfloat16, tolerance=0.1)


@pytest.mark.parametrize(
    ("head", "positions", "layers", "tied", "limit", "part"),
    [
        ("lm_head", "l2", "all", False, 0, ConstantPrefix),
        ("lm_head", "l2", "all", False, PLENTY, ConstantPrefix),
        ("lm_head", "l2", "all", True, PLENTY, None),  # it is the embeddings, too
        ("lm_head", "f2+l2", [2], False, PLENTY, ConstantInput),
        ("model.layers.1.mlp", "l2", "all", False, 0, None),
        ("model.layers.1.mlp", "l2", [2], False, PLENTY, ConstantInput),
        ("model.layers.2.mlp", "f2+l2", [2], False, PLENTY, ConstantInput),
        ("model.embed_tokens", "l2", "all", False, PLENTY, None),
    ],
)
def test_weights_that_train_beside_get_their_whole_gradients(head, positions, layers, tied, limit, part):
    rows, models = encoded(), []
    for _ in range(2):
        base = tiny.model("llama", torch.float64)
        if tied:
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.model.embed_tokens.weight
        torch.manual_seed(0)
        reft = rl.attach(base, "loreft", rank=2, positions=positions, layers=layers, heads=[head])
        models.append(reft.to(torch.float64).train())
    run = training_pass(models[1], rows, causal=True, limit=limit)
    assert (run and type(run.part)) is part
    plain, losses = train(models[0], rows)[0], train(models[1], rows, run)[0]
    torch.testing.assert_close(losses, plain, atol=0, rtol=1e-10)
    for a, b in zip(*(m.parameter_roles()["head"] for m in models), strict=True):
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(b.grad, a.grad, atol=1e-9 * float(a.grad.abs().max()), rtol=1e-8)


# --- what is constant ----------------------------------------------------------------------------------------------


def test_tokens_behind_are_counted_from_the_first_edited_one():
    prompts, targets = torch.tensor([10, 3, 1]), torch.tensor([2, 2, 2])
    for positions, expected in {
        "l2": [2, 2, 1],  # paper's clip: a prompt of one token has one suffix token
        "f1+l2": [10, 3, 1],
        "decode": [1, 1, 1],
        "prompt": [10, 3, 1],
    }.items():
        assert tokens_behind(attached("llama", positions=positions), prompts, targets).tolist() == expected


def test_a_function_of_masks_is_asked():
    def third(prompt, target):
        return prompt & (prompt.cumsum(-1) == 3)

    reft = attached("llama", positions=third)
    assert tokens_behind(reft, torch.tensor([10, 2]), torch.tensor([1, 1])).tolist() == [8, 1]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"layers": [1, 2]}, 1),
        ({"layers": [1], "component": "block_input"}, 0),
        ({"layers": [2], "component": "attention_output"}, 1),
        ({"layers": [0], "component": "mlp_output"}, -1),
        ({"layers": [2], "component": "model.layers.{layer}.mlp.down_proj"}, 1),
        ({"layers": [2], "heads": ["lm_head"]}, 2),
        ({"layers": [2], "heads": ["model.layers.1.mlp"]}, 0),
        ({"layers": [2], "heads": ["model.layers.2.mlp"]}, 1),
        ({"layers": [2], "heads": ["model.norm"]}, -1),
        ({"layers": [2], "heads": ["model.embed_tokens"]}, -1),
    ],
    ids=str,
)
def test_the_last_constant_block_lies_below_every_site_and_every_trained_weight(settings, last):
    assert last_constant_block(attached("llama", positions="f1", **settings)) == last


def test_prefix_positions_in_all_layers_leave_nothing_constant(caplog):
    reft = attached("llama", positions="f2+l2", component="mlp_output")
    assert training_pass(reft, encoded(), causal=True) is None
    with caplog.at_level(logging.WARNING):
        assert training_pass(reft, encoded(), causal=True, limit=PLENTY) is None
    assert "nothing is kept" in caplog.text


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_and_baselines_train_plainly():
    reft = attached("llama", positions="l1")
    reft.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert training_pass(reft, encoded(), causal=True) is None
    assert training_pass(tiny.model("llama"), encoded(), causal=True) is None


def test_a_second_epoch_reads_what_the_first_computed():
    rows, reft = encoded(), attached("llama", positions="l2")
    run = training_pass(reft, rows, causal=True, limit=PLENTY)
    read = []
    reft.base_model.model.layers[0].register_forward_hook(
        lambda *call: read.append(call[2].shape[:2].numel())
    )
    train(reft, rows, run, steps=ROWS // BATCH)
    first, read[:] = sum(read), []
    train(reft, rows, run, steps=ROWS // BATCH)
    assert sum(read) == sum(BATCH * (2 + b["input_ids"].shape[1] - b["boundary"]) for b in batches(rows, 3))
    assert sum(read) < first / 2


def test_a_second_epoch_runs_no_block_below_the_site():
    rows, reft = encoded(), attached("llama", positions="f2+l2", layers=[1])
    run = training_pass(reft, rows, causal=True, limit=PLENTY)
    train(reft, rows, run, steps=3)
    read = []
    for layer, block in enumerate(reft.base_model.model.layers):
        block.self_attn.register_forward_hook(lambda *call, layer=layer: read.append(layer))
    train(reft, rows, run, steps=3)
    assert read == [2, 2, 2]


def test_the_model_itself_is_as_before():
    rows, reft = encoded(), attached("llama", positions="f2+l2", layers=[1])
    inputs = {k: v for k, v in batches(rows, 1)[0].items() if k not in ("rows", "boundary")}
    before = reft(**inputs).logits
    run = training_pass(reft, rows, causal=True, limit=PLENTY)
    train(attached("llama", positions="f2+l2", layers=[1]), rows, run, steps=3)
    torch.testing.assert_close(reft(**inputs).logits, before, atol=0, rtol=0)
    assert not any("forward" in vars(module) for module in reft.base_model.modules())


def test_a_model_whose_blocks_know_each_other_is_trained_plainly(caplog):
    def spoilt():
        reft = attached("llama", positions="f2+l2", layers=[1])
        layers, seen = reft.base_model.model.layers, {}
        layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.update(said=output[0]))
        layers[2].mlp.register_forward_hook(lambda module, args, output: output + seen.pop("said", 0))
        return reft

    plain, short, rows = spoilt(), spoilt(), encoded()
    run = training_pass(short, rows, causal=True, limit=PLENTY)
    with caplog.at_level(logging.WARNING):
        losses = train(short, rows, run, steps=4)[0]
    assert "gives other logits when computing the output of block 1 apart" in caplog.text
    torch.testing.assert_close(losses, train(plain, rows, steps=4)[0], atol=0, rtol=0)


def test_batches_too_short_to_split_do_not_stand_for_the_others(caplog):
    def spoilt():
        reft = attached("llama", positions="l2")

        def mixed(module, args, output):  # each column reads those behind it, too
            return output + output.mean(1, keepdim=True)

        reft.base_model.model.layers[0].mlp.register_forward_hook(mixed)
        return reft

    rows = encoded(4, shortest=2)
    long = encoded(4, seed=2)
    rows = Rows([*(replace(row, prompt_ids=row.prompt_ids[:6]) for row in rows), *long])
    run = training_pass(spoilt(), rows, causal=True)
    for numbers in (range(4), range(4, 8)):
        batch = target_only(Collator(tiny.PAD)([rows[i] for i in numbers]))
        boundary, _ = batch.pop("boundary"), batch.pop("rows")
        with caplog.at_level(logging.WARNING):
            run(batch, numbers, boundary)
        assert ("not so in training" in caplog.text) == (numbers[0] == 4)


def test_an_input_far_down_is_not_kept_in_place_of_a_prefix():
    reft = attached("llama", positions="l2", layers=[0, 1, 2])
    assert type(training_pass(reft, encoded(), causal=True, limit=40_000).part) is ConstantPrefix


# --- what is kept --------------------------------------------------------------------------------------------------


def test_a_later_run_reads_the_disk_and_another_model_or_data_does_not(tmp_path):
    def folders():
        return {path.parent.name for path in tmp_path.glob(f"*/{row_store.ABOUT}")}

    def run(reft, rows=None, **settings):
        before, rows = folders(), rows or encoded()
        short = training_pass(reft, rows, causal=True, limit=PLENTY, folder=tmp_path, **settings)
        known = sum(short.part.kept.has(row) for row in range(len(rows)))
        train(reft, rows, short, steps=3)
        return len(folders() - before), known

    assert run(attached("llama", positions="l2")) == (1, 0)
    assert run(attached("llama", positions="l2")) == (0, ROWS)
    shaken_up = attached("llama", positions="l2")
    shaken(shaken_up.interventions)
    assert run(shaken_up) == (0, ROWS)  # interventions have no part in it
    assert run(attached("llama", positions="l2"), encoded(seed=1)) == (1, 0)
    assert run(attached("llama", positions="l3")) == (1, 0)
    assert run(attached("llama", torch.float32, positions="l2")) == (1, 0)
    assert run(attached("llama", positions="l2"), compiled=True) == (1, 0)
    assert run(attached("llama", positions="l2"), precision="16-mixed") == (1, 0)
    other = attached("llama", positions="l2")
    other.base_model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-6
    assert run(other) == (1, 0)


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_with_kept_inputs_reports_what_a_plain_one_does(tmp_path, caplog):
    data = short_runs.write_rows(tmp_path / "data")
    layers = ["intervention.layers=[1]", "test=false"]
    plain = short_runs.run(data, tmp_path / "plain", *layers)
    with caplog.at_level(logging.INFO):
        keeping = short_runs.run(data, tmp_path / "kept", *layers, "kept.limit_gb=0.1")
    assert "keeps the output of block 1 of 18 of 18 rows" in caplog.text
    assert plain["config_hash"] == keeping["config_hash"]
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("plain", "kept")]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("settings", [["intervention.positions=l2"], ["intervention.layers=[1]"]], ids=str)
def test_mixed_precision_keeps_what_the_base_says_in_its_own(tmp_path, caplog, settings):
    data = short_runs.write_rows(tmp_path / "data")
    mixed = [*settings, "test=false", "trainer.precision=bf16-mixed"]
    with caplog.at_level(logging.INFO):
        for name, more in (("plain", []), ("kept", ["kept.limit_gb=0.1"])):
            short_runs.run(data, tmp_path / name, *mixed, *more)
    assert "18 of 18 rows" in caplog.text
    assert "not so in training" not in caplog.text
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("plain", "kept")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_split_run_resumes_exactly(tmp_path, monkeypatch):
    data = short_runs.write_rows(tmp_path / "data")
    settings = ["intervention.positions=l2", "test=false", "checkpoint.every_n_steps=2"]
    short_runs.run(data, tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        short_runs.stop_at(patch, 7)
        with pytest.raises(short_runs.Stop):
            short_runs.run(data, tmp_path / "parts", *settings)
    short_runs.run(data, tmp_path / "parts", *settings, f"resume={tmp_path / 'parts'}", "kept.limit_gb=1")
    a, b = (short_runs.logged(tmp_path / name, "train/loss") for name in ("whole", "parts"))
    assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "block"),
    [(["intervention=none"], 1), (["intervention=lobireft", "intervention.layers=[1]"], 1),
     (["intervention.layers=[1]", "intervention.component=mlp_output"], 0)],
    ids=str,
)  # fmt: skip
def test_a_classifier_keeps_what_lies_below_its_head_or_its_lowest_site(tmp_path, caplog, overrides, block):
    rows = Path(__file__).parents[1] / "fixtures" / "glue"
    settings = [
        "model=tiny_random", "model.config.model_type=bert", "model.config.num_hidden_layers=2", "data=glue_rte",
        "data.source=local", f"data.path={rows}", "data.batch_size=4", "intervention.positions=f3",
        "intervention.rank=1", "trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "test=false", *overrides,
    ]  # fmt: skip
    losses = []
    with caplog.at_level(logging.INFO):
        for name, more in (
            ("plain", []),
            ("kept", ["kept.limit_gb=0.1", f"kept.folder={tmp_path / 'cache'}"]),
        ):
            experiment.run(compose.compose([*settings, *more]), tmp_path / name)
            losses.append(short_runs.logged(tmp_path / name, "train/loss"))
    assert f"keeps the output of block {block} of" in caplog.text
    assert "not so in training" not in caplog.text
    assert len(losses[0]) >= 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kept.limit_gb=-1"], "kept.limit_gb must be a number"),
        (["kept.limit_gb=inf"], "kept.limit_gb must be a number"),
        (["kept.folder=cache"], "kept.folder=cache keeps nothing"),
        (["kept.limit_gb=1", "kept.folder=/proc/none"], "cannot be written"),
        (["kept.limit_gb=1", "model.base_dropout=true"], "leaves nothing the same"),
        (["kept.limit_gb=1", "model.gradient_checkpointing=true"], "computes all of it again"),
        (["kept.limit_gb=1", "intervention.beside=peft/lora"], "trains weights of all layers"),
    ],
    ids=str,
)
def test_settings_that_keep_nothing_are_refused(tmp_path, overrides, message):
    with pytest.raises(SetupError, match=message):
        short_runs.run(short_runs.write_rows(tmp_path / "data"), tmp_path / "run", *overrides)

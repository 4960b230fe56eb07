"""The frozen part of a training pass: the same losses and gradients as the plain pass, kept and never stale."""

import logging
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import short_runs
import tiny
import torch
from adapted_models import adapted
from laws import shaken
from training_passes import BATCH, ROWS, Rows, assert_same_training, attached, batches, encoded, train
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import reft_lightning as rl
from reft_lightning.base_models.caches import CACHE
from reft_lightning.config import compose
from reft_lightning.data.encoding import Collator, target_only
from reft_lightning.runs import experiment
from reft_lightning.runs.experiment import SetupError
from reft_lightning.speed.choose_part import ShortenedPass, choose_part
from reft_lightning.speed.frozen_part import FrozenBlocks, FrozenPrefix, last_frozen_block, suffix_lengths

PLENTY = 10**8
SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 20}
# positions, layers, limit (of float64) -> what is left out
CASES = {
    "a split prefix": ("l2", "all", 0, FrozenPrefix),
    "a kept prefix": ("l2", "all", PLENTY, FrozenPrefix),
    "a prefix before the target": ("decode:1", [0, 2], PLENTY, FrozenPrefix),
    "a prefix that does not fit": ("l2", "all", 10_000, FrozenPrefix),
    "blocks that fit where the prefix does not": ("l1", [2], 50_000, FrozenBlocks),
    "the blocks up to the last": ("f2+l2", [2], PLENTY, FrozenBlocks),
    "the lower blocks": ("f2+l2", [1], PLENTY, FrozenBlocks),
}


def short(reft, rows, limit=0):
    return ShortenedPass(reft, rows, causal=True, limit=limit)


def compare(family, case, steps, dtype=torch.float64, tolerance=1e-10, **settings):
    positions, layers, limit, part = CASES[case]
    rows = encoded()
    settings |= {"positions": positions, "layers": layers}
    plain, shortened = (attached(family, dtype, **settings) for _ in range(2))
    run = short(shortened, rows, limit * dtype.itemsize // 8)
    assert_same_training(plain, shortened, run, rows, steps, tolerance)
    assert type(run.part) is part  # not refused, which would be the plain pass


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_eight_epochs_give_the_losses_and_gradients_of_the_plain_pass(case):
    compare("llama", case, steps=8 * ROWS // BATCH)


@pytest.mark.parametrize("case", ["a kept prefix", "the blocks up to the last"])
def test_the_same_in_float32(case):
    compare("llama", case, steps=12, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon"])
@pytest.mark.parametrize("case", ["a kept prefix", "the blocks up to the last"])
def test_other_architectures_give_the_same(family, case):
    # Falcon and OPT compute some of their norms in float32
    compare(family, case, steps=6, tolerance=2e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_sliding_window_is_split_and_its_layers_are_kept_instead_of_its_prefixes(family):
    rows = encoded()
    compare(family, "a split prefix", steps=6, tolerance=2e-6)
    reft = attached(family, positions="l2", layers=[1])
    assert isinstance(choose_part(reft, rows, causal=True, limit=PLENTY), FrozenBlocks)


@pytest.mark.parametrize("case", ["a kept prefix", "the blocks up to the last"])
@pytest.mark.parametrize(
    "settings", [{"dropout": 0.5}, {"tied": "group", "component": "mlp_output"}], ids=str
)
def test_dropout_tying_and_components_change_nothing(case, settings):
    compare("llama", case, steps=6, **settings)


def test_prompts_too_short_for_their_positions_are_as_in_the_plain_pass():
    rows = encoded(shortest=1)
    plain, shortened = (attached("llama", positions="l9") for _ in range(2))
    run = short(shortened, rows, PLENTY)
    expected, losses = train(plain, rows, steps=12)[0], train(shortened, rows, run, steps=12)[0]
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-10)


def test_a_bfloat16_base_gives_nearly_the_same():
    compare("llama", "a kept prefix", steps=4, dtype=torch.bfloat16, tolerance=0.1)


@pytest.mark.parametrize(
    ("head", "positions", "layers", "tied", "limit", "part"),
    [
        ("lm_head", "l2", "all", False, PLENTY, FrozenPrefix),
        ("lm_head", "l2", "all", True, PLENTY, None),  # it is the embeddings, too
        ("lm_head", "f2+l2", [2], False, PLENTY, FrozenBlocks),
        ("model.layers.1.mlp", "l2", "all", False, 0, None),
        ("model.layers.2.mlp", "f2+l2", [2], False, PLENTY, FrozenBlocks),
        ("model.embed_tokens", "l2", "all", False, PLENTY, None),
    ],
)
def test_trained_weights_of_the_base_get_their_whole_gradients(head, positions, layers, tied, limit, part):
    rows, models = encoded(), []
    for _ in range(2):
        base = tiny.model("llama", torch.float64)
        if tied:
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.model.embed_tokens.weight
        torch.manual_seed(0)
        reft = rl.attach(base, "loreft", rank=2, positions=positions, layers=layers, heads=[head])
        models.append(reft.to(torch.float64).train())
    run = short(models[1], rows, limit)
    plain, losses = train(models[0], rows)[0], train(models[1], rows, run)[0]
    assert (run.part and type(run.part)) is part
    torch.testing.assert_close(losses, plain, atol=0, rtol=1e-10)
    for a, b in zip(*(m.parameter_roles()["head"] for m in models), strict=True):
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(b.grad, a.grad, atol=1e-9 * float(a.grad.abs().max()), rtol=1e-8)


# --- what is frozen ------------------------------------------------------------------------------------------------


def test_a_suffix_begins_with_the_first_edited_token():
    prompts, targets = torch.tensor([10, 3, 1]), torch.tensor([2, 2, 2])
    for positions, expected in {
        "l2": [2, 2, 1],  # paper's clip: a prompt of one token has one suffix token
        "f1+l2": [10, 3, 1],
        "decode": [1, 1, 1],
        "prompt": [10, 3, 1],
    }.items():
        assert suffix_lengths(attached("llama", positions=positions), prompts, targets).tolist() == expected


def test_positions_may_be_a_function_of_masks():
    def third(prompt, target):
        return prompt & (prompt.cumsum(-1) == 3)

    reft = attached("llama", positions=third)
    assert suffix_lengths(reft, torch.tensor([10, 2]), torch.tensor([1, 1])).tolist() == [8, 1]


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
def test_the_last_frozen_block_lies_below_every_site_and_every_trained_weight(settings, last):
    assert last_frozen_block(attached("llama", positions="f1", **settings)) == last


def test_prefix_positions_in_all_layers_leave_nothing_frozen(caplog):
    reft = attached("llama", positions="f2+l2", component="mlp_output")
    assert choose_part(reft, encoded(), causal=True) is None
    with caplog.at_level(logging.WARNING):
        assert choose_part(reft, encoded(), causal=True, limit=PLENTY) is None
    assert "kept.limit_gb has no effect: almost every layer" in caplog.text


BOTH_WAYS = {"use_bidirectional_attention": True}


@pytest.mark.parametrize(
    ("auto", "name", "own", "method", "reason"),
    [
        (AutoModelForCausalLM, "llama", {}, "reft_r1", "ReFTr1 needs whole prompts"),
        (
            AutoModelForCausalLM,
            "mistral",
            {},
            "direft",
            "prefixes are not kept: a sliding-window cache",
        ),
        (AutoModelForSeq2SeqLM, "t5", {}, "direft", "an encoder and a decoder read different texts"),
        (
            AutoModelForCausalLM,
            "gemma3_text",
            BOTH_WAYS,
            "direft",
            "tokens before it attend to those after it",
        ),
        (
            AutoModelForCausalLM,
            "mamba",
            {},
            "direft",
            "the cache of MambaForCausalLM holds more than keys and values",
        ),
    ],
)
def test_what_a_model_or_a_method_does_not_allow_is_said(auto, name, own, method, reason, caplog):
    base = architectures.build(auto, CONFIG_MAPPING[name], **own)
    settings = {} if method == "reft_r1" else {"rank": 2}
    reft = rl.attach(base, method, positions="l2", **settings)
    with caplog.at_level(logging.INFO, "reft_lightning"):
        assert not isinstance(choose_part(reft, encoded(), causal=True, limit=PLENTY), FrozenPrefix)
    assert reason in caplog.text


def test_a_limit_that_is_too_low_is_named_with_what_is_needed(caplog):
    with caplog.at_level(logging.WARNING):
        choose_part(attached("llama", positions="l2"), encoded(), causal=True, limit=10_000)
    assert "has no effect: the keys and values of prefixes of all rows would take" in caplog.text


def test_checkpointing_and_other_methods_train_plainly():
    reft = attached("llama", positions="l1")
    reft.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert choose_part(reft, encoded(), causal=True) is None
    assert choose_part(adapted("llama", "peft/lora"), encoded(), causal=True) is None


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_nothing_is_frozen_where_a_longer_batch_rotates_by_other_angles(rope):
    reft = attached("llama", positions="l1")
    reft.base_model.config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4}
    assert choose_part(reft, encoded(), causal=True, limit=PLENTY) is None


def test_a_second_epoch_does_not_run_the_prefix():
    rows, reft = encoded(), attached("llama", positions="l2")
    run = short(reft, rows, PLENTY)
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
    run = short(reft, rows, PLENTY)
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
    run = short(reft, rows, PLENTY)
    train(attached("llama", positions="f2+l2", layers=[1]), rows, run, steps=3)
    torch.testing.assert_close(reft(**inputs).logits, before, atol=0, rtol=0)
    assert not any("forward" in vars(module) for module in reft.base_model.modules())


# --- plain, with one warning -----------------------------------------------------------------------------------------


def refused(spoil, layers="all", positions="l2", limit=0):
    """Train a spoilt model plainly and with a shortened pass: the same bits, and no part in the end."""
    rows = encoded()
    plain, shortened = (attached("llama", positions=positions, layers=layers) for _ in range(2))
    for reft in (plain, shortened):
        spoil(reft.base_model)
    run = short(shortened, rows, limit)
    losses, gradients = train(shortened, rows, run, steps=4)
    expected, others = train(plain, rows, steps=4)
    assert run.part is None
    assert torch.equal(losses, expected)
    assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))


def test_a_model_whose_blocks_know_each_other_is_trained_plainly(caplog):
    def spoil(base):
        layers, seen = base.model.layers, {}
        layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.update(said=output[0]))
        layers[2].mlp.register_forward_hook(lambda module, args, output: output + seen.pop("said", 0))

    refused(spoil, layers=[1], positions="f2+l2", limit=PLENTY)
    assert "computing the output of block 1 separately changes the logits" in caplog.text
    assert caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("where", ["as it is chosen", "on its first batch"])
def test_a_part_that_raises_is_refused(where, caplog):
    def spoil(base):
        def check(module, args, kwargs, output):
            columns = kwargs["input_ids"].shape[1]
            if columns == 2 if where == "as it is chosen" else kwargs.get(CACHE) is not None:
                raise RuntimeError("no cache here")

        base.model.register_forward_hook(check, with_kwargs=True)

    refused(spoil)
    assert "no cache here" in caplog.text
    assert caplog.text.count("WARNING") == 1


def test_a_longer_batch_than_those_tested_is_tested_too(caplog):
    reft = attached("llama", positions="l2")
    rows = Rows([*encoded(4, shortest=12), *encoded(4, seed=2, shortest=12)])
    rows = Rows([*(replace(row, prompt_ids=row.prompt_ids[:12], target_ids=row.target_ids[:1]) for row in rows[:4]),
                 *rows[4:]])  # fmt: skip
    longest = max(len(row) for row in rows[:4])

    def stretch(
        module, args, output
    ):  # longer texts are read otherwise in every column, as with dynamic RoPE
        return output * (2 if output.shape[1] > longest else 1)

    reft.base_model.model.embed_tokens.register_forward_hook(stretch)
    run = short(reft, rows)
    for numbers in (range(4), range(4, 8)):
        batch = target_only(Collator(tiny.PAD)([rows[i] for i in numbers]))
        boundary, _ = batch.pop("boundary"), batch.pop("rows")
        torch.testing.assert_close(run(batch, numbers, boundary).loss, reft(**batch).loss, atol=0, rtol=1e-9)
        assert ("falling back to the plain pass" in caplog.text) == (numbers[0] == 4)


def architecture(name, **own):
    return architectures.build(AutoModelForCausalLM, CONFIG_MAPPING[name], **own)


RAISING = [
    ("mamba", {}, {"positions": "l1"}, 0),
    ("mamba", {}, {"positions": "l1", "layers": [2]}, PLENTY),
    ("mixtral", {"output_router_logits": True}, {"positions": "l1"}, 0),
    ("gemma3n_text", {}, {"positions": "l1", "component": "mlp_output", "layers": [3]}, PLENTY),
    ("gemma4_text", SHARED, {"positions": "f2+l1", "layers": [1]}, PLENTY),
    ("gemma4_text", SHARED, {"positions": "l1", "layers": [0, 1]}, 0),
    ("qwen3_next", {}, {"positions": "l1"}, 0),
    ("llama", {"rope_parameters": DYNAMIC}, {"positions": "f1", "layers": [2]}, PLENTY),
    ("gemma3_text", {"use_bidirectional_attention": True}, {"positions": "l1"}, 0),
]


@pytest.mark.parametrize(("name", "own", "settings", "limit"), RAISING)
def test_architectures_that_cannot_be_shortened_have_the_losses_of_the_plain_pass(
    name, own, settings, limit, caplog
):
    rows, found, base = encoded(), [], architecture(name, **own)
    for shortened in (False, True):
        torch.manual_seed(0)
        reft = rl.attach(tiny.copied(base), "loreft", rank=2, **settings).train()
        shaken(reft.interventions)
        run = short(reft, rows, limit) if shortened else None
        losses = []
        for batch in batches(rows, 6):
            inputs = target_only(batch)
            boundary, numbers = inputs.pop("boundary"), inputs.pop("rows")
            output = run(inputs, numbers.tolist(), boundary) if run else reft(**inputs)
            output.loss.backward()
            losses.append(output.loss.detach())
        found.append((torch.stack(losses), [p.grad for p in reft.interventions.parameters()]))
    (expected, gradients), (losses, others) = found
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)
    assert caplog.text.count("falling back to the plain pass") <= 1


class Classified(list):
    lengths = property(lambda self: [len(row) for row in self])


@pytest.mark.parametrize("name", ["convbert", "bert"])
def test_blocks_that_read_their_padding_are_not_kept(name, caplog):
    """ConvBERT's convolutions reach into the padding, which is another one when rows are shuffled."""
    base = architectures.build(AutoModelForSequenceClassification, CONFIG_MAPPING[name])
    reft = rl.attach(base, "loreft", rank=2, positions="f1", layers=[2]).train()
    rows = Classified([[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]])
    run = ShortenedPass(reft, rows, causal=False, limit=PLENTY)
    for numbers in ([0, 2], [1, 2]):  # row 2 has another padding
        texts = [torch.tensor(rows[i]) for i in numbers]
        batch = {**tiny.padded(texts), "labels": torch.tensor([0, 1])}
        torch.testing.assert_close(run(batch, numbers).loss, reft(**batch).loss, atol=0, rtol=1e-4)
    assert ("depend on the padding" in caplog.text) == (name == "convbert")


def test_a_loss_of_routers_is_compared_too(caplog):
    """The logits are those of the plain pass, but the routers of the blocks left out are missing in the loss."""
    base = architecture("mixtral", output_router_logits=True)
    reft = rl.attach(base, "loreft", rank=2, positions="f1", layers=[2])
    rows = encoded()
    run = short(reft, rows, PLENTY)
    batch = target_only(batches(rows, 1)[0])
    boundary, numbers = batch.pop("boundary"), batch.pop("rows")
    run(batch, numbers.tolist(), boundary)
    assert run.part is None
    assert "separately changes the aux_loss by" in caplog.text


def test_batches_too_short_to_split_do_not_stand_for_the_others(caplog):
    reft = attached("llama", positions="l2")
    # each column reads those after it, too
    reft.base_model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output + output.mean(1, keepdim=True)
    )
    rows = encoded(4, shortest=2)
    rows = Rows([*(replace(row, prompt_ids=row.prompt_ids[:6]) for row in rows), *encoded(4, seed=2)])
    run = short(reft, rows)
    for numbers in (range(4), range(4, 8)):
        batch = target_only(Collator(tiny.PAD)([rows[i] for i in numbers]))
        boundary, _ = batch.pop("boundary"), batch.pop("rows")
        run(batch, numbers, boundary)
        assert ("falling back to the plain pass" in caplog.text) == (numbers[0] == 4)


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_with_kept_inputs_reports_what_a_plain_one_does(tmp_path, caplog):
    data = short_runs.write_rows(tmp_path / "data")
    layers = ["intervention.layers=[1]", "test=false", "data.validation_size=0"]
    plain = short_runs.run(data, tmp_path / "plain", *layers)
    with caplog.at_level(logging.INFO):
        keeping = short_runs.run(data, tmp_path / "kept", *layers, "kept.limit_gb=0.1")
    assert "keeping the output of block 1 of 24 rows" in caplog.text
    assert plain["config_hash"] == keeping["config_hash"]
    losses = [short_runs.logged(tmp_path / name, "train/loss") for name in ("plain", "kept")]
    assert len(losses[0]) == 16
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("settings", [["intervention.positions=l2"], ["intervention.layers=[1]"]], ids=str)
def test_mixed_precision_keeps_outputs_of_the_base_in_its_own(tmp_path, caplog, settings):
    data = short_runs.write_rows(tmp_path / "data", train=12)
    mixed = [*settings, "test=false", "data.validation_size=0", "trainer.precision=bf16-mixed"]
    with caplog.at_level(logging.INFO):
        for name, more in (("plain", []), ("kept", ["kept.limit_gb=0.1"])):
            short_runs.run(data, tmp_path / name, *mixed, *more)
    assert "of 12 rows" in caplog.text
    assert "falling back" not in caplog.text
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
    [(["intervention=none"], 1), (["intervention.layers=[1]", "intervention.component=mlp_output"], 0)],
    ids=str,
)  # fmt: skip
def test_a_classifier_keeps_what_lies_below_its_head_or_its_lowest_site(tmp_path, caplog, overrides, block):
    rows = Path(__file__).parents[1] / "fixtures" / "glue"
    settings = [
        "model=tiny_random", "model.config.model_type=bert", "model.config.num_hidden_layers=2", "data=glue_rte",
        "data.source=local", f"data.path='{rows}'", "data.batch_size=4", "intervention.positions=f3",
        "intervention.rank=1", "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "test=false", *overrides,
    ]  # fmt: skip
    losses = []
    with caplog.at_level(logging.INFO):
        for name, more in (("plain", []), ("kept", ["kept.limit_gb=0.1"])):
            experiment.run(compose.compose([*settings, *more]), tmp_path / name)
            losses.append(short_runs.logged(tmp_path / name, "train/loss"))
    assert f"keeping the output of block {block} of" in caplog.text
    assert "falling back" not in caplog.text
    assert len(losses[0]) >= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kept.limit_gb=1", "model.base_dropout=true"], "changes every activation"),
        (["kept.limit_gb=1", "model.gradient_checkpointing=true"], "recomputes them all"),
        (["kept.limit_gb=1", "intervention.beside=peft/lora"], "trains weights of all layers"),
    ],
    ids=str,
)
def test_settings_that_keep_nothing_are_refused(tmp_path, overrides, message):
    with pytest.raises(SetupError, match=message):
        short_runs.run(short_runs.write_rows(tmp_path / "data"), tmp_path / "run", *overrides)

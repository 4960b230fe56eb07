"""The planned cost of a run, estimated without weights, against its actual cost."""

import json
import sys

import pytest
import short_runs
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from reft_lightning import cli
from reft_lightning.adapters.adapt import adapt
from reft_lightning.base_models.loading import load_base_model
from reft_lightning.config import compose
from reft_lightning.inspection.gpus import GPU
from reft_lightning.inspection.plan import on_gpu, plan
from reft_lightning.runs.build import outline, prepare

EAGER = "model.attn_implementation=eager"
CLASSIFIER = [
    "model=tiny_random",
    "model.config.model_type=bert",
    "data=glue_stsb",
    "intervention.positions=f3",
]
LORA = ["intervention=peft/lora", "intervention.options.r=2"]
METHODS = {
    "loreft": [],
    "bias": ["intervention=bias", "intervention.rank=null"],
    "reft_r1": ["intervention=reft_r1"],
    "position": ["intervention.tied=position", "intervention=direft"],
    "lora": LORA,
    "full": ["intervention=full"],
    "joint": ["intervention.beside=peft/lora", "+intervention.beside_options.r=2"],
    "prefix": ["intervention=peft/prefix_tuning", "intervention.options.num_virtual_tokens=4"],
}


def config(data, *overrides):
    other = any(text.startswith("intervention=") for text in overrides)
    settings = short_runs.without_interventions(data) if other else short_runs.arguments(data)
    return compose.compose([*settings, *overrides])


def measured(settings):
    """Return FLOPs forward and backward, and saved bytes, of a real step on the largest batch."""
    from reft_lightning.runs.experiment import build

    objects = build(settings)
    objects.module.training_pass = None
    objects.module.log = lambda *_: None  # without a trainer
    rows, loader = objects.data.train_rows, objects.data.train_dataloader()
    largest = max(loader.batch_sampler, key=lambda batch: len(batch) * max(rows.lengths[i] for i in batch))
    base = objects.model.base_model
    constant = {StorageWeakRef(t.untyped_storage()) for t in (*base.parameters(), *base.buffers())}
    saved = {}

    def pack(tensor):
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objects.module.loss_of(loader.collate_fn([rows[i] for i in largest]))
        forward = counter.get_total_flops()
        loss.backward()
    kept = sum(size for ref, size in saved.items() if ref not in constant)
    return forward, counter.get_total_flops() - forward, kept


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_a_real_step_and_saved_bytes_within_a_percent(data, method):
    if method in ("lora", "joint", "prefix"):
        pytest.importorskip("peft")
    settings = config(data, EAGER, *METHODS[method])
    cost = plan(settings)["batches"]["largest"]
    forward, backward, saved = measured(settings)
    assert (cost["forward_flops"], cost["backward_flops"]) == (forward, backward)
    assert cost["saved_bytes"] == pytest.approx(saved, rel=0.01)


def test_fused_attention_saves_what_it_saves_on_this_machine(data):
    cost = plan(config(data))["batches"]["largest"]
    assert cost["saved_bytes"] == pytest.approx(measured(config(data))[2], rel=0.01)


def test_the_flops_of_a_frozen_base_are_those_of_the_formula(data):
    cost = plan(config(data, "model.config.num_key_value_heads=4"), prompt=20, target=3)["batches"]["given"]
    rows, s, d, wide, layers, words = 3, 23, 32, 64, 2, 259
    maps = 4 * d * d + 3 * d * wide
    # logits of target and column before
    expected = 2 * rows * (layers * (s * maps + 2 * s * s * d) + 4 * d * words)
    assert cost["base_forward_flops"] == expected


def test_parameters_file_and_edited_tokens_are_those_of_the_run(data, tmp_path):
    found = plan(config(data))
    results = short_runs.run(data, tmp_path, "test=false", "trainer.max_epochs=1")
    assert found["trainable_parameters"] == results["trainable_parameters"]
    assert found["base_parameters"] == results["base_parameters"]
    assert found["adapter_bytes"] == (tmp_path / "adapter" / "reft.safetensors").stat().st_size
    assert found["epoch_batches"] == 6
    assert found["optimizer_steps"] == 12
    assert found["batches"]["median"]["edited_tokens_of_layer"] == {0: 12, 1: 12}  # f2+l2 of 3 rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_of_a_classifier_is_counted_as_it_is_trained(dtype, tmp_path):
    wanted = compose.compose([*CLASSIFIER, f"model.dtype={dtype}"])
    run = outline(wanted)
    adapt(load_base_model(**run.source)[0], **run.attached).save_pretrained(tmp_path)
    assert plan(wanted, prompt=12)["adapter_bytes"] == (tmp_path / "reft.safetensors").stat().st_size


TWO_TEXTS = {
    "t5": "model_type:t5,d_model:32,d_kv:8,d_ff:64,num_layers:2,num_heads:4",
    "bart": "model_type:bart,d_model:32,encoder_layers:2,decoder_layers:2,encoder_ffn_dim:64,decoder_ffn_dim:64,"
    "encoder_attention_heads:4,decoder_attention_heads:4",
}


@pytest.mark.parametrize(("model", "stack"), [("t5", "decoder"), ("bart", "encoder")])
def test_a_model_with_an_encoder_and_a_decoder_is_planned_as_it_runs(data, model, stack):
    settings = config(
        data, EAGER, "model.name=tiny_two", f"+model.config={{{TWO_TEXTS[model]}}}",
        f"intervention.component={stack}.block_output", "intervention.positions=all",
    )  # fmt: skip
    found = plan(settings)
    cost = found["batches"]["largest"]
    forward, backward, saved = measured(settings)
    assert (cost["forward_flops"], cost["backward_flops"]) == (forward, backward)
    assert cost["saved_bytes"] == pytest.approx(saved, rel=0.01)
    assert cost["edited_tokens"] > 0
    assert plan(settings, prompt=20, target=3)["batches"]["given"]["tokens"] == 3 * 23


def test_given_lengths_need_no_rows(tmp_path):
    missing = short_runs.arguments(tmp_path / "none")
    with pytest.raises((ValueError, OSError)):
        plan(compose.compose(missing))
    run = compose.compose([*missing, "intervention.positions=prompt"])
    short, long = (plan(run, prompt=n, target=2)["batches"]["given"] for n in (10, 20))
    assert (short["edited_tokens"], long["edited_tokens"]) == (2 * 3 * 10, 2 * 3 * 20)
    assert long["saved_bytes"] > 1.5 * short["saved_bytes"]


@pytest.mark.parametrize(("objective", "rows"), [("sft", 1), ("dpo", 2)])
def test_both_answers_of_a_pair_are_counted_and_further_passes_named(data, objective, rows):
    settings = config(data, f"objective={objective}")
    found, given = plan(settings), plan(settings, prompt=9)
    assert found["batches"]["largest"]["rows"] == given["batches"]["given"]["rows"] == 3 * rows
    assert [note.partition(":")[0] for note in found["notes"]] == ["objective DPO"] * (rows - 1)
    encoded = prepare(settings).data.train_rows
    parts = [encoded] if rows == 1 else [encoded.first, encoded.second]
    lengths = [len(row.prompt_ids) + len(row.target_ids) for part in parts for row in part]
    assert found["epoch_tokens"] == sum(lengths)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma3_text", "opt", "falcon"])
def test_other_decoders_are_planned(data, kind):
    found = plan(config(data, f"model.config.model_type={kind}"), prompt=9, target=2)
    cost = found["batches"]["given"]
    assert cost["base_forward_flops"] < cost["forward_flops"]
    assert cost["saved_bytes"] > 0
    assert bool(found["notes"]) == (kind == "falcon")


def test_a_classifier_is_planned():
    found = plan(compose.compose(CLASSIFIER), prompt=12)
    cost = found["batches"]["given"]
    assert cost["edited_tokens"] == 2 * 3 * cost["rows"]
    assert found["head_parameters"] > 0


def test_a_gpu_takes_as_long_as_its_products_or_as_reading_the_weights(data):
    half = config(data, "model.dtype=bfloat16", "trainer.accumulate_grad_batches=2")
    found = plan(half)
    cost = found["batches"]["median"]
    flops = cost["forward_flops"] + cost["backward_flops"]
    slow = GPU(memory=1e6, bandwidth=1e30, half=100.0, tf32=10.0, float32=1.0)
    on = on_gpu(found, half, slow)
    assert on["batch_seconds"] == flops / 100
    assert on["seconds"] == pytest.approx(found["optimizer_steps"] * 2 * flops / 100)
    assert on["bytes"] > found["base_bytes"] + cost["saved_bytes"]
    rates = {"matmul_precision=highest": 1, "matmul_precision=high": 10, "trainer.precision=bf16-mixed": 100}
    for more, rate in rates.items():
        whole = config(data, "model.dtype=float32", more)
        assert on_gpu(found, whole, slow)["batch_seconds"] == flops / rate
    reading = slow._replace(bandwidth=2.0, half=1e30)
    assert on_gpu(found, half, reading)["batch_seconds"] == found["base_bytes"]


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        (["trainer.devices=2"], 6),  # processes share the batches of an epoch
        (["trainer.devices=[0,1]", "trainer.num_nodes=2"], 4),
        (["trainer.devices=auto"], 12),
        (["trainer.max_steps=7"], 7),
        (["trainer.max_epochs=-1", "trainer.max_steps=400"], 400),
        (["trainer.max_epochs=null", "trainer.max_steps=400"], 400),
        (["trainer.max_epochs=null"], 6000),
        (["trainer.limit_train_batches=4"], 8),
        (["trainer.limit_train_batches=0.5", "trainer.accumulate_grad_batches=2"], 4),
        (["trainer.overfit_batches=3"], 6),
        (["trainer.fast_dev_run=2"], 2),
        (["trainer.max_epochs=-1", "trainer.max_time=00:00:10:00", "scheduler=constant"], None),
    ],
)
def test_steps_are_those_that_lightning_takes(data, trainer, steps):
    assert plan(config(data, *trainer)).get("optimizer_steps") == steps


@pytest.mark.parametrize("key", ["limit_train_batches", "fast_dev_run", "max_epochs", "max_steps"])
def test_what_lightning_refuses_is_a_value_error(data, key):
    with pytest.raises(ValueError, match=f"trainer: .*{key}"):
        plan(config(data, f"trainer.{key}=-2"))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (["trainer.limit_train_batches=0.1"], "limit_train_batches=0.1 of 6 batches is less than one"),
        (["trainer.limit_train_batches=0.1", "trainer.devices=2"], "0.1 of 3 batches is less than one"),
        (["trainer.limit_val_batches=0.1"], "limit_val_batches=0.1 of 2 batches is less than one"),
        (["trainer.overfit_batches=0.1"], "overfit_batches=0.1 of 6 batches is less than one"),
        (["trainer.val_check_interval=50"], "val_check_interval=50 is more than the 6 batches"),
    ],
)
def test_batches_that_a_run_refuses_are_refused_in_its_plan(data, trainer, message):
    with pytest.raises(ValueError, match=message):
        plan(config(data, *trainer))


def test_steps_are_counted_inside_a_slurm_job(data, monkeypatch):
    for name, value in {"JOB_NAME": "train", "JOB_ID": "1", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert plan(config(data))["optimizer_steps"] == 12


def command(monkeypatch, *arguments):
    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", None)
    monkeypatch.setattr(sys, "argv", ["reft-inspect", "plan", *arguments])
    cli.inspect()


def test_the_command_shows_what_was_found(data, monkeypatch, capsys):
    command(
        monkeypatch, *short_runs.arguments(data), "intervention.rank=4", "gpu=a100_80gb", "trainer.devices=2"
    )
    said = capsys.readouterr().out
    assert "tiny_random, loreft: 520 trained parameters" in said  # 2 layers of 2 x 4 x 32 + 4
    for words in ("largest batch", "saved for the backward pass", "the adapter's file", "6 optimizer steps",
                  "each of 2 a100_80gb: at least"):  # fmt: skip
        assert words in said


def test_rows_with_pictures_are_planned_by_their_lengths(tmp_path):
    row = {"image": "1.png", "question": "colour?", "answers": "red"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    config = compose.compose(["model=tiny_vision", "data=vqa", f"data.path={tmp_path}"])
    with pytest.raises(ValueError, match="give row lengths instead, prompt=N target=N"):
        plan(config)
    assert plan(config, prompt=30)["batches"]["given"]["columns"] == 31


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=tiny_random", "data=bolq"], "did you mean 'data=boolq'?"),
        (["model=tiny_random", "data=boolq", "target=3"], "add prompt=N"),
        (["model=tiny_random", "data=boolq", "prompt=0"], "prompt must be an integer, at least 1"),
        (["data=boolq"], "no model was chosen"),
        (["model=tiny_random", "data=boolq", "prompt=9", "gpu=h10"], "did you mean 'h100'?"),
        (
            ["model=tiny_random", "model.config.model_type=bloom", "data=boolq", "prompt=9"],
            "does not run without",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(monkeypatch, capsys, arguments, expected):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, *arguments)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err

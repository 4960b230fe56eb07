"""PEFT's method comparison: the configurations that follow it, and the file of a run."""

import json
import runpy
import shutil

import pytest
from comparison_rows import gsm8k_row, metamath_row
from transformers import LlamaConfig

from reft_lightning.adapters.adapt import adapt, build_on_meta
from reft_lightning.config import compose
from reft_lightning.reporting.runs import read_runs
from reft_lightning.runs import experiment
from reft_lightning.runs.arguments import attachment

# The keys of method_comparison/MetaMathQA/results/lora--llama-3.2-3B-rank32.json of
# https://github.com/huggingface/peft at 5d602fdbff04 (Apache-2.0); all 63 result files there have them, apart from what
# stands inside peft_config, and weight_decay, which 42 have. [] are the entries of validations, [-1] that of the test.
KEYS = """
run_info created_at total_time experiment_name peft_branch train_config peft_config error_msg
run_info.train_config model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc
run_info.train_config query_template seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp
run_info.train_config autocast_adapter_dtype generation_kwargs attn_implementation init_kv_cache_prefix
run_info.train_config.optimizer_kwargs lr weight_decay
run_info.train_config.generation_kwargs max_length max_new_tokens
train_info accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th train_time file_size
train_info num_trainable_params num_total_params status metrics
train_info.metrics[] step,valid_accuracy,train_loss,train_samples,train_time,eval_time,tokens_/_sec
train_info.metrics[] mem_allocated_avg,mem_reserved_avg,elapsed_time
train_info.metrics[-1] step,test_accuracy,train_loss,train_samples,train_total_tokens,forgetting
meta_info model_info dataset_info package_info system_info pytorch_info
meta_info.model_info sha created_at
meta_info.dataset_info metamath gsm8k
meta_info.dataset_info.metamath sha created_at
meta_info.dataset_info.gsm8k sha created_at
meta_info.package_info transformers-version transformers-commit-hash peft-version peft-commit-hash datasets-version
meta_info.package_info datasets-commit-hash bitsandbytes-version bitsandbytes-commit-hash torch-version
meta_info.package_info torch-commit-hash
meta_info.system_info system release version machine processor accelerator
"""


def committed_keys():
    """Path of an object -> its keys."""
    found = {"": {"run_info", "train_info", "meta_info"}}
    for line in KEYS.strip().splitlines():
        path, *names = line.split()
        if "metrics[" in path:  # their names hold blanks
            names = [name.replace("_", " ") for name in names[0].split(",")]
        found.setdefault(path, set()).update(names)
    return found


def keys_of(values, path=""):
    """The same of a file."""
    found = {path: set(values)}
    for name, value in values.items():
        below = f"{path}.{name}" if path else name
        if isinstance(value, dict) and name != "peft_config":
            found |= keys_of(value, below)
        elif name == "metrics":
            for entry in value[:-1]:
                assert set(entry) == set(value[0])
                found[f"{below}[]"] = set(entry)
            found[f"{below}[-1]"] = set(value[-1])
    return found


# --- configurations -----------------------------------------------------------------------------------------------

# Llama-3.2-3B
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trained"), [("lora", 9_175_040), ("loreft", 28 * (2 * 8 * 3072 + 8))], ids=["lora", "loreft"]
)
def test_the_configurations_follow_the_protocol(name, trained):
    config = compose.compose([f"experiment=peft_comparison/{name}"])
    assert (config.model.name, config.model.dtype) == ("meta-llama/Llama-3.2-3B", "bfloat16")
    assert config.data.batch_size * config.trainer.max_steps == config.data.limit_train == 20_000
    assert (config.trainer.max_steps, config.trainer.val_check_interval) == (5000, 250)
    assert (config.data.eval_batch_size, config.data.max_length, config.data.validation_size) == (50, 768, 50)
    assert (config.scheduler._target_.rpartition(".")[2], config.scheduler.warmup_ratio) == ("cosine", 0.1)
    assert (config.trainer.gradient_clip_val, config.decoding.max_new_tokens) == (1.0, 300)
    assert (config.seed, config.data.split_seed, config.data.train_tasks) == (0, 0, ["metamathqa", "gsm8k"])
    assert not config.checkpoint.restore_best
    # num_trainable_params and num_total_params of lora--llama-3.2-3B-rank32.json
    count = adapt(build_on_meta(LLAMA), **attachment(config)).parameter_count()
    assert count.trainable == trained
    assert count.base == 3_221_924_864 - 9_175_040


# --- a run and its file -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "gsm8k").mkdir()
    (folder / "MetaMathQA-395K.json").write_text(json.dumps([metamath_row(i) for i in range(30)]))
    for split, count in (("train", 8), ("test", 5)):
        lines = (json.dumps(gsm8k_row(i, split)) + "\n" for i in range(count))
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(lines))
    return folder


def run(rows, folder, name, *overrides):
    """The experiment on a model and rows of seconds: 6 steps of 4 rows, validated each third."""
    config = compose.compose(
        [
            f"experiment=peft_comparison/{name}", "model=tiny_random", "trainer=default", "data.source=local",
            f"data.path={rows}", "data.validation_size=4", "data.limit_train=24", "trainer.max_steps=6",
            "trainer.val_check_interval=3", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
            "decoding.max_new_tokens=3", *overrides,
        ]
    )  # fmt: skip
    return experiment.run(config, folder, experiment=f"peft_comparison/{name}")


@pytest.fixture(scope="module")
def loreft(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loreft")
    return folder, run(rows, folder, "loreft")


@pytest.fixture(scope="module")
def schema(root):
    return runpy.run_path(str(root / "experiments" / "peft_comparison" / "schema.py"))


def test_a_run_is_written_in_the_schema_of_the_comparison(loreft, tmp_path, schema):
    folder, results = loreft
    path = tmp_path / "results" / "loreft--tiny.json"
    schema["main"]([str(folder), "--out", str(path), "--name", "loreft/tiny"])
    values = json.loads(path.read_text())
    assert keys_of(values) == committed_keys()
    said, trained = values["run_info"], values["train_info"]
    assert said["experiment_name"] == "loreft/tiny"
    assert (said["peft_config"]["peft_type"], said["peft_config"]["settings"]["rank"]) == ("LOREFT", 8)
    assert said["train_config"]["query_template"] == "Question: {query} Think step by step.\nAnswer:"
    assert said["train_config"]["optimizer_kwargs"] == {"lr": 9e-4, "weight_decay": 0.0}
    assert said["train_config"]["batch_size"] == 4
    assert (trained["num_trainable_params"], trained["status"]) == (2 * (2 * 8 * 32 + 8), "success")
    assert trained["num_total_params"] == results["base_parameters"] + results["trainable_parameters"]
    assert trained["file_size"] == (folder / "adapter" / "reft.safetensors").stat().st_size
    assert trained["accelerator_memory_max"] is None  # a run on a CPU
    validated, tested = trained["metrics"][:-1], trained["metrics"][-1]
    assert [(m["step"], m["train samples"]) for m in validated] == [(3, 12), (6, 24)]
    assert (tested["step"], tested["train samples"], tested["forgetting"]) == (6, 24, None)
    assert tested["test accuracy"] == results["metrics"]["test/accuracy"]
    assert tested["train total tokens"] == results["tokens"]
    assert tested["train loss"] == validated[-1]["train loss"]


def test_the_parts_of_its_time_add_up(loreft, schema):
    folder, results = loreft
    ((run_,), _, _) = read_runs([folder])
    values = schema["record"](run_)
    *validated, _ = values["train_info"]["metrics"]
    spent = sum(m["train time"] + m["eval time"] for m in validated)
    # an evaluation's time is an estimate, never below 0; what is left of the clock is training
    assert all(m["train time"] > 0 and m["eval time"] >= 0 and m["tokens / sec"] > 0 for m in validated)
    assert spent == pytest.approx(results["train_seconds"], rel=1e-9)
    assert validated[-1]["elapsed time"] == pytest.approx(results["train_seconds"], rel=1e-9)
    without = results["train_seconds"] - sum(m["eval time"] for m in validated)
    assert values["train_info"]["train_time"] == pytest.approx(without + results["seconds"]["test"], rel=1e-6)
    assert values["run_info"]["experiment_name"] == f"loreft/tiny_random-{results['config_hash'][:8]}"


def test_times_are_told_apart_on_a_clock_that_is_known(loreft, schema):
    folder, _ = loreft
    ((run_,), _, _) = read_runs([folder])
    # 2 s of starting, 1 s a step, 7 s of the first evaluation, 4 s of the last
    clock = [3.0, 4.0, 5.0, 13.0, 14.0, 15.0]

    class Timed(type(run_)):
        def curve(self, column):
            curves = {"progress/seconds": clock, "progress/tokens": [100.0 * (i + 1) for i in range(6)]}
            return list(enumerate(curves[column])) if column in curves else super().curve(column)

    values = schema["record"](Timed(folder, run_.config, {**run_.results, "train_seconds": 19.0}))
    *validated, _ = values["train_info"]["metrics"]
    assert [m["train time"] for m in validated] == pytest.approx([5.0, 3.0])
    assert [m["eval time"] for m in validated] == pytest.approx([7.0, 4.0])
    assert [m["elapsed time"] for m in validated] == pytest.approx([12.0, 19.0])
    assert [m["tokens / sec"] for m in validated] == pytest.approx([100.0, 100.0])


def test_lora_and_both_together_carry_pefts_own_configuration(rows, tmp_path, schema):
    run(rows, tmp_path / "lora", "lora", "trainer.max_steps=3")
    path = schema["main"]([str(tmp_path / "lora"), "--name", "lora/tiny"])
    assert path == tmp_path / "lora" / "lora--tiny.json"
    values = json.loads(path.read_text())
    assert keys_of(values) == committed_keys()
    said = values["run_info"]["peft_config"]
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 32, 64)
    assert values["meta_info"]["package_info"]["peft-version"].startswith("0.")
    assert values["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 1e-4, "weight_decay": 0.1}
    both = ["intervention.beside=peft/lora", "+intervention.beside_options.r=2", "trainer.max_steps=3"]
    run(rows, tmp_path / "both", "loreft", *both)
    values = json.loads(schema["main"]([str(tmp_path / "both")]).read_text())
    assert values["run_info"]["experiment_name"].startswith("loreft+lora/tiny_random-")
    said = values["run_info"]["peft_config"]
    assert (said["peft_type"], said["beside"]["r"]) == ("LOREFT + PEFT/LORA", 2)
    files = [
        tmp_path / "both/adapter" / name for name in ("reft.safetensors", "peft/adapter_model.safetensors")
    ]
    assert values["train_info"]["file_size"] == sum(file.stat().st_size for file in files)


def test_a_resumed_run_has_no_total_time(loreft, tmp_path, schema):
    folder = shutil.copytree(loreft[0], tmp_path / "run")
    (folder / "csv_2").mkdir()
    (folder / "csv_2" / "metrics.csv").write_text("step\n1\n")
    totals = [schema["record"](read_runs([f])[0][0])["run_info"]["total_time"] for f in (loreft[0], folder)]
    assert totals[0] is not None  # whole seconds, which may be none
    assert totals[1] is None


def test_what_is_no_run_of_the_comparison_is_refused(loreft, tmp_path, schema):
    folder, _ = loreft
    ((run_,), _, _) = read_runs([folder])
    other = type(run_)(folder, {**run_.config, "data.family": "gsm8k"}, run_.results)
    with pytest.raises(ValueError, match=r"is a run of the family gsm8k.*data=metamathqa"):
        schema["record"](other)
    untested = type(run_)(folder, run_.config, {**run_.results, "metrics": {"val/accuracy": 1.0}})
    with pytest.raises(ValueError, match="no test scores"):
        schema["record"](untested)
    with pytest.raises(ValueError, match=r"no results\.json"):
        schema["main"]([str(tmp_path)])


@pytest.mark.gpu
def test_a_run_on_a_gpu_reports_memory(rows, tmp_path, schema):
    run(rows, tmp_path, "loreft", "trainer.accelerator=gpu")
    values = json.loads(schema["main"]([str(tmp_path)]).read_text())["train_info"]
    names = ("accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th", "accelerator_memory_max")
    assert all(isinstance(values[name], int) and values[name] > 0 for name in names)
    assert all(m["mem allocated avg"] > 0 for m in values["metrics"][:-1])

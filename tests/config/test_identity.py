"""Whether two runs are the same run: for the hash, for resuming, for reports and for the paper's tables."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path

import pytest
from lightning import Callback

from reft_lightning.config.compose import compose
from reft_lightning.config.identity import config_hash, differences, identity
from reft_lightning.config.schema import WATCHING, keys

ROOT = Path(__file__).parents[2]
TINY = ["model=tiny_random", "data=boolq"]
LOCAL = ["data.source=local", "data.path=rows"]


def config(*overrides):
    return compose([*TINY, *overrides])


@pytest.mark.parametrize(
    "override",
    ["name=mine", "logger=wandb", "kept.limit_gb=1", "trainer.accelerator=cpu", "evaluate_base=true", "test=false",
     "data.eval_batch_size=7", "checkpoint.every_n_steps=3", "decoding.verify=false", "callbacks=edit_norms",
     "callbacks=device_stats", "callbacks=[edit_norms,device_stats]",
     "+callbacks.x={_target_:lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor,log_momentum:true}"],
)  # fmt: skip
def test_what_changes_no_result_does_not_identify_a_run(override):
    assert config_hash(config(override)) == config_hash(config())


@pytest.mark.parametrize(
    "override",
    ["seed=7", "optimizer.lr=1e-5", "intervention.rank=3", "data.limit_train=5", "model.dtype=bfloat16",
     "trainer.max_steps=3", "intervention=direft", "data.tasks=[piqa]", "checkpoint.monitor=val/loss",
     "model.config.hidden_size=64", "+callbacks.x._target_=mine.LearningRateMonitor",
     "+callbacks.x={_target_:lightning.pytorch.callbacks.StochasticWeightAveraging,swa_lrs:0.1}"],
)  # fmt: skip
def test_what_changes_a_result_does(override):
    assert config_hash(config(override)) != config_hash(config())


def test_two_seeds_of_one_experiment_differ_in_the_seed_only():
    one, other = config("kept.limit_gb=1"), config("seed=43")
    assert differences(one, other) == {"seed": (42, 43)}
    assert identity(one, seed=False) == identity(other, seed=False)


def test_paths_of_this_machine_never_identify_a_run(tmp_path, monkeypatch):
    here = config(*LOCAL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    there = config(*LOCAL)
    assert there.data.path == str(tmp_path / "rows")
    assert config_hash(here) == config_hash(there)
    one, same, other = (
        config(*LOCAL, f"data.mixture={file}") for file in ("a/m.json", "b/m.json", "a/n.json")
    )
    assert config_hash(one) == config_hash(same) != config_hash(other)


def test_what_a_hub_calls_a_place_does_identify_a_run():
    columns = ["model=tiny_random", "data=custom", "data.source=hub", "data.prompt=a", "data.target=b"]
    one, other = (compose([*columns, f"data.path=owner/{name}"]) for name in ("one", "other"))
    assert config_hash(one) != config_hash(other)


def test_a_key_that_is_younger_than_a_run_has_its_default():
    values = dataclasses.asdict(config())
    del values["optimizer"]["head_lr"], values["matmul_precision"]
    assert differences(values, config()) == {}


def test_every_key_that_identifies_no_run_is_known():
    dictionaries = {
        key for key, hint in keys().items() if dataclasses.is_dataclass(hint) or "dict" in str(hint)
    }
    marked = set(keys()) - dictionaries - set(identity(config()))
    assert {key for key in marked if not key.startswith("kept.")} == {
        "name", "overwrite", "resume", "trust_code", "test", "sealed", "evaluate_base", "option_likelihood", 
        "decoding.verify", "model.device_map",
        "data.eval_batch_size", "data.num_workers", "trainer.accelerator", "trainer.log_every_n_steps",
        "trainer.enable_progress_bar", "checkpoint.every_n_steps", "trainer.enable_model_summary", "trainer.benchmark",
        "trainer.profiler", "trainer.detect_anomaly", "trainer.default_root_dir", "trainer.enable_autolog_hparams",
        "trainer.model_registry",
    }  # fmt: skip


def test_only_places_of_files_that_exist_become_absolute(monkeypatch, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "mixture.json").touch()
    monkeypatch.chdir(tmp_path)
    found = config(
        *LOCAL,
        "data.mixture=mixture.json",
        "data.image_folder=rows",
        "model.source=local",
        "model.path=weights",
    )
    assert (found.data.path, found.data.mixture) == (str(tmp_path / "rows"), str(tmp_path / "mixture.json"))
    assert found.data.image_folder == str(tmp_path / "rows")
    assert (found.model.path, found.model.tokenizer) == ("weights", "bytes")


@pytest.mark.parametrize(
    "path", [f"{package}.{name}" for package, names in WATCHING.items() for name in names]
)
def test_callbacks_that_only_watch_exist(path):
    package, name = path.split(".")
    home = {
        "lightning": "lightning.pytorch.callbacks",
        "reft_lightning": "reft_lightning.inspection.edit_norms",
    }
    cls = getattr(importlib.import_module(home[package]), name)
    assert issubclass(cls, Callback)


def test_the_page_of_keys_says_which_identify_a_run():
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "hooks" / "generated.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    cells = [line.split(" | ") for line in page.keys().splitlines() if line.startswith("| `")]
    said = {key.strip("| `"): (word, default) for key, _, default, word, *_ in cells}
    assert said["data.path"][0] == "except local paths"
    assert said["callbacks"][0] == "except those that only watch"
    counted = identity(config()).keys()
    no = {key for key, (word, _) in said.items() if word == "no"}
    empty = {key for key, (_, default) in said.items() if default == "`{}`"}  # has no key by itself
    assert no - empty == said.keys() - counted - empty

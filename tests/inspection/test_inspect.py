"""Looking inside the adapter of a run: what the numbers must be, and what is refused."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import short_runs
import tiny
from rich.console import Console

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.config import compose
from reft_lightning.inspection import command
from reft_lightning.inspection.findings import NO_SUBSPACE
from reft_lightning.interventions import INTERVENTIONS
from reft_lightning.runs import experiment

TEXT = "a zorb is kept where a fenk was, and " * 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return short_runs.write_rows(tmp_path_factory.mktemp("rows"), tasks=("boolq", "piqa"))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "mine"
    short_runs.run(data, folder, "optimizer.lr=0.05", "evaluate_base=true", "test=false")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "kept.txt"
    path.write_text(TEXT)
    return path


def inspect(*folders, **options):
    """Inspect; return what was found and what was printed."""
    said = io.StringIO()
    found = command.main(folders, **options, console=Console(file=said, width=120))
    return found, said.getvalue()


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of inspecting a small model."""
    monkeypatch.setattr(command, "draw", lambda found, out: [])


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The adapter without its run, for which nothing is evaluated."""
    return shutil.copytree(folder / "adapter", tmp_path_factory.mktemp("adapter") / "alone")


def degrees(by_layer, what="angle"):
    return {layer: pair[what] for layer, pair in by_layer.items()}


@pytest.fixture(scope="module")
def found(folder, data, text):
    other = ["data=commonsense", "data.source=local", f"data.path='{data}'", "data.tasks=[piqa]"]
    return inspect(folder, text=text, forget=[*other, "data.validation_size=4"])


def test_the_scores_are_those_of_the_run(folder, found):
    metrics = short_runs.results(folder)["metrics"]
    scores = found[0]["scores"]
    for name in ("loss", "option_accuracy"):
        assert scores["adapted"][name] == metrics[f"val/{name}"]
        assert scores["base"][name] == metrics[f"base/val/{name}"]
    assert scores["adapted"]["loss"] != scores["base"]["loss"]


def test_strength_0_is_the_base_and_strength_1_the_adapter(found):
    curve = {point.pop("scale"): point for point in map(dict, found[0]["strength"])}
    assert list(curve) == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert curve[0] == found[0]["scores"]["base"]
    assert curve[1] == found[0]["scores"]["adapted"]
    assert len({point["loss"] for point in curve.values()}) == 9


def test_without_all_edits_the_score_is_the_base_and_without_one_it_is_between_nothing_and_all(found):
    without, scores = found[0]["without"], found[0]["scores"]
    base = {name: value for name, value in scores["base"].items() if name != "perplexity"}
    assert without["all"] == base
    assert list(without["layer"]) == [0, 1]
    assert list(without["position"]) == ["f1", "f2", "l2", "l1"]
    losses = [values["loss"] for part in ("layer", "position") for values in without[part].values()]
    assert len({*losses, scores["adapted"]["loss"], base["loss"]}) == 8  # each switch changes something


def test_another_family_and_a_text_are_measured_before_and_after(found):
    other, scores = found[0]["other"], found[0]["scores"]
    assert found[0]["other_family"] == "commonsense"
    assert other["base"]["loss"] not in (other["adapted"]["loss"], scores["base"]["loss"])
    assert scores["base"]["perplexity"] != scores["adapted"]["perplexity"]
    assert all(100 < s["perplexity"] < 1000 for s in scores.values())  # about one of 259 random bytes


def test_norms_angles_and_lens_have_a_value_for_each_layer(found):
    norm, angles, lens = (found[0][name] for name in ("edit_norm", "subspaces", "logit_lens"))
    assert norm["positions"] == ["f1", "f2", "l2", "l1"]
    assert all(value > 0 for values in norm["by_position"].values() for value in values)
    assert angles["dimensions"] == {0: 2, 1: 2}
    assert angles["angle"][0][0] == pytest.approx(0, abs=1e-4)
    assert [(line["layer"], line["direction"]) for line in lens] == [
        (layer, name) for layer in (0, 1) for name in ("mean edit", "constant", "row 0", "row 1")
    ]
    assert all(len(line["towards"]) == len(line["away_from"]) == 6 for line in lens)


def test_files_are_written_and_named_and_the_view_says_what_they_say(folder, found):
    values, said = found
    out = folder / "inspection"
    names = ("edit_norm", "angles", "switched_off", "strength")
    files = {"inspect.json"} | {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == files
    assert all(str(out / name) in said for name in files)
    read = json.loads((out / "inspect.json").read_text())
    assert read["scores"] == values["scores"]
    assert f"{values['scores']['base']['perplexity']:.2f}" in said
    for words in ("Logit lens", "Strength", "without it", "commonsense rows", "6 validation rows of boolq"):
        assert words in said


def of_one_epoch(data, folder, *overrides):
    short_runs.run(data, folder, "test=false", "trainer.max_epochs=1", *overrides)
    return folder


def test_two_runs_are_compared_layer_by_layer(folder, data, tmp_path, no_pictures):
    other = of_one_epoch(data, tmp_path / "other", "seed=7", "intervention.rank=8")
    found, said = inspect(folder, folder / "adapter", other, rows=2, out=tmp_path / "out")
    runs = found["subspaces"]["runs"]
    assert list(runs) == [str(folder), str(other)]
    assert degrees(runs[str(folder)]) == pytest.approx({0: 0, 1: 0}, abs=1e-4)
    assert all(20 < angle <= 90 for angle in degrees(runs[str(other)]).values())
    assert f"same layers of {other}" in said
    assert found["rows"] == 2
    # the chance is that of both their ranks
    expected = math.degrees(math.acos(math.sqrt(8 / 32)))  # of 2 and 8 directions in 32
    chance = degrees(found["subspaces"]["runs"][str(other)], "chance")
    assert chance == pytest.approx({0: expected, 1: expected})
    own = math.degrees(math.acos(math.sqrt(2 / 32)))
    assert found["subspaces"]["chance"] == [[pytest.approx(own)] * 2] * 2
    assert f"chance {own:.1f}" in said
    assert f"chance {expected:.1f}" in said


def test_runs_of_ones_own_intervention_are_compared_in_a_new_process(
    data, tmp_path, monkeypatch, capsys, no_pictures
):
    code = "from reft_lightning.interventions import LoReFT\n\nclass Mine(LoReFT): ...\n"
    (tmp_path / "mine_here.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one", "other"):
        of_one_epoch(data, tmp_path / name, "intervention.method=mine_here.Mine")

    def inspect_anew(*options):
        del sys.modules["mine_here"], INTERVENTIONS["mine_here.Mine"]
        folders = (str(tmp_path / name) for name in ("one", "other"))
        monkeypatch.setattr(sys, "argv", ["reft-inspect", *folders, *options])
        cli.inspect()

    inspect_anew("rows=2", "trust_code=true")
    assert f"same layers of {tmp_path / 'other'}" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit):
        inspect_anew("rows=2")
    assert "mine_here.Mine is not part of an installed package" in capsys.readouterr().err


def test_runs_of_other_widths_are_refused_by_name_before_weights_are_loaded(
    folder, data, tmp_path, monkeypatch
):
    wide = ["model.config.hidden_size=64", "model.config.intermediate_size=96"]
    other = of_one_epoch(data, tmp_path / "wide", *wide)
    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", None)
    with pytest.raises(ValueError, match=f"{folder} edits .* width 32, but that of {other} has width 64"):
        inspect(folder, other, out=tmp_path / "out")


def test_a_method_whose_edits_may_point_anywhere_has_no_angles_and_that_is_said(
    alone, data, tmp_path, no_pictures
):
    red = of_one_epoch(data, tmp_path / "red", "intervention=red", "intervention.rank=null")
    found, said = inspect(alone, red, out=tmp_path / "one")
    assert found["not_inspected"][1:] == [f"{red}: {NO_SUBSPACE}, so there are no angles to it"]
    assert found["not_inspected"][1] in said
    found, said = inspect(red, alone, rows=2, out=tmp_path / "other")
    assert "subspaces" not in found
    assert f"{red}: {NO_SUBSPACE}, so there are no angles" in said
    assert found["strength"]


def test_attention_heads_have_spaces_of_their_own_and_no_angles(tmp_path):
    for name, layers in (("one", [0]), ("both", [0, 1])):
        own = {layer: {"component": "head_output"} if layer in layers else {} for layer in (0, 1)}
        rl.attach(tiny.model("llama"), rank=2, layers=own).save_pretrained(tmp_path / name)
    assert command._compare([tmp_path / "one"])["subspaces"]["layers"] == [1]
    said = f"{tmp_path / 'both'}: {NO_SUBSPACE}, so there are no angles"
    assert command._compare([tmp_path / "both"]) == {"not_inspected": [said]}


def test_the_lens_leaves_out_what_is_not_in_the_residual_stream_and_the_rest_is_reported(
    data, tmp_path, no_pictures
):
    component = "model.layers.{layer}.self_attn.o_proj.input"  # as wide as the stream
    run = of_one_epoch(data, tmp_path / "run", f"intervention.component='{component}'")
    found, said = inspect(run, rows=2)
    assert found["logit_lens"] == []
    assert "Logit lens" not in said
    why = f"{component} is not in the residual stream, which the output head reads: no logit lens for layers 0, 1"
    assert why in said
    assert len(found["strength"]) == 9
    assert found["subspaces"]["layers"] == [0, 1]


def test_layers_at_two_places_have_the_lens_of_those_in_the_stream(data, tmp_path):
    layers = "{0: {component: block_output}, 1: {component: 'model.layers.{layer}.mlp.down_proj.input'}}"
    run = of_one_epoch(data, tmp_path / "run", f"intervention.layers={layers}")
    found, said = inspect(run, rows=2)
    assert {line["layer"] for line in found["logit_lens"]} == {0}
    assert "no logit lens for layers 1" in said
    assert math.isnan(found["subspaces"]["angle"][0][1])  # of widths 32 and 64


def test_of_an_adapter_without_its_run_only_subspaces_are_known(folder, alone):
    found, said = inspect(alone, folder)
    assert degrees(found["subspaces"]["runs"][str(folder)]) == pytest.approx({0: 0, 1: 0}, abs=1e-4)
    assert "is an adapter without its run" in said
    assert {path.name for path in (alone / "inspection").iterdir()} == {
        "inspect.json", "angles.png", "angles.svg",
    }  # fmt: skip


def test_of_another_method_only_what_was_forgotten_is_known(data, text, tmp_path):
    pytest.importorskip("peft")
    lora = ["intervention=peft/lora", "intervention.options.r=2", "test=false", "trainer.max_epochs=1"]
    settings = [*short_runs.without_interventions(data), *lora, "optimizer.lr=0.05"]
    experiment.run(compose.compose(settings), tmp_path)
    found, said = inspect(tmp_path, text=text)
    assert "peft/lora edits no representations" in said
    assert found["scores"]["base"]["perplexity"] != found["scores"]["adapted"]["perplexity"]
    assert "strength" not in found
    assert [path.name for path in (tmp_path / "inspection").iterdir()] == ["inspect.json"]


def test_a_classifier_has_everything_but_what_reads_on(tmp_path):
    rows = Path(__file__).parents[1] / "fixtures" / "glue"
    settings = [
        "model=tiny_random", "model.config.model_type=bert", "+model.config.initializer_range=0.4", "data=glue_stsb",
        "intervention.positions=f3", "intervention.rank=1", "data.source=local", f"data.path='{rows}'",
        "data.batch_size=4", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
        "test=false",
    ]  # fmt: skip
    experiment.run(compose.compose(settings), tmp_path)
    found, said = inspect(tmp_path)
    assert "cannot continue a plain text" in said
    assert {"loss", "pearson", "spearman", "combined_score"} <= found["scores"]["adapted"].keys()
    curve = {point.pop("scale"): point for point in map(dict, found["strength"])}
    assert curve[1] == found["scores"]["adapted"]
    assert curve[0] == found["without"]["all"]  # the trained head stays on while the edits are off
    assert "logit_lens" not in found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mime"], "mime: no such folder; did you mean 'mine'?"),
        (["."], ". must be a finished run"),
        (["mine", "rowss=2"], "unknown argument 'rowss'; the arguments are rows"),
        (["mine", "rows=0"], "rows must be an integer, at least 1; got '0'"),
        (["mine", "forget=bolq"], "did you mean 'data=boolq'?"),
        (["mine", "forget=glue_rte"], "cannot be evaluated on rows of kind classification"),
        (["mine", "data.path=x"], "data.path=x applies only to the rows of forget=NAME"),
        (["mine", "text=none.txt"], "none.txt"),
        (["rows=2"], "FOLDER is missing"),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_loaded(
    monkeypatch, capsys, folder, arguments, expected
):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", None)
    monkeypatch.setattr(sys, "argv", ["reft-inspect", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.inspect()
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_short_text_says_how_long_it_must_be(folder, tmp_path):
    (tmp_path / "short.txt").write_text("a zorb")
    with pytest.raises(ValueError, match="must have at least 128 tokens, one window; got 6"):
        inspect(folder, text=tmp_path / "short.txt")

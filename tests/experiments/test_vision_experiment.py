"""experiments/vision: LoReFT learns answers about pictures that the frozen model, pretrained here, does not give."""

import importlib.util
import sys

import pytest


@pytest.fixture
def script(root, monkeypatch):
    """The experiment's script as a module."""
    folder = root / "experiments" / "vision"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("vision_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("drawing", None)


def test_pictures_are_those_of_their_scenes(script):
    scenes = script.scenes(50, 0)
    assert scenes == script.scenes(50, 0) != script.scenes(50, 1)
    for scene in scenes:
        seen = sys.modules["drawing"].draw(scene)
        colours = {colour for _, colour in seen.getcolors()}
        assert colours == {sys.modules["drawing"].COLOURS[scene.colour], (245, 245, 245)}
        assert len(scene.cells) == scene.count
    learnt = {question for _, question, _ in script.rows(200, 3, script.new)}
    assert learnt == set(script.new(scenes[0]))
    assert not learnt & set(script.known(scenes[0]))


@pytest.mark.slow
def test_loreft_learns_what_the_frozen_model_does_not_say(script, tmp_path):
    base = script.make_base(tmp_path, count=2000, steps=1200)
    assert base["right"] > 0.5, "the base has not learnt to see"
    splits = {"train": script.rows(360, 3, script.new), "test": script.rows(100, 4, script.new)}
    script.write(tmp_path / "new", splits)
    results = script.learn(tmp_path, "loreft, f3+l3", 42)
    gained = results["metrics"]["test/exact_match"] - results["metrics"]["base/test/exact_match"]
    assert gained > 0.25  # 0.45 in experiments/vision

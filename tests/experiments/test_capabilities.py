"""The matrix of capabilities: its cells match the outcomes of its probes, and the pages show them."""

import importlib.util
import json

import pytest
import torch

import reft_lightning as rl
from reft_lightning.adapters.methods import METHODS

SAMPLE = [("llama", "loreft"), ("llama", "peft/lora"), ("gpt2", "jola"), ("mamba", "red"), ("bert", "bitfit"),
          ("t5", "loreft"), ("gemma3_both_ways", "loreft")]  # fmt: skip


@pytest.fixture(scope="module")
def matrix(root):
    spec = importlib.util.spec_from_file_location("probe", root / "experiments/capabilities/probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(matrix):
    return matrix.unpacked(json.loads(matrix.MATRIX.read_text(encoding="utf-8")))


REMADE = "the outcome changed: if that was intended, run `make capabilities`"


@pytest.mark.filterwarnings("ignore")  # of peft and torch.compile
@pytest.mark.parametrize(("model", "method"), SAMPLE)
def test_a_cell_is_what_its_probe_finds(matrix, written, model, method, monkeypatch):
    case = matrix.Case(model, method)
    found = {name: matrix.outcome(run, case) for name, run in matrix.PROBES.items() if name != "compile"}
    assert found == {name: written[f"{model} {method}"][name] for name in found}, REMADE


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_every_cell_is_what_its_probe_finds(matrix, written):
    found = matrix.cells()
    changed = {
        f"{key}, {name}": (written.get(key, {}).get(name), outcome)
        for key, cell in found.items()
        for name, outcome in cell.items()
        if written.get(key, {}).get(name) != outcome
    }
    assert not changed, REMADE
    assert found.keys() == written.keys()


def test_every_method_and_model_has_its_cells_and_none_is_wrong(matrix, written):
    names = matrix.methods()
    expected = {f"{model} {name}" for model in matrix.MODELS for name in names}
    expected |= {f"{model} {name}" for model in matrix.RELATIVES for name in matrix.OF_RELATIVES}
    assert written.keys() == expected, REMADE
    assert [key for key, cell in written.items() if any(o.startswith("wrong") for o in cell.values())] == []
    methods = {matrix._settings(name)["method"] for name in names}
    ours = {name for name, cls in rl.INTERVENTIONS.items() if cls.__module__.startswith("reft_lightning.")}
    assert methods >= ours | METHODS.keys() - {"none"}  # a new one has a file, and so its cells


def test_the_pages_show_what_is_written(matrix, written):
    made = matrix.tables(written)
    for path, form in matrix.PAGES.items():
        shown = matrix.BETWEEN.search(path.read_text(encoding="utf-8"))
        assert shown[0].split("\n", 1)[1].rpartition("\n")[0].strip() == made[form].strip(), path.name


def test_a_broken_law_is_a_wrong_cell(matrix, monkeypatch):
    """Each probe can fail: a model that keeps no law is found out."""
    case = matrix.Case("llama", "loreft")
    forward = rl.ReftModel.forward

    def noisy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self._enabled:
            torch.manual_seed(len(noise))
            noise.append(1)
            out["logits"] = out["logits"] * (1 + 0.3 * torch.rand_like(out["logits"]))
            if out.get("loss") is not None:
                out["loss"] = out["loss"] * (1 + len(noise) % 2)
        return out

    noise = []
    monkeypatch.setattr(rl.ReftModel, "forward", noisy)
    for name in ("train", "generate", "left padding", "beams", "checkpointing", "bf16", "save, load", "mixed batch",
                 "merge", "kept prefix"):  # fmt: skip
        found = matrix.outcome(matrix.PROBES[name], case)
        assert found.startswith(("wrong", "off")), (name, found)

"""What the README shows is run."""

import re
import shlex

import pytest
import tiny
import torch
from readme import PAGES, README, ROOT, code_with, commands_of

import reft_lightning as rl
from reft_lightning.config import compose
from reft_lightning.config.explain import keys


@pytest.fixture
def gate():
    names = dict(rl.INTERVENTIONS)
    scope: dict = {"__name__": "readme"}
    exec(code_with("class Gate"), scope)
    yield scope["Gate"]
    rl.INTERVENTIONS.clear()
    rl.INTERVENTIONS.update(names)


def test_the_new_intervention_of_the_readme_is_ten_lines():
    lines = code_with("class Gate").split("class Gate")[1].splitlines()
    assert len([line for line in lines if line.strip() and '"""' not in line]) <= 10


def test_the_new_intervention_of_the_readme_edits_saves_loads_and_generates(gate, tmp_path):
    reft = rl.attach(tiny.model("llama"), "gate", positions="all").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with reft.disabled():
        base = reft(input_ids=ids).logits
    torch.testing.assert_close(reft(input_ids=ids).logits, base, rtol=0, atol=0)  # b = 0: the identity
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.3)
    edited = reft(input_ids=ids).logits
    assert (edited - base).abs().max() > 1e-3
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, edited, rtol=0, atol=0)
    new = {
        name: again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=name) for name in (True, False)
    }
    assert torch.equal(new[True], new[False])
    width = reft.base_model.config.hidden_size
    assert reft.parameter_count().trainable == 2 * width * reft.base_model.config.num_hidden_layers


def test_the_loop_of_the_readme_trains_the_interventions_alone():
    torch.manual_seed(0)
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f2+l2")
    before = {name: parameter.clone() for name, parameter in reft.named_parameters()}
    ids = torch.randint(5, tiny.VOCABULARY, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :6] = -100
    first = reft(**batch).loss.item()
    exec(code_with("torch.optim.AdamW"), {"torch": torch, "reft": reft, "batches": [batch] * 30})
    assert reft(**batch).loss.item() < first - 0.05
    for name, parameter in reft.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("interventions."), name


@pytest.mark.parametrize("path", re.findall(r"`(experiments/\w+|tests/[\w/]+\.py)`", README))
def test_every_path_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()


def test_the_list_of_files_names_every_room_and_no_other():
    tree = README.split("## Files")[1].split("```")[1].split("conf/")[0]
    named = set(re.findall(r"^ +([a-z_]+)/ ", tree, re.MULTILINE))
    package = ROOT / "reft_lightning"
    rooms = {path.parent.name for path in package.rglob("__init__.py")} - {"reft_lightning"}
    assert named <= rooms
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= named
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert list(package.rglob(name)), name


@pytest.mark.parametrize("arguments", [a for a in commands_of("reft-train") if not a.startswith("resume=")])
def test_every_training_command_composes(arguments):
    compose.preflight(shlex.split(arguments))  # leaves with a message where one does not


def test_every_page_that_the_pages_link_to_is_there():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target


def test_every_configuration_key_that_the_pages_name_exists():
    sections = "model|intervention|data|decoding|trainer|optimizer|scheduler|checkpoint|kept"
    named = set(re.findall(rf"`\+?((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", PAGES))
    assert len(named) > 10
    known = keys()
    assert [name for name in named if name not in known and name.rpartition(".")[0] not in known] == []

"""What README and docs show is run."""

import contextlib
import copy
import csv
import functools
import importlib
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import short_runs
import tiny
import torch
import yaml
from readme import BLOCKS, PAGES, README, ROOT, TEXTS, blocks_of, code_with, command_lines, pages_with
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    RobertaConfig,
    T5Config,
)
from transformers.models.auto import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.base_models.processors import load_processor
from reft_lightning.config import compose
from reft_lightning.config.schema import keys
from reft_lightning.data import FAMILIES
from reft_lightning.reporting import command as reporting
from reft_lightning.reporting.judging import command as judging
from reft_lightning.runs.build import outline
from reft_lightning.search import search_plan
from reft_lightning.search.command import OWN
from reft_lightning.search.preflight import check_corners, compose_corners

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = PROJECT["scripts"]
LAYERS = 32  # as many as the largest model that a page attaches to
# How many blocks are not run, by page: what other programs are called like, and the reason is written above each.
NOT_RUN = {
    "docs/exchange.md": 2,
    "docs/from_pyreft.md": 1,
    "docs/from_adapters.md": 1,
    "docs/integrations.md": 2,
    "docs/serve.md": 1,
}
COLUMNS = {
    "question": "Which animal barks at the postman?", "reply": "a dog", "context": "at home", "answer": "dog",
    "opa": "dog", "opb": "cat", "opc": "cow", "opd": "owl", "cop": "0", "answers": "a dog", "image": "",
}  # fmt: skip


# --- a pretended hub, files and a finished run ---------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Whatever a page loads by name is a tiny random model of many layers, which reads bytes."""
    sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = LlamaConfig(**sizes, max_position_embeddings=512)
    roberta = RobertaConfig(**sizes, max_position_embeddings=512, num_labels=2)

    def of(auto, config):
        return lambda name, **_: auto.from_config(copy.deepcopy(config)).eval()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", of(AutoModelForCausalLM, llama))
    t5 = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", of(AutoModelForSeq2SeqLM, t5))
    classifier = of(AutoModelForSequenceClassification, roberta)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", classifier)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **_: llama)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **_: byte_tokenizer())
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    llava = LlavaConfig(text_config=llama.to_dict(), vision_config=vision, image_token_index=259)
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", of(AutoModelForImageTextToText, llava)
    )
    processor = load_processor(llava, source="random", tokenizer="bytes")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, **_: processor)


@pytest.fixture(autouse=True)
def _tables_stay():
    before = dict(rl.INTERVENTIONS)
    yield
    rl.INTERVENTIONS.clear()
    rl.INTERVENTIONS.update(before)
    for block in BLOCKS:
        if block.file and block.file.endswith(".py"):
            sys.modules.pop(Path(block.file).stem, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the rows that pages name, to stand in."""
    names = set(re.findall(r"=([\w-]+\.(?:csv|jsonl|txt))\b", PAGES))
    splits = ("train", "validation", "test")
    names |= {f"{place}/{split}.csv" for place in ("FOLDER", "numbers") for split in splits}
    for name in sorted(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_rows(path):
    rows = [COLUMNS | {"question": f"{COLUMNS['question']} {i}"} for i in range(12)]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return
    if path.suffix == ".txt":
        path.write_text("\n".join(row["question"] for row in rows), encoding="utf-8")
        return
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    lines = [json.dumps(row | {"conversations": turns}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_files(page, folder):
    """Write the files that a page shows."""
    for block in (b for b in BLOCKS if b.page == page and b.file):
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps."""
    place = tmp_path_factory.mktemp("run")
    data = short_runs.write_rows(place / "data")
    short_runs.run(data, place / "run", "trainer.max_epochs=1", "name=mine")
    return place / "run"


# --- Python --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # peft's own
@pytest.mark.filterwarnings(
    "ignore:`lora_bias=True` was passed:UserWarning"
)  # peft's own, of a map without a bias
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs_from_its_top_to_its_end(page, hub, folder, capsys):
    write_files(page, folder)
    blocks = blocks_of(page, "python")
    scope = {"__name__": "page", "batches": batches()}
    if not any("reft = " in block.text for block in blocks):  # the page goes on from another
        ids = torch.tensor([[5, 6, 7, 8]])
        reft = rl.attach(AutoModelForCausalLM.from_pretrained("any"), "loreft", rank=2)
        scope |= {"reft": reft, "ids": ids, "mask": torch.ones_like(ids)}
    for block in blocks:
        exec(compile(block.text, f"{page}, {block.file or 'a block'}", "exec"), scope)


def batches(count=2):
    ids = torch.randint(5, 250, (count, 3, 12))
    labels = torch.where(torch.arange(12) < 8, -100, ids)
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}
        for x, y in zip(ids, labels, strict=True)
    ]


def test_the_new_intervention_of_the_readme_is_ten_lines():
    lines = code_with("class Gate").split("class Gate")[1].splitlines()
    assert len([line for line in lines if line.strip() and '"""' not in line]) <= 10


def test_the_new_intervention_of_the_readme_edits_saves_loads_and_generates(tmp_path):
    exec(code_with("class Gate"), {"__name__": "readme"})
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


def test_the_training_loop_trains_only_the_interventions():
    torch.manual_seed(0)
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions="f2+l2")
    before = {name: parameter.clone() for name, parameter in reft.named_parameters()}
    ids = torch.randint(5, tiny.VOCABULARY, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :6] = -100
    first = reft(**batch).loss.item()
    exec(code_with("reft(**batch).loss.backward()"), {"torch": torch, "reft": reft, "batches": [batch] * 30})
    assert reft(**batch).loss.item() < first - 0.05
    for name, parameter in reft.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("adapters."), name


# --- command lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_a_command_line_is_one_that_its_program_takes(page, line, folder, run, monkeypatch, capsys):
    write_files(page, folder)
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in ("srun", "export"):
        words = words[1:]
        if not words:
            return
    program, arguments = words[0], words[1:]
    if program in SCRIPTS and program not in CHECKS:
        check_by_help(program, arguments, monkeypatch)
        return
    assert program in CHECKS, f"no test knows the program {program!r}"
    CHECKS[program](arguments, run, monkeypatch)


def check_train(arguments, run, monkeypatch):
    if arguments[0].startswith("resume="):
        assert {a.partition("=")[0] for a in arguments} <= {"resume", "trust_code"}
        return
    asked = compose.preflight(arguments)  # leaves with a message where one does not compose
    assert asked.runs
    if "--cfg" in arguments:
        return
    runs = list(asked.runs.values())
    for config in (runs[0], runs[-1]):
        small = tiny_model(config.data.family == "vision", "t5" in str(config.model.name))
        model = replace(small, attn_implementation=config.model.attn_implementation)
        same = re.sub(r"'/[^']*'", "", repr(replace(config, model=model, seed=0)))  # in whatever folder
        if same not in OUTLINED:
            OUTLINED.add(same)
            # of a reader's own adapter there is no folder
            outline(replace(config, model=model, intervention=replace(config.intervention, init_from=None)))


OUTLINED = set()


@functools.cache
def tiny_model(sees=False, two_texts=False):
    """A model without a network, of as many layers as the pages name, or one that reads images, or two texts."""
    if sees:
        return compose.compose(["model=tiny_vision"]).model
    if two_texts:
        sizes = "model_type:t5,d_model:16,d_kv:8,d_ff:24,num_layers:2,num_heads:2"
        return compose.compose(["model=tiny_random", f"+model.config={{{sizes}}}"]).model
    return compose.compose(["model=tiny_random", f"model.config.num_hidden_layers={LAYERS}"]).model


def check_search(arguments, run, monkeypatch):
    own = {a.partition("=")[0]: a.partition("=")[2] for a in arguments}
    if "search" not in own:
        assert own.keys() <= {*OWN, "budget.amount"}
        return
    plan = search_plan.read_plan(own["search"], [a for a in arguments if a.partition("=")[0] not in OWN])
    check_corners(plan, {method: corners[:1] for method, corners in compose_corners(plan).items()})


def check_report(arguments, run, monkeypatch):
    if arguments[0] != "paper":
        monkeypatch.setattr(reporting, "main", lambda folders, **given: None)
    really(cli.report, ["reft-report", *arguments], monkeypatch)


def check_eval(arguments, run, monkeypatch):
    really(cli.evaluate, ["reft-eval", *of_the_run(arguments, run)], monkeypatch)


def check_chat(arguments, run, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    really(cli.chat, ["reft-chat", *of_the_run(arguments, run)], monkeypatch)


def of_the_run(arguments, run):
    assert sum(a.startswith("run=") for a in arguments) == 1
    return [f"run={run}" if a.startswith("run=") else a for a in arguments]


def really(command, argv, monkeypatch):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", argv)
    level = logging.getLogger().level
    try:
        command()
    finally:
        logging.getLogger().setLevel(level)


def check_by_help(program, arguments, monkeypatch):
    """Hold each key=value of a command to what its help names, or to the keys of a run."""
    module, _, function = SCRIPTS[program].partition(":")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        really(getattr(importlib.import_module(module), function), [program, "--help"], monkeypatch)
    names = {a.partition("=")[0] for a in arguments if "=" in a}
    assert [name for name in names if f"{name}=" not in said.getvalue() and name not in keys()] == []


def check_judge(arguments, run, monkeypatch):
    given = {a.partition("=")[0] for a in arguments}
    assert given <= set(judging.OPTIONS)
    assert "judge" in given


def check_make(arguments, run, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(a for a in arguments if "=" not in a) <= set(targets)


def check_pip(arguments, run, monkeypatch):
    assert arguments[0] in ("install", "wheel")
    for extras in re.findall(r"(?:reft_lightning|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def check_python(arguments, run, monkeypatch):
    script = arguments[0]
    assert (ROOT / script).is_file() or Path(script).is_file(), script


def nothing(arguments, run, monkeypatch):
    """A program of others, whose arguments are its own."""


CHECKS = {
    "reft-train": check_train, "reft-search": check_search, "reft-report": check_report, "reft-eval": check_eval,
    "reft-chat": check_chat, "reft-judge": check_judge, "make": check_make, "pip": check_pip, "python": check_python,
} | dict.fromkeys(("git", "cd", "wandb", "tensorboard", "docker"), nothing)  # fmt: skip


def test_every_command_of_the_package_is_shown_once_at_least():
    shown = {shlex.split(line)[0] for _, line in command_lines()}
    assert SCRIPTS.keys() <= shown


# --- what is not run, files, keys and links ------------------------------------------------------------------------


def test_blocks_that_are_not_run_are_few_and_say_why():
    counts = {}
    for block in BLOCKS:
        if block.why_not is not None:
            counts[block.page] = counts.get(block.page, 0) + 1
    assert counts == NOT_RUN


def test_a_block_of_code_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "yaml", "text", "csv", "json", ""}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "json")], ids=lambda b: b.page)
def test_a_block_of_yaml_or_json_can_be_read(block):
    assert yaml.safe_load(block.text) if block.language == "yaml" else json.loads(block.text)


def test_the_list_of_files_names_every_room_and_no_other():
    tree = TEXTS["docs/explanation/rooms.md"].split("```")[1].split("conf/")[0]
    named = set(re.findall(r"^ +([a-z_]+)/ ", tree, re.MULTILINE))
    package = ROOT / "reft_lightning"
    rooms = {path.parent.name for path in package.rglob("__init__.py")} - {"reft_lightning"}
    assert named <= rooms
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= named
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert list(package.rglob(name)), name


NAMED = sorted(set(re.findall(r"`((?:experiments|tests|conf|reft_lightning)/[\w/.-]+\w/?)`", PAGES)))


@pytest.mark.parametrize("path", NAMED)
def test_a_path_that_a_page_names_is_there(path):
    assert (ROOT / path).exists()


def test_every_configuration_key_that_the_pages_name_exists():
    sections = "model|intervention|data|decoding|trainer|optimizer|scheduler|checkpoint|kept"
    named = set(re.findall(rf"`\+?((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", PAGES))
    assert len(named) > 10
    known = keys()
    assert [name for name in named if name not in known and name.rpartition(".")[0] not in known] == []


def test_every_page_that_the_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


LINKS = sorted(set(re.findall(r"\bhttps?://[^\s)>\"'`\]]+", PAGES)))


@pytest.mark.parametrize("link", LINKS)
def test_a_link_to_elsewhere_has_the_form_of_one(link):
    assert re.fullmatch(
        r"https://(?:[\w-]+\.)+[a-z]{2,}(?:/[\w./#:@+%~=&?-]*)?|http://localhost:\d+\S*", link
    )
    assert not link.endswith((".", ",", ":"))


def test_a_number_in_percent_stands_next_to_its_file():
    for page in ("docs/results.md", "docs/explanation/speed.md"):
        for section in TEXTS[page].split("\n## ")[1:]:
            if re.search(r"^\|.*\d\.\d", section, re.MULTILINE):
                assert "`experiments/" in section, section.splitlines()[0]


def test_the_reference_has_every_public_name_and_every_family():
    shown = re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE)
    members = ", ".join(re.findall(r"members: \[(.+)\]", PAGES)).split(", ")
    names = {name.rpartition(".")[2] for name in shown} | set(members)
    assert set(rl.__all__) <= names
    assert {*FAMILIES, "custom"} <= set(
        re.findall(r"^`data\.family=(\w+)`", TEXTS["docs/reference/families.md"], re.M)
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages; a warning fails the build, and so this."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_pages_build_and_their_links_and_anchors_lead_somewhere(site):
    assert (site / "index.html").is_file()


def test_no_formula_or_role_of_a_docstring_is_left_as_it_was_typed(site):
    for page in (site / "reference").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<code>[^<]*\\(?:frac|top|Phi|sum|log)\b", text), page.name
        assert not re.search(r":(?:class|func|meth|mod|math|attr|data):", text), page.name


def test_the_page_of_keys_has_every_key_of_the_schema(site):
    text = (site / "reference" / "keys.html").read_text(encoding="utf-8")
    assert [name for name in keys() if f"<code>{name}</code>" not in text and name not in SECTIONS] == []


def test_the_page_of_groups_describes_every_file(site):
    cells = re.findall(
        r"<td><code>(\S+)</code></td>\s*<td>(.*?)</td>",
        (site / "reference" / "groups.html").read_text("utf-8"),
    )
    assert len(cells) > 100
    assert [name for name, words in cells if words in ("", "none") or words.endswith(" eq")] == []


SECTIONS = {name.partition(".")[0] for name in keys() if "." in name}

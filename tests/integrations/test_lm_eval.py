"""lm-evaluation-harness on invented rows: its scores equal those computed by hand."""

import json
import re
import shlex
import sys

import pytest
import torch
import yaml
from readme import BLOCKS
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer

pytest.importorskip("lm_eval", reason="takes the extra 'lm-eval'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from reft_lightning.integrations.lm_eval import ReftLM, cli_evaluate

LENGTH = 48
CHOICES = [
    {"question": "Which animal barks?", "options": ["a dog", "an old cat", "hm"], "answer": 0},
    {"question": "Red or blue?", "options": ["red", "blue"], "answer": 1},
    {"question": "How many legs has a stool?", "options": ["3", "4", "5"], "answer": 0},
    {"question": "Why?", "options": ["because", "so"], "answer": 1},
]
TEXTS = [
    {"text": "It rained."},
    {"text": "The ferry left at noon, and nobody waved to those who stayed behind."},
]
TASKS = {
    "barks": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"max_gen_toks": 6, "do_sample": False, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
    "reads": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, an adapter that moves its scores, and the tasks."""
    place = tmp_path_factory.mktemp("lm_eval")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, **sizes, max_position_embeddings=LENGTH, initializer_range=0.4)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(place / "base")
    byte_tokenizer().save_pretrained(place / "base")
    reft = rl.attach(base, "loreft", rank=2, positions="f2+l3")
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(torch.randn_like(parameter))
    reft.save_pretrained(place / "adapter")
    for name, rows in {"barks": CHOICES, "writes": CHOICES, "reads": TEXTS}.items():
        (place / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        data = {"data_files": {"test": str(place / f"{name}.json")}, "cache_dir": str(place / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(task | TASKS[name]), encoding="utf-8")
    return place


@pytest.fixture
def reft(place):
    """The model with its adapter, as it is used without lm-eval."""
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return rl.ReftModel.from_pretrained(base, place / "adapter").eval()


def evaluated(place, model="reft_lightning", tasks=tuple(TASKS), batch_size=1, **arguments):
    """The results of lm-eval: every metric, and the model's answer for each row."""
    arguments = {"pretrained": str(place / "base"), "device": "cpu", **arguments}
    manager = TaskManager(include_path=str(place), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, arguments, list(tasks), batch_size=batch_size, task_manager=manager, bootstrap_iters=0
    )
    answers = {
        task: [[answer[0] for answer in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }
    return found["results"], answers


@pytest.fixture(scope="module")
def alone(place):
    """The results with the adapter, of rows that are read one by one."""
    return evaluated(place, adapter=str(place / "adapter"))


def ids_of(text, bos=True):
    return ([1] if bos else []) + [byte + 3 for byte in text.encode()]


@torch.no_grad()
def log_p(reft, prompt, target):
    """The log-likelihood of one row, unpadded: ids after ids."""
    ids = torch.tensor([prompt + target])
    labels = torch.tensor([[-100] * len(prompt) + target])
    return -reft(input_ids=ids, labels=labels).loss.item() * len(target)


def test_options_are_scored_after_their_own_prompt(alone, reft):
    results, answers = alone
    right = 0
    for row, found in zip(CHOICES, answers["barks"], strict=True):
        prompt = ids_of(row["question"])  # the space before an answer, here a line end, goes with the answer
        own = [log_p(reft, prompt, ids_of("\n" + " " + option, bos=False)) for option in row["options"]]
        assert [answer[0] for answer in found] == pytest.approx(own, rel=1e-5)
        right += max(range(len(own)), key=own.__getitem__) == row["answer"]
    assert results["barks"]["acc,none"] == right / len(CHOICES)


def test_texts_are_generated_with_the_edits(alone, reft):
    _, answers = alone
    tokenizer = byte_tokenizer()
    for row, found in zip(CHOICES, answers["writes"], strict=True):
        ids = torch.tensor([ids_of(row["question"] + "\n")])
        new = reft.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert found == [tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0]]


def test_the_prompt_of_a_whole_text_is_what_its_window_reads_before_it_scores(alone, reft):
    _, answers = alone
    short, long = (ids_of(row["text"]) for row in TEXTS)
    assert LENGTH < len(long) < 2 * LENGTH
    windows = [log_p(reft, [1], long[:LENGTH]), log_p(reft, long[-LENGTH - 1 : LENGTH], long[LENGTH:])]
    expected = [log_p(reft, [1], short), sum(windows)]
    assert [row[0] for row in answers["reads"]] == pytest.approx(expected, rel=1e-5)


def test_the_size_of_a_batch_changes_nothing(place, alone):
    results, answers = alone
    others, rest = evaluated(place, adapter=str(place / "adapter"), batch_size=3)
    assert others["barks"]["acc,none"] == results["barks"]["acc,none"]
    assert rest["writes"] == answers["writes"]
    assert numbers(rest) == pytest.approx(numbers(answers), rel=1e-5)


def numbers(answers):
    barks = [answer[0] for row in answers["barks"] for answer in row]
    return barks + [row[0] for row in answers["reads"]]


def test_the_frozen_base_has_the_scores_of_lm_evals_own_class(place, reft):
    own = evaluated(place, "hf", batch_size=3)
    assert evaluated(place, batch_size=3) == own
    reft.scale = 0.0  # every edit is made, and adds exactly nothing
    reft.save_pretrained(place / "zero")
    assert evaluated(place, batch_size=3, adapter=str(place / "zero")) == own


def test_one_text_that_is_split_in_two_ways_has_two_scores(place, reft):
    lm = ReftLM(str(place / "base"), str(place / "adapter"), device="cpu", batch_size=4)
    splits = [("Red or b", "lue"), ("Red or", " blue"), ("", "Red or blue")]
    requests = [Instance("loglikelihood", {}, split, 0) for split in splits]
    prompts = [ids_of(context) for context, _ in splits]
    expected = [log_p(reft, p, ids_of(rest, bos=False)) for p, (_, rest) in zip(prompts, splits, strict=True)]
    assert [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(
        expected, rel=1e-5
    )


def test_a_model_in_memory_is_taken_as_it_is(place, reft):
    lm = ReftLM(reft, tokenizer=byte_tokenizer())
    assert lm.max_length == LENGTH
    ((score, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("Why", " so"), 0)], disable_tqdm=True)
    assert score == pytest.approx(log_p(reft, ids_of("Why"), ids_of(" so", bos=False)), rel=1e-5)


def test_an_adapter_that_is_not_there_is_told_before_the_base_is_read(place):
    with pytest.raises(FileNotFoundError, match="adapter"):
        ReftLM(str(place / "no_base"), str(place / "base"))


@pytest.mark.slow  # lm-eval looks through all of its own tasks
def test_the_command_line_of_the_page_runs_lm_eval(place, alone, monkeypatch, tmp_path):
    (block,) = [b for b in BLOCKS if b.page == "docs/integrations.md" and b.language == "bash"]
    values = {"NAME": str(place / "base"), "FOLDER": str(place / "adapter"), "TASK": "barks"}
    line = re.sub("|".join(values), lambda found: values[found[0]], block.text)
    python, module, *words = shlex.split(line)[:1] + shlex.split(line)[2:]
    assert (python, module) == ("python", ReftLM.__module__)
    words += ["--device", "cpu", "--include_path", str(place), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    cli_evaluate()
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["results"]["barks"]["acc,none"]
    assert found == alone[0]["barks"]["acc,none"]

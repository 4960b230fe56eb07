"""The benchmark command as its user sees it: figures, lost goals, what is left out, and that the scripts run."""

import importlib
import json
import subprocess
import sys

import pytest
import short_runs
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from reft_lightning.base_models.loading import byte_tokenizer

FOLDER = "experiments/speed"
SCRIPTS = (
    "base_memory", "bench", "compile", "encoding", "files", "generate", "gpu", "interventions", "option_likelihood",
    "overhead", "scaling", "startup", "step", "verified_decoding", "whole_pass",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts(root):
    """Import a module of the benchmarks by its name."""
    sys.path.insert(0, str(root / FOLDER))
    names = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(root / FOLDER))
    for name in set(sys.modules) - names:
        if str(root / FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def figures(scripts):
    return scripts("figures")


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts("bench")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a causal model of two layers."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def content(value, low=None, high=None, *, model="m", figures):
    one = figures.figure("step / B", value, goal=0.78, low=low, high=high)
    return {"scripts": {"step": {"model": model, "threads": 2}}, "figures": [{**one, "script": "step"}]}


def test_a_ratio_is_the_median_of_rounds_and_its_noise_is_what_parts_of_them_give(figures):
    above, below = [4.0, 6.0, 5.0, 9.0, 8.0, 6.0, 5.0, 5.0], [2.0] * 8
    found = figures.ratio("a / b", above, below, goal=3)
    # rounds 0 and 4, 1 and 5, 2 and 6, 3 and 7
    assert (found["value"], found["low"], found["high"]) == (2.75, 2.5, 3.5)


def test_the_noise_of_a_figure_contains_it(figures):
    # no round gives the median of two
    found = figures.ratio("a / b", [1.0, 8.0], [1.0, 0.5])
    assert found["low"] <= found["value"] <= found["high"]


def test_the_table_says_goal_and_noise(figures):
    found = figures.figure("step / B", 0.8, goal=0.78, low=0.79, high=0.81)
    assert figures.table([found]).splitlines()[-1] == "| step / B | 0.8 | 0.79 to 0.81 | at most 0.78 | no |"


def test_a_goal_that_was_met_and_is_missed_beyond_the_noise_is_lost(bench, figures):
    before = content(0.75, 0.74, 0.77, figures=figures)
    now = content(0.90, 0.88, 0.93, figures=figures)
    (sentence,) = bench.lost(before, now)
    assert "step / B: 0.9 (0.88 to 0.93), before 0.75 (0.74 to 0.77), goal 0.78" in sentence


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((0.75, 0.74, 0.80), (0.79, 0.79, 0.85)),  # the intervals touch
        ((0.75, 0.74, 0.76), (0.80, 0.77, 0.85)),  # the best end of the new one meets the goal
    ],
)
def test_within_the_noise_of_either_measurement_nothing_is_lost(bench, figures, before, now):
    assert bench.lost(content(*before, figures=figures), content(*now, figures=figures)) == []


def test_figures_of_another_model_are_not_compared(bench, figures):
    before = content(0.75, figures=figures)
    assert bench.lost(before, content(0.9, figures=figures))
    assert bench.lost(before, content(0.9, model="other", figures=figures)) == []


def test_a_script_that_did_not_run_keeps_its_figures(bench, figures):
    before = content(0.75, figures=figures)
    other = figures.figure("save", 3.0, goal=10, unit="ms")
    merged = bench.merge(before, {"files": bench.Found(figures=[other], facts={"threads": 2})})
    assert [(one["script"], one["what"]) for one in merged["figures"]] == [
        ("step", "step / B"),
        ("files", "save"),
    ]
    assert set(merged["scripts"]) == {"step", "files"}


def test_a_script_that_failed_leaves_no_figures_and_says_so(bench, figures):
    merged = bench.merge(
        content(0.75, figures=figures), {"step": bench.Found(failed="step.py ended with status 1")}
    )
    assert merged["figures"] == []
    assert "Failed: step.py ended with status 1." in bench.text_of(merged)


def test_a_peer_that_cannot_be_installed_is_left_out(bench, monkeypatch):
    def fails(name, peer, folder):
        raise RuntimeError(f"no {name} today")

    monkeypatch.setattr(bench, "environment", fails)
    pythons, reasons = bench.find_pythons({"pyreft", "adapters"}, {"adapters": "python"})
    assert pythons == {"adapters": "python"}
    assert reasons == {"pyreft": "no pyreft today"}


def test_the_readme_shows_the_committed_figures(bench, root):
    text = (root / FOLDER / "README.md").read_text()
    if bench.on_disk():
        assert bench.between_markers(text, bench.text_of(bench.on_disk())) == text
    else:
        assert bench.between_markers(text, "x") != text


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_takes(scripts, bench, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        scripts(name).main()
    script = bench.SCRIPTS.get(name, bench.Script())
    said = capsys.readouterr().out
    for option in {f"--{option}" for option in script.takes} | set(script.quick[::2]):
        assert option in said


def test_every_variant_with_a_goal_is_in_its_group(scripts):
    step = scripts("step")
    for goal in step.GOALS:
        workloads, variants = step.GROUPS[goal.group]
        assert goal.workload in workloads, goal
        assert {goal.above, goal.below} <= set(variants) <= set(step.VARIANTS), goal
    for pair in scripts("gpu").PAIRS:
        assert {pair.above, pair.below} <= set(step.VARIANTS), pair


def test_variants_of_ours_train_with_the_same_losses(scripts, tiny, tmp_path):
    step, worker = scripts("step"), scripts("worker")
    file = tmp_path / "batches.safetensors"
    save_file(step.make_batches(64, *step.WORKLOADS[step.SHORT]), file)
    for names in (("reft", "reft target-only"), ("reft l7 target-only", "reft l7 split", "reft l7 kept")):
        losses = []
        for name in names:
            torch.manual_seed(0)
            one = worker.load_step(name, folder=str(tiny), batch_file=str(file))
            losses.append([one(number)["loss"] for number in (0, 1)])
        for found in losses:
            assert found == pytest.approx(losses[0], rel=1e-4)


def test_target_only_must_start_at_the_loss_of_all_logits(scripts):
    step = scripts("step")
    records = {name: {"first": {"loss": loss}} for name, loss in (("reft", 4.0), ("reft target-only", 4.1))}
    with pytest.raises(RuntimeError, match="'reft target-only' starts at loss"):
        step.check_losses(records)


def test_without_a_gpu_the_command_says_so(scripts, monkeypatch, caplog):
    gpu = scripts("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no CUDA device: nothing is measured" in caplog.text


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_timed_there(scripts, tmp_path):
    gpu, step = scripts("gpu"), scripts("step")
    file = tmp_path / "batches.safetensors"
    save_file(step.make_batches(gpu.TINY["vocab_size"], *step.WORKLOADS[step.SHORT]), file)
    ours = gpu.DeviceStep(gpu.OURS, shape=gpu.TINY, device="cuda", batch_file=str(file), steps=2)
    assert ours(0)["wall"] > 0
    assert ours(1)["wall"] > 0
    report = ours.report()
    assert report["kernels"] > 100
    assert 0 < report["busy"] < 10
    assert report["peak_memory_bytes"] > report["built_memory_bytes"] > 0


SMALL = {
    "base_memory": "--model MODEL --rounds 1",
    "compile": "--model MODEL --rounds 1 --warmup 4",
    "encoding": "--count 200 --processes 1 --rounds 1",
    "files": "--layers 2 --rounds 1",
    "generate": "--model MODEL --columns 20 --new 4 --rounds 1",
    "interventions": "--dim 64 --layers 2 --rounds 1",
    "option_likelihood": "--model MODEL --rounds 1",
    "overhead": "--model MODEL --rounds 1",
    "scaling": "--points 2 --rounds 1",
    "startup": "--rounds 1 model=local model.path=MODEL data.source=local data.path=ROWS data.validation_size=6",
    "whole_pass": "--model MODEL --limit 32",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_on_a_tiny_model(root, tmp_path, name):
    """`make bench` takes hours; here is seen whether its scripts still fit what they measure."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = short_runs.write_rows(tmp_path / "rows")
    small = SMALL[name].replace("MODEL", str(tmp_path / "model")).replace("ROWS", str(rows))
    line = [
        sys.executable,
        str(root / FOLDER / f"{name}.py"),
        *small.split(),
        "--out",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(one["low"] <= one["value"] <= one["high"] for one in found["figures"])


@pytest.mark.slow
def test_the_step_benchmark_runs_on_a_tiny_model(root, tiny, tmp_path):
    line = [
        sys.executable, str(root / FOLDER / "step.py"), "--model", str(tiny),
        "--launches", "2", "--rounds", "2", "--warmup", "1", "--groups", "float32",
        "--workloads", "8 x (115 + 6)", "--out", str(tmp_path / "step"),
        "--variants", "reft", "reft target-only", "pyreft tied",
    ]  # fmt: skip
    subprocess.run(line, check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "step.json").read_text())
    assert set(found["left_out"]) == {"pyreft tied"}
    assert [record["variant"] for record in found["records"]] == ["B", "reft", "reft target-only"]
    assert {one["what"] for one in found["figures"]} == {
        "training step, f7+l7, target-only, short targets / B",
        "training step, full logits, batch 8 / B",
        "peak memory of the step / B",
    }
    assert all(one["low"] <= one["value"] <= one["high"] for one in found["figures"])
    assert all(record["peak_memory_bytes"] > 1e7 for record in found["records"])
    assert "training step" in (tmp_path / "step.md").read_text()

"""The benchmark command: what it makes of figures. Nothing here depends on how long something takes."""

import contextlib
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = "experiments/speed"


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


def content(value, low=None, high=None, *, script="step", goal=0.78, better="lower", model="m", figures):
    one = figures.figure("step / B", value, goal=goal, better=better, low=low, high=high)
    return {"scripts": {script: {"model": model, "threads": 2}}, "figures": [{**one, "script": script}]}


# --- figures ------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_rounds_and_its_noise_is_what_parts_of_them_give(figures):
    above, below = [4.0, 6.0, 5.0, 9.0, 8.0, 6.0, 5.0, 5.0], [2.0] * 8
    found = figures.ratio("a / b", above, below, goal=3)
    # rounds 0 and 4, 1 and 5, 2 and 6, 3 and 7
    assert (found["value"], found["low"], found["high"]) == (2.75, 2.5, 3.5)


def test_what_slows_both_of_a_round_alike_does_not_count(figures):
    # of the fastest rounds 1.6, of the medians 1.4
    found = figures.ratio("a / b", [2.8, 4.5, 1.6], [2.0, 3.0, 1.0])
    assert found["value"] == 1.5


def test_the_noise_of_two_rounds_is_both(figures):
    found = figures.ratio("a / b", [3.0, 4.0], [1.0, 2.0])
    assert (found["value"], found["low"], found["high"]) == (2.5, 2.0, 3.0)


def test_the_noise_of_a_figure_contains_it(figures):
    # no round gives the median of two
    found = figures.ratio("a / b", [1.0, 8.0], [1.0, 0.5])
    assert found["low"] <= found["value"] <= found["high"]


def test_rounds_of_a_ratio_belong_together(figures):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        figures.ratio("a / b", [3.0, 4.0], [1.0])


def test_a_figure_without_a_goal_is_neither_met_nor_missed(figures):
    assert figures.is_met(figures.figure("x", 1.0)) is None


def test_better_must_be_a_direction(figures):
    with pytest.raises(ValueError, match="'lower' or 'higher'; got 'less'"):
        figures.figure("x", 1.0, better="less")


def test_the_table_says_goal_and_noise(figures):
    found = figures.figure("step / B", 0.8, goal=0.78, low=0.79, high=0.81)
    assert figures.table([found]).splitlines()[-1] == "| step / B | 0.8 | 0.79 to 0.81 | at most 0.78 | no |"


# --- the comparison -----------------------------------------------------------------------------------------------


def test_a_goal_that_was_met_and_is_missed_beyond_the_noise_is_lost(bench, figures):
    before = content(0.75, 0.74, 0.77, figures=figures)
    now = content(0.90, 0.88, 0.93, figures=figures)
    (sentence,) = bench.lost(before, now)
    assert "step / B: 0.9 (0.88 to 0.93), before 0.75 (0.74 to 0.77), goal 0.78" in sentence


def test_a_goal_that_was_missed_before_is_not_lost(bench, figures):
    before = content(0.85, 0.84, 0.86, figures=figures)
    assert bench.lost(before, content(0.99, 0.98, 1.0, figures=figures)) == []


def test_a_figure_without_a_goal_is_never_lost(bench, figures):
    before = content(0.75, goal=None, figures=figures)
    assert bench.lost(before, content(2.0, goal=None, figures=figures)) == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((0.75, 0.74, 0.80), (0.79, 0.79, 0.85)),  # the intervals touch
        ((0.75, 0.74, 0.76), (0.80, 0.77, 0.85)),  # the best end of the new one meets the goal
    ],
)
def test_within_the_noise_of_either_measurement_nothing_is_lost(bench, figures, before, now):
    assert bench.lost(content(*before, figures=figures), content(*now, figures=figures)) == []


def test_goals_to_exceed_are_compared_the_other_way_round(bench, figures):
    options = {"goal": 1.4, "better": "higher", "figures": figures}
    before = content(1.5, 1.45, 1.55, **options)
    assert bench.lost(before, content(1.3, 1.28, 1.32, **options))
    assert bench.lost(before, content(1.3, 1.28, 1.41, **options)) == []
    assert bench.lost(before, content(1.6, 1.58, 1.62, **options)) == []


def test_a_new_figure_is_not_lost(bench, figures):
    assert bench.lost({}, content(0.9, figures=figures)) == []


def test_figures_of_another_model_are_not_compared(bench, figures):
    before = content(0.75, figures=figures)
    assert bench.lost(before, content(0.9, figures=figures))
    assert bench.lost(before, content(0.9, model="other", figures=figures)) == []


# --- the merge ----------------------------------------------------------------------------------------------------


def test_a_script_that_did_not_run_keeps_its_figures(bench, figures):
    before = content(0.75, figures=figures)
    other = figures.figure("save", 3.0, goal=10, unit="ms")
    merged = bench.merge(before, {"files": bench.Found(figures=[other], facts={"threads": 2})})
    assert [(one["script"], one["what"]) for one in merged["figures"]] == [
        ("step", "step / B"),
        ("files", "save"),
    ]
    assert set(merged["scripts"]) == {"step", "files"}


def test_a_script_that_ran_replaces_its_figures(bench, figures):
    before = content(0.75, figures=figures)
    new = figures.figure("another / B", 0.5)
    merged = bench.merge(before, {"step": bench.Found(figures=[new])})
    assert [one["what"] for one in merged["figures"]] == ["another / B"]


def test_a_script_that_failed_leaves_no_figures_and_says_so(bench, figures):
    merged = bench.merge(
        content(0.75, figures=figures), {"step": bench.Found(failed="step.py ended with status 1")}
    )
    assert merged["figures"] == []
    assert "Failed: step.py ended with status 1." in bench.text_of(merged)


def test_what_was_left_out_is_named_once_with_its_reason(bench, figures):
    left_out = {"pyreft tied": "no network", "pyreft untied": "no network"}
    merged = bench.merge({}, {"step": bench.Found(left_out=left_out)})
    assert "Not measured: pyreft tied, pyreft untied (no network)." in bench.text_of(merged)


def test_the_text_counts_the_goals_that_are_met(bench, figures):
    merged = bench.merge(
        content(0.75, figures=figures),
        {"files": bench.Found(figures=[figures.figure("save", 30.0, goal=10)])},
    )
    assert "1 of 2 goals met" in bench.text_of(merged)


def test_a_script_without_what_it_needs_is_left_out(bench, tmp_path):
    args = bench.arguments(["--random"])
    found = bench.run_script("verified_decoding", bench.SCRIPTS["verified_decoding"], args, {}, {}, tmp_path)
    assert found.left_out == {"verified_decoding": "needs --model, --adapter, --rows"}
    assert not found.failed


def test_a_peer_that_cannot_be_installed_is_left_out(bench, monkeypatch):
    def fails(name, peer, folder):
        raise RuntimeError(f"no {name} today")

    monkeypatch.setattr(bench, "environment", fails)
    pythons, reasons = bench.find_pythons({"pyreft", "adapters"}, {"adapters": "python"})
    assert pythons == {"adapters": "python"}
    assert reasons == {"pyreft": "no pyreft today"}


def test_an_environment_is_used_again_until_its_recipe_changes(bench, monkeypatch, tmp_path):
    calls = []

    def run(line, **_):
        calls.append(line)
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.venv, "create", lambda home, **_: home.mkdir(exist_ok=True))
    peer = bench.Peer((("one==1",), ("--no-deps", "two==2")), "import one")
    python = bench.environment("peer", peer, tmp_path)
    assert [line[-1] for line in calls] == ["one==1", "two==2", "import one"]
    assert bench.environment("peer", peer, tmp_path) == python
    assert len(calls) == 3
    bench.environment("peer", bench.Peer((("one==2",),), "import one"), tmp_path)
    assert len(calls) == 5


def test_a_failing_pip_says_its_last_line(bench, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "first\nERROR: no such version\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda line, **_: failed)
    monkeypatch.setattr(bench.venv, "create", lambda home, **_: home.mkdir())
    with pytest.raises(RuntimeError, match="one==1: ERROR: no such version"):
        bench.environment("peer", bench.Peer((("one==1",),), "import one"), tmp_path)
    assert not (tmp_path / "peer" / "recipe").exists()


def test_recipes_pin_every_peer_and_take_the_torch_of_the_constraints(bench):
    for peer in bench.peers().values():
        packages = [word for step in peer.steps for word in step]
        assert "torch==2.13.0" in packages
    text = repr(bench.peers())
    assert all(
        pin in text for pin in ("pyreft==0.1.0", "pyvene==0.1.8", "adapters==1.3.0", "transformers==4.57.6")
    )


# --- README -------------------------------------------------------------------------------------------------------


def test_the_table_stands_between_its_markers_and_the_rest_stays(bench):
    text = f"# Speed\n\n{bench.BEGIN}\n\nold\n\n{bench.END}\n\nafter\n"
    new = bench.between_markers(text, "| new |")
    assert new == f"# Speed\n\n{bench.BEGIN}\n\n| new |\n\n{bench.END}\n\nafter\n"
    assert bench.between_markers(new, "| new |") == new


@pytest.mark.parametrize("text", ["none", "{end}{begin}", "{begin}{begin}{end}"])
def test_a_readme_without_its_markers_is_refused(bench, text):
    with pytest.raises(ValueError, match="once each"):
        bench.between_markers(text.format(begin=bench.BEGIN, end=bench.END), "table")


def test_the_readme_shows_the_committed_figures(bench, root):
    text = (root / FOLDER / "README.md").read_text()
    if bench.on_disk():
        assert bench.between_markers(text, bench.text_of(bench.on_disk())) == text
    else:
        assert bench.between_markers(text, "x") != text


# --- the scripts --------------------------------------------------------------------------------------------------


def test_every_script_takes_what_the_command_gives_it(bench, root):
    for name, script in bench.SCRIPTS.items():
        path = root / FOLDER / f"{name}.py"
        if not path.is_file():
            continue
        source = path.read_text()
        options = {f"--{option}" for option in script.takes if option not in bench.SOURCE}
        for option in (*options, *script.quick[::2]):
            assert f'"{option}"' in source, f"{name}.py lacks {option}"


def test_every_variant_with_a_goal_is_in_its_group(scripts):
    step = scripts("step")
    for goal in step.GOALS:
        workloads, variants = step.GROUPS[goal.group]
        assert goal.workload in workloads, goal
        assert {goal.above, goal.below} <= set(variants), goal
    for workloads, variants in step.GROUPS.values():
        assert variants[0] == "B"
        assert set(variants) <= set(step.VARIANTS)
        assert set(workloads) <= set(step.WORKLOADS)


def test_figures_of_missing_variants_are_left_out(scripts):
    step = scripts("step")
    record = {"wall": [2.0, 2.0], "peak_memory_bytes": 100}
    ours = {"wall": [1.0, 1.0], "peak_memory_bytes": 50}
    found = step.figures_of({(step.SHORT, "float32"): {"B": record, "reft target-only": ours}})
    assert [one["value"] for one in found] == [0.5, 0.5]
    assert [one["goal"] for one in found] == [0.78, 0.85]


def test_a_fold_of_the_noise_is_of_launches_of_its_own(scripts):
    step, figures = scripts("step"), scripts("figures")
    launches = [{"wall": [a, a + 1], "cpu": [0.0, 0.0], "peak_memory_bytes": 10 * a} for a in (1, 2, 4)]
    ours, base = step.together(launches), step.together([launches[0]] * 3)
    assert ours["wall"] == [1, 2, 4, 2, 3, 5]
    assert ours["peak_memory_bytes"] == 20
    assert figures.FOLDS == 4
    assert step.LAUNCHES % figures.FOLDS == 0
    found = step.together([*launches, {"wall": [8, 9], "cpu": [0.0, 0.0], "peak_memory_bytes": 30}])
    same = step.together([launches[0]] * 4)
    one = step.ratio("step", found["wall"], same["wall"])
    # 1, 2, 4, 8 over 1, then 2, 3, 5, 9 over 2
    assert (one["value"], one["low"], one["high"]) == (2.25, 1, 6.25)
    assert base["peaks"] == [10, 10, 10]


def test_threads_of_what_is_measured_wait_as_in_a_run(scripts, monkeypatch):
    processes, environments = scripts("processes"), []
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(
        processes.subprocess,
        "Popen",
        lambda line, env, **others: environments.append(env) or SimpleNamespace(),
    )
    processes.Worker("script", "B", {}, threads=2)
    (environment,) = environments
    assert "OMP_WAIT_POLICY" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_order_of_turns_rotates_from_where_it_is_told(scripts, monkeypatch):
    processes, asked = scripts("processes"), []

    class Worker(contextlib.nullcontext):
        def __init__(self, script, variant, *others):
            super().__init__(self)
            self.variant = variant

        def ask(self, request):
            if "run" in request:
                asked.append(self.variant)
            return {"wall": 1.0, "cpu": 1.0}

    monkeypatch.setattr(processes, "Worker", Worker)
    found = processes.interleaved("script", ["a", "b", "c"], {}, rounds=2, warmup=1, threads=1, first=2)
    assert "".join(asked) == "cab" + "abc" + "bca"
    assert found["a"]["wall"] == [1.0, 1.0]


def test_a_launch_goes_on_in_the_order_where_the_one_before_stopped(scripts, monkeypatch, tiny):
    step, asked = scripts("step"), []

    def interleaved(script, variants, settings, **options):
        asked.append((options["first"], options["warmup"]))
        record = {"wall": [1.0], "cpu": [1.0], "peak_memory_bytes": 1, "first": {"loss": 1.0}}
        return dict.fromkeys(variants, record)

    monkeypatch.setattr(step, "interleaved", interleaved)
    args = SimpleNamespace(
        pyreft_python=None, adapters_python=None, launches=3, rounds=2, warmup=1, threads=1
    )
    for group in ("float32", "suffix"):
        step.measure(step.SHORT, group, ["B"], str(tiny), args)
    # what is kept over epochs is there once every batch was seen
    assert asked == [(0, 1), (2, 1), (4, 1), (0, step.BATCHES), (2, step.BATCHES), (4, step.BATCHES)]


def test_onednn_has_no_goal_where_it_gains_nothing(scripts):
    step = scripts("step")
    names = ("B", "B onednn", "reft target-only", "reft target-only onednn")
    for gain, goal in ((0.6, 0.55), (1.2, None)):
        walls = {True: [0.5, gain, gain], False: [1.0, 1.0, 1.0]}  # one fast round is no gain
        records = {name: {"wall": walls["onednn" in name], "peak_memory_bytes": 1} for name in names}
        found = {one["what"]: one for one in step.figures_of({(step.SHORT, "onednn"): records})}
        assert found["the same, oneDNN products / B (MKL)"]["goal"] == goal


def test_target_only_must_start_at_the_loss_of_all_logits(scripts):
    step = scripts("step")
    records = {name: {"first": {"loss": loss}} for name, loss in (("reft", 4.0), ("reft target-only", 4.1))}
    with pytest.raises(RuntimeError, match="'reft target-only' starts at loss"):
        step.check_losses(records)


def test_invented_lengths_follow_the_quantiles(scripts):
    runs = scripts("runs")
    lengths = sorted(runs.invented_lengths(2000))
    for i, expected in enumerate(runs.PROMPT_QUANTILES[1:-1], 1):
        assert abs(lengths[i * 100] - expected) <= 2
    assert runs.invented_lengths(50) == runs.invented_lengths(50)


def test_invented_rows_have_the_lengths_asked_for(scripts):
    from reft_lightning.base_models.loading import byte_tokenizer

    rows = scripts("runs").invented_rows([30, 31])
    assert [len(byte_tokenizer()(row["instruction"] + "\n")["input_ids"]) for row in rows] == [30, 31]


@pytest.fixture(scope="module")
def device_steps(scripts, tmp_path_factory):
    """Ours and the bare step of `gpu.py`, on the CPU, with their batches."""
    from safetensors.torch import save_file

    gpu, step = scripts("gpu"), scripts("step")
    file = tmp_path_factory.mktemp("gpu") / "batches.safetensors"
    save_file(step.make_batches(gpu.TINY["vocab_size"], *step.WORKLOADS[step.SHORT]), file)
    settings = {"shape": gpu.TINY, "device": "cpu", "batch_file": str(file), "steps": 2}
    names = (
        gpu.OURS, "B target-only bf16", "reft plain target-only bf16", "B behind the first block, target-only bf16"
    )  # fmt: skip
    return {name: gpu.DeviceStep(name, **settings) for name in names}


def test_a_device_step_trains_as_many_steps_as_asked(device_steps):
    ours = device_steps["reft target-only bf16"]
    before = [parameter.detach().clone() for parameter in ours.step.parameters]
    answer = ours(0)
    assert set(answer) == {"wall", "cpu", "loss"}
    assert answer["wall"] > 0
    assert ours.step.optimizer.state[ours.step.parameters[0]]["step"] == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, ours.step.parameters, strict=True))


def test_the_report_of_a_device_step_counts_what_it_does(device_steps):
    ours, bare = (device_steps[name].report() for name in ("reft target-only bf16", "B target-only bf16"))
    assert ours["kernels"] > bare["kernels"] > 100
    # each weight is multiplied in the forward and in the backward pass, 2 operations a token
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert bare["flops"] > 4 * weights * 8 * 121
    assert ours["trainable_parameters"] == 2 * (2 * 8 * 32 + 8)


def test_what_a_step_starts_on_a_gpu_is_kernels_and_copies(scripts):
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, device, microseconds, annotation=False):
        times = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=times)

    events = [
        event("aten::mm", cpu, 100), event("gemm", cuda, 30), event("Memcpy DtoD", cuda, 5),
        event("Optimizer.step#AdamW.step", cuda, 900, annotation=True),
    ]  # fmt: skip
    assert scripts("device_step").on_device(events) == {"kernels": 2, "busy": pytest.approx(35e-6)}


def test_behind_the_first_block_gradients_pass_what_they_pass_with_interventions(scripts, device_steps):
    count = scripts("device_step").count_flops
    plain, behind, bare = (
        count(device_steps[name].step)
        for name in (
            "reft plain target-only bf16", "B behind the first block, target-only bf16", "B target-only bf16"
        )
    )  # fmt: skip
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    block = 2 * 8 * 121 * weights  # the products of its backward pass
    assert bare - behind >= block
    assert 0 < plain - behind < block / 4  # the edits alone


def test_the_roofline_says_what_bounds_a_step(scripts):
    gpu = scripts("gpu")
    record = {"wall": [0.5, 0.4, 0.4], "flops": 2e12, "busy": None, "kernels": 2000}
    speeds = {"flops_per_second": 1e13, "bytes_per_second": 1e10}
    share, bound = gpu.roofline("x", record, speeds, weights=10**6)
    assert share["value"] == pytest.approx(0.5)  # 0.2 s of products in 0.4 s
    assert "bound by products" in bound["note"]
    _, bound, works = gpu.roofline("x", {**record, "busy": 0.3}, speeds, weights=15 * 10**8)
    assert bound["value"] == pytest.approx(0.75)  # 3 GB at 10 GB/s
    assert "bound by reading weights" in bound["note"]
    assert works["value"] == pytest.approx(0.75)
    assert works["note"] == "2,000 kernels and copies of 300 ms together"


def test_goals_of_memory_are_of_the_shape_for_which_they_were_set(scripts):
    gpu = scripts("gpu")
    pair = next(pair for pair in gpu.PAIRS if pair.memory is not None)
    record = {"wall": [1.0], "peak_memory_bytes": 100, "kernels": 7}
    records = {pair.above: record, pair.below: record}
    goals = {
        shape: [one["goal"] for one in gpu.figures_of(shape, pair, records, "kernels")]
        for shape in ("135M", "8B")
    }
    assert goals == {"135M": [None, pair.memory], "8B": [None, None]}


def test_a_pair_that_fails_is_left_out_and_what_was_measured_is_written(scripts, monkeypatch, tmp_path):
    gpu = scripts("gpu")
    record = {"wall": [1.0], "cpu": [1.0], "peak_memory_bytes": 100, "kernels": 7, "flops": 10, "busy": None}
    written = []

    def interleaved(script, variants, *args, **kwargs):
        if "lora r8 bf16" in variants:
            raise RuntimeError("the worker 'lora r8 bf16' ended with code 1")
        if (tmp_path / "gpu.json").exists():
            written.append(len(json.loads((tmp_path / "gpu.json").read_text())["records"]))
        return dict.fromkeys(variants, record)

    monkeypatch.setattr(gpu, "interleaved", interleaved)
    monkeypatch.setattr(gpu, "device_limits", lambda args: {"flops_per_second": 1.0, "bytes_per_second": 1.0})
    line = ["gpu.py", "--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path / "gpu")]
    monkeypatch.setattr(sys, "argv", line)
    assert gpu.main() == 1
    assert written[:3] == [2, 4, 6]  # after every pair
    left_out = json.loads((tmp_path / "gpu.json").read_text())["left_out"]
    assert left_out["pyreft"] == "no --pyreft-python"
    assert left_out["tiny: step of LoRA r=8 / ours"] == "the worker 'lora r8 bf16' ended with code 1"
    assert "step of LoRA r=32 / ours" in (tmp_path / "gpu.md").read_text()


def test_an_environment_without_a_gpu_is_left_out(scripts):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    reason = scripts("gpu").why_not(sys.executable)
    assert reason == f"its torch {torch.__version__.split('+')[0]} finds no CUDA device"
    assert "No such file" in scripts("gpu").why_not("nowhere/python")


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_timed_there(scripts, tmp_path):
    from safetensors.torch import save_file

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


def test_weights_that_a_step_reads_leave_an_untied_embedding_out(scripts):
    gpu = scripts("gpu")
    embedding = 2 * gpu.TINY["vocab_size"] * gpu.TINY["hidden_size"]
    untied = {**gpu.TINY, "tie_word_embeddings": False}
    assert gpu.weight_bytes(gpu.TINY) == gpu.weight_bytes(untied) > embedding


def test_without_a_gpu_the_command_says_so(scripts, monkeypatch, caplog):
    gpu = scripts("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no CUDA device: nothing is measured" in caplog.text


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
    assert (
        "| step" in (tmp_path / "step.md").read_text()
        or "training step" in (tmp_path / "step.md").read_text()
    )

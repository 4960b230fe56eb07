"""The commands: mistakes exit with status 2 and the closest name, correct arguments reach the run."""

import datetime
import gc
import importlib.util
import io
import json
import logging
import subprocess
import sys
import types
from operator import attrgetter
from pathlib import Path
from typing import get_args

import hydra.core.utils
import pytest
import short_runs
import torch

import reft_lightning.runs
from reft_lightning import cli
from reft_lightning.adapters.reft.config import CONFIG_FILE
from reft_lightning.config import compose
from reft_lightning.config.explain import ALIASES
from reft_lightning.config.schema import BOUNDS, Config, keys
from reft_lightning.runs import sweep


@pytest.fixture
def refuse(capsys):
    """Call preflight with invalid arguments; return its message."""

    def call(*argv):
        with pytest.raises(SystemExit) as left:
            compose.preflight(argv)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert len(said.splitlines()) <= 4
        return said

    return call


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replace ``experiment`` by a recorder, and run the command in its own folder."""
    fake = types.ModuleType("reft_lightning.runs.experiment")
    fake.calls, fake.experiments, fake.commands = [], [], []

    def run(config, run_dir, experiment=None, command=(), lane=None):
        fake.commands.append(command)
        fake.calls.append((config, run_dir))
        fake.experiments.append(experiment)
        return {"metrics": {"val/accuracy": config.optimizer.lr}, "monitor": "val/accuracy"}

    def evaluate(run_dir, split="validation", limit=None, rows=(), evaluate_base=False):
        fake.calls.append((run_dir, split, limit, rows, evaluate_base))
        return {"metrics": {}}

    fake.run = run
    again = types.ModuleType("reft_lightning.runs.evaluate")
    again.evaluate = evaluate
    monkeypatch.setitem(sys.modules, "reft_lightning.runs.evaluate", again)
    monkeypatch.setitem(sys.modules, "reft_lightning.runs.experiment", fake)
    monkeypatch.setattr(reft_lightning.runs, "experiment", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    with short_runs.log_kept():
        yield fake.calls


def command(monkeypatch, function, *argv):
    monkeypatch.setattr(sys, "argv", ["reft", *argv])
    function()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("+optimizer.lrr=1", "optimizer.lr"),
        ("++optimizer.lrr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("modle=tiny_random", "model"),
        ("trainr.max_epochs=1", "trainer.max_epochs"),
        ("intervention.rnak=2", "intervention.rank"),
        ("sede=1", "seed"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("learning_rate=1", "optimizer.lr"),
        ("batch_size=4", "data.batch_size"),
        ("data.train_batch_size=4", "data.batch_size"),
        ("trainer.batch_size=4", "data.batch_size"),
        ("trainer.epochs=2", "trainer.max_epochs"),
        ("num_train_epochs=2", "trainer.max_epochs"),
    ],
)
def test_a_typo_on_the_command_line_names_the_nearest_key(refuse, written, meant):
    said = refuse("model=tiny_random", written)
    assert said.startswith(f"{written}: unknown key")
    assert f"did you mean {meant!r}?" in said


@pytest.mark.parametrize("written", ["optimizer.frobnicate=1", "optimizer.ratio=1", "xyz=1"])
def test_what_is_like_no_key_gets_no_guess(refuse, written):
    said = refuse("model=tiny_random", written)
    assert said.startswith(f"{written}: unknown key {written.partition('=')[0]!r}\n")
    assert "did you mean" not in said


def test_every_alias_stands_for_a_key_and_is_none():
    known = keys()
    for alias, key in ALIASES.items():
        assert key in known
        assert alias not in {name.rpartition(".")[2] for name in known}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("intervention=loref", "intervention=loreft"),
        ("model=tiny", "model=tiny_random"),
        ("data=bolq", "data=boolq"),
        ("experiment=paper/commonsense_llama_7b_lorft", "experiment=paper/commonsense_llama_7b_loreft"),
    ],
)
def test_an_unknown_option_of_a_group_names_the_nearest_and_all(refuse, written, meant):
    said = refuse("model=tiny_random", written)
    assert f"did you mean {meant!r}?" in said
    assert meant.partition("=")[2] in said.splitlines()[1]


@pytest.mark.parametrize("written", ["callbacks=[0]", "logger=[csv,[wandb]]", "logger=[null]"])
def test_an_option_of_a_group_that_is_no_text_is_refused(refuse, written):
    assert refuse("model=tiny_random", written).startswith(
        f"{written}: {written.partition('=')[0]} has no option "
    )


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("optimizer.lr=fast", "must be a number"),
        ("seed=1.5", "must be an integer"),
        ("test=perhaps", "must be true or false"),
        ("data.tasks=boolq", "must be a list, such as data.tasks=[a,b]"),
        ("data.tasks=0.9", "must be a list"),
        ("scheduler=linaer", "did you mean 'scheduler=linear'?"),
        ("model.dtype=float8", "must be one of float32, bfloat16, float16"),
    ],
)
def test_a_wrong_value_says_what_the_key_takes(refuse, written, kind):
    said = refuse("model=tiny_random", written)
    assert written.partition("=")[0] in said
    assert kind in said


def test_an_unknown_intervention_or_option_of_it_names_the_nearest(refuse):
    assert "did you mean 'loreft'?" in refuse("model=tiny_random", "intervention.method=loreff")
    said = refuse("model=tiny_random", "+intervention.options.dropuot=0.1")
    assert "loreft takes no option 'dropuot'; did you mean 'dropout'?" in said


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("data.batch_size=0", "data.batch_size must be at least 1; got 0"),
        ("data.limit_test=0", "data.limit_test must be at least 1; got 0"),
        ("data.num_workers=-1", "data.num_workers must be at least 0; got -1"),
        ("seed=-1", "seed must be in 0..4294967295; got -1"),
        ("optimizer.lr=0", "optimizer.lr must be above 0; got 0.0"),
        ("optimizer.lr=nan", "optimizer.lr must be above 0; got nan"),
        ("decoding.top_p=2", "decoding.top_p must be above 0 and at most 1; got 2.0"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be at least 1; got 0"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1; got 0"),
        ("kept.limit_gb=inf", "kept.limit_gb must be at least 0; got inf"),
        (
            "intervention.layers=null",
            "intervention.layers must be all, a list of ids, or settings by layer; got null",
        ),
        ("intervention.tied=null", "intervention.tied must be all, group or position; got null"),
        ("trainer.barebones=true", "trainer.barebones=True logs nothing"),
        ("trainer.strategy=ddp_spawn", "Write trainer.strategy=ddp"),
        ("trainer.precision=bf16-true", "Write model.dtype=bfloat16 for the base model"),
        ("trainer.precision=64", "Write model.dtype=bfloat16 for the base model"),
        ("trainer.deterministic=tru", "trainer.deterministic must be true, false or warn; got 'tru'"),
        ("trainer.use_distributed_sampler=true", "would split the rows a second time"),
        (
            "trainer.max_time=5",
            "trainer.max_time must be a string DD:HH:MM:SS, or a dictionary such as {hours: 3}",
        ),
    ],
)
def test_a_number_or_a_word_that_cannot_be_is_answered_before_torch_is_imported(refuse, written, expected):
    assert expected in refuse("model=tiny_random", written)


def test_each_bound_is_that_of_a_number():
    assert {
        name: keys()[name] for name in BOUNDS if not ({int, float} & {keys()[name], *get_args(keys()[name])})
    } == {}
    for name, bounds in BOUNDS.items():  # the defaults lie within
        value = attrgetter(name)(Config())
        assert value is None or bounds.allow(value), name


@pytest.mark.parametrize("heads", ["classifier", "1", "[1]", "{a: 1}"])
def test_heads_are_auto_or_a_list_of_paths(refuse, heads):
    said = refuse("model=tiny_random", f"intervention.heads={heads}")
    assert "intervention.heads must be auto or a list of module paths" in said
    for right in ("auto", "[lm_head]", "null"):
        compose.preflight(["model=tiny_random", f"intervention.heads={right}"])


@pytest.mark.parametrize("written", ["intervention.options.x=1", "intervention.options={x:1}"])
def test_a_new_entry_of_a_dictionary_takes_a_plus(refuse, written):
    assert "+intervention.options.x=" in refuse("model=tiny_random", written)


# What users of Hydra do.


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["logger=null"],
            "logger=null: logger must be one of csv, mlflow, tensorboard, wandb; to leave it out, write ~logger",
        ),
        (["scheduler=null"], "scheduler=null: scheduler must be one of constant, cosine, linear\n"),
        (
            ["-m", "seed=interval(1,3)"],
            "seed=interval(1,3): the default sweeper cannot draw from an interval",
        ),
        (["-m", "seed=range(1,1)"], "seed=range(1,1) matches no value"),
        (["-m", "optimizer=glob(x*)"], "matches no value; optimizer is one of adafactor, adamw"),
        (["-m", "--cfg", "job"], "leave out --multirun"),
        (["--config-name", "mine"], "reft-train --config-dir FOLDER experiment=NAME"),
        (["--config-path", "mine"], "reft-train --config-dir FOLDER experiment=NAME"),
        (["ckpt_path=last.ckpt"], "did you mean 'resume'?"),
        (["~optimizer.lr"], "set optimizer.lr=null"),
        (["seed=1,2"], "add --multirun"),
        (["optimizer.lr=[1"], "'optimizer.lr=[1'"),
    ],
)
def test_what_hydra_has_and_this_has_not_is_said(refuse, argv, expected):
    assert expected in refuse(*argv, "model=tiny_random")


@pytest.mark.parametrize("content", ["seed: 3\n", "defaults:\n  - override /model: tiny_random\n"])
def test_an_experiment_without_its_first_line_is_told_of_it(refuse, tmp_path, content):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(content)
    said = refuse("--config-dir", str(tmp_path), "experiment=mine", "model=tiny_random")
    assert f"{file}: an experiment must begin with the line `# @package _global_`" in said


def test_a_sweep_finds_files_of_ones_own(monkeypatch, runs):
    for name, seed in (("mine_a", 3), ("mine_b", 4)):
        file = Path("own/experiment") / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"# @package _global_\ndefaults:\n  - override /model: tiny_random\n  - _self_\nseed: {seed}\n"
        )
    command(monkeypatch, cli.train, "-m", "--config-dir", "own", "experiment=glob(mine*)")
    assert [config.seed for config, _ in runs] == [3, 4]


def test_flags_may_stand_among_the_overrides(monkeypatch, runs, capsys):
    command(monkeypatch, cli.train, "model=tiny_random", "--config-dir", ".", "seed=3", "-m", "test=false")
    assert [(config.seed, config.test) for config, _ in runs] == [(3, False)]
    capsys.readouterr()
    command(monkeypatch, cli.train, "model=tiny_random", "--cfg", "job", "seed=3", "--package", "seed")
    assert capsys.readouterr().out.strip() == "3"


def test_hydras_rerun_is_refused_because_it_would_write_into_the_folder_of_a_run(refuse):
    assert "to repeat a run, use the command in its results.json" in refuse(
        "--experimental-rerun", "x.pickle"
    )


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1"]])
def test_a_job_that_changes_its_folder_reads_files_from_where_it_was_started(monkeypatch, runs, sweep):
    Path("rows.csv").write_text("q,a\n1,2\n")
    rows = ["data=custom", "data.path=rows.csv", "data.prompt=q", "data.target=a"]
    command(monkeypatch, cli.train, *sweep, "model=tiny_random", *rows, "hydra.job.chdir=true")
    assert runs[0][0].data.path == str(Path("rows.csv").absolute())


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1"]])
def test_a_value_may_ask_hydra_for_its_folder(monkeypatch, runs, sweep):
    Path("rows.csv").write_text("q,a\n1,2\n")
    rows = ["data=custom", "data.path=${hydra:runtime.cwd}/rows.csv", "data.prompt=q", "data.target=a"]
    mine = "trainer.default_root_dir=${hydra:runtime.output_dir}/mine"
    command(monkeypatch, cli.train, *sweep, "model=tiny_random", *rows, mine)
    config, run_dir = runs[0]
    assert config.data.path == str(Path("rows.csv").absolute())
    assert config.trainer.default_root_dir == f"{run_dir}/mine"


def test_a_run_may_delete_its_experiment(monkeypatch, runs):
    command(monkeypatch, cli.train, "model=tiny_random", "~experiment")
    assert runs[0][1].parent == Path("outputs/run").absolute()
    assert sys.modules["reft_lightning.runs.experiment"].experiments == [None]


def test_no_arguments_say_which_models_and_experiments_there_are(refuse):
    said = refuse()
    assert "tiny_random" in said
    assert "model.name=OWNER/NAME" in said
    assert "quickstart" in said
    assert "paper/... (" in said  # large folders are counted
    assert "paper/gsm8k_direft_tuning" in refuse("experiment=paper/gsm8k")


def test_resume_beside_other_arguments_says_that_it_stands_alone(refuse):
    said = refuse("resume=outputs/mine", "seed=1")
    assert said.startswith("resume=outputs/mine takes no other arguments")
    assert "leave out seed=1" in said
    assert "no model was chosen" not in said


def test_a_source_says_what_it_needs(refuse):
    assert "write model.path=..." in refuse("model=stories260k")
    assert "write data.path=FOLDER" in refuse("model=tiny_random", "data.source=local")


def test_a_search_names_its_own_command(refuse):
    assert refuse("search=small_stsb") == (
        "search=small_stsb: search belongs to another command: reft-search search=small_stsb\n"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("optimizr: {lr: 1}", "unknown key 'optimizr'; did you mean 'optimizer'?"),
        ("optimizer: {lr: fast}", "optimizer.lr must be a number"),
        ("defaults: [override /intervention: loref]", "did you mean 'intervention=loreft'?"),
        ("defaults: [override /modle: tiny_random]", "unknown group 'modle'; did you mean 'model'?"),
        ("seed: [1", "line 2"),
    ],
)
def test_a_mistake_inside_a_yaml_file_names_the_file(refuse, tmp_path, content, expected):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{content}\n")
    model = [] if "modle" in content else ["model=tiny_random"]
    said = refuse("--config-dir", str(tmp_path), "experiment=mine", *model)
    assert str(file) in said
    assert expected in said


def test_every_choice_of_a_sweep_is_checked_before_the_first_job(refuse):
    said = refuse("-m", "model=tiny_random", "seed=1,2", "optimizer.lr=1e-3,fast")
    assert said.startswith("optimizer.lr=fast: optimizer.lr must be a number")
    assert "did you mean 'model=tiny_random'?" in refuse("-m", "model=tiny_random,tiny")


@pytest.mark.parametrize(
    "argv",
    [
        ["model=tiny_random"],
        ["-m", "model=tiny_random", "seed=1,2,3", "optimizer.lr=choice(1e-3,1e-4)", "intervention=glob(lo*)"],
        ["-m", "model=tiny_random", "optimizer.lr=interval(1e-4,1e-2)", "hydra.sweeper._target_=its.Sweeper"],
        ["model=tiny_random", "intervention.layers=[0,1]", "trainer.devices=2", "hydra.verbose=true"],
        ["--hydra-help"],
    ],
)
def test_correct_arguments_pass_in_silence(argv, capsys):
    compose.preflight(argv)
    assert capsys.readouterr() == ("", "")


def test_a_setting_of_interventions_is_to_be_left_out_of_a_baseline(refuse):
    said = refuse("model=tiny_random", "intervention=peft/lora", "intervention.rank=4")
    assert said == (
        "intervention.rank=4 does not apply to peft/lora, whose own settings belong in intervention.options: leave out "
        "intervention.rank\n"
    )


def test_what_an_experiment_sets_is_answered_with_the_argument_to_add(refuse):
    said = refuse("experiment=small/glue", "data.path=rows", "model=tiny_random", "intervention=peft/lora")
    assert said.startswith("intervention.positions=f3 intervention.rank=1 does not apply to peft/lora")
    assert said.endswith(
        "such as the experiment's, sets it: add intervention.positions=f7+l7 intervention.rank=8\n"
    )
    assert "leave" not in said
    compose.preflight(["experiment=small/glue", "data.path=rows", "model=tiny_random", "intervention=peft/lora",
                           *said.split(" add ")[1].split()])  # fmt: skip


@pytest.mark.parametrize("argv", [["optimizer.lrr=1"], ["intervention=peft/lora", "intervention.rank=4"]])
def test_a_typo_is_answered_without_importing_torch(argv):
    code = (
        "import sys\n"
        "from reft_lightning.config import compose\n"
        "try:\n"
        "    compose.preflight(['model=tiny_random', *sys.argv[1:]])\n"
        "except SystemExit as left:\n"
        "    assert left.code == 2\n"
        "else:\n"
        "    raise AssertionError('the arguments passed')\n"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_train_runs_one_job_in_its_own_folder(monkeypatch, runs):
    command(monkeypatch, cli.train, "experiment=debug", "data.path=rows", "seed=5")
    ((config, run_dir),) = runs
    assert sys.modules["reft_lightning.runs.experiment"].experiments == ["debug"]
    assert isinstance(config, Config)
    assert (config.seed, config.model.name, config.data.path) == (5, "tiny_random", "rows")
    assert run_dir.parent == Path.cwd() / "outputs" / "debug"
    assert (run_dir / ".hydra" / "overrides.yaml").is_file()


def test_a_gpu_that_is_not_here_is_refused_before_the_run_is_imported(monkeypatch, runs, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "model=tiny_random", "trainer=gpu_bf16")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"trainer.accelerator=gpu: torch {torch.__version__} finds no GPU on this machine")
    assert "trainer=cpu" in said
    assert runs == []


def test_a_name_replaces_the_experiment_in_the_run_folder(monkeypatch, runs):
    command(monkeypatch, cli.train, "experiment=debug", "data.path=rows", "name=mine")
    assert runs[0][1].parent.name == "mine"


LONG = ["model=tiny_random", "data=boolq", "data.path=rows", "logger=wandb", "logger.wandb.group=a/b"] + [
    f"data.{name}=10" for name in ("limit_train", "limit_validation", "limit_test", "batch_size")
]


@pytest.mark.parametrize(
    ("swept", "names"),
    [
        (
            ["intervention=loreft,direft", "seed=choice(1,2)"],
            [
                f"{i}_intervention={m},seed={s}"
                for i, (m, s) in enumerate([("loreft", 1), ("loreft", 2), ("direft", 1), ("direft", 2)])
            ],
        ),
        (["data.mixture=a/x.json,b/x.json"], ["0_data.mixture=a_x.json", "1_data.mixture=b_x.json"]),
    ],
)
def test_a_sweep_gives_each_job_a_folder_named_by_what_differs(monkeypatch, runs, swept, names):
    command(monkeypatch, cli.train, "-m", *LONG, *swept)
    assert [run_dir.name for _, run_dir in runs] == names
    assert len({run_dir.parent for _, run_dir in runs}) == 1


def test_the_folder_of_a_job_has_a_name_that_file_systems_take_in_any_script(monkeypatch, runs):
    command(monkeypatch, cli.train, "-m", "model=tiny_random", f"data.system_prompt='{'質' * 100}','b'")
    names = [run_dir.name for _, run_dir in runs]
    assert names[0].startswith("0_data.system_prompt='質質")
    assert len(names[0].encode()) <= 150


class Frozen(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_runs_of_one_second_have_folders_of_their_own(monkeypatch, runs, sweep):
    monkeypatch.setattr(hydra.core.utils, "datetime", Frozen)
    count = 2 if sweep else 3
    for _ in range(count):
        command(monkeypatch, cli.train, *sweep, "model=tiny_random")
    name = "multirun_2026-01-02_03-04-05" if sweep else "2026-01-02_03-04-05"
    folders = [run_dir.parent if sweep else run_dir for _, run_dir in runs]
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"][:count]
    assert all((folder / ("multirun.yaml" if sweep else ".hydra")).exists() for folder in folders)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}])
@pytest.mark.parametrize(
    ("argv", "key"), [([], "run"), (["resume=auto"], "run"), (["-m", "seed=1,2"], "sweep")]
)
def test_ranks_that_a_cluster_starts_need_a_folder(monkeypatch, runs, capsys, variables, argv, key):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "model=tiny_random", *argv)
    assert left.value.code == 2
    assert f"add hydra.{key}.dir=FOLDER" in capsys.readouterr().err
    assert not Path("outputs").exists()
    for _ in range(2):
        command(monkeypatch, cli.train, "model=tiny_random", *argv, f"hydra.{key}.dir=mine")
    assert {run_dir.parts[len(Path.cwd().parts)] for _, run_dir in runs} == {"mine"}


def test_a_sweep_under_torchrun_is_refused(monkeypatch, runs, capsys):
    """The processes of a second job waited for the addresses of the first."""
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "model=tiny_random", "-m", "seed=1,2", "hydra.sweep.dir=mine")
    assert left.value.code == 2
    assert "a sweep cannot run under torchrun: leave it out" in capsys.readouterr().err


def test_ranks_that_a_cluster_starts_share_the_folder_of_the_first(monkeypatch, runs):
    monkeypatch.setattr(hydra.core.utils, "datetime", Frozen)
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        command(monkeypatch, cli.train, "model=tiny_random")
    assert len({run_dir for _, run_dir in runs}) == 1


@pytest.mark.parametrize(
    ("argv", "taken"),
    [(["hydra.run.dir=mine"], "mine"), (["-m", "seed=1,2", "hydra.sweep.dir=mine"], "mine/0_seed=1")],
)
def test_a_folder_with_a_complete_run_is_given_to_no_other(monkeypatch, runs, capsys, argv, taken):
    folder = Path(taken)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"status": "complete"}')
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "model=tiny_random", *argv)
    assert left.value.code == 2
    assert f"{taken} holds a complete run" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["results.json"]
    command(monkeypatch, cli.train, "model=tiny_random", *argv, "overwrite=true")
    assert runs


@pytest.mark.parametrize(
    ("file", "argv"),
    [
        ("mine", ["hydra.run.dir=mine"]),
        ("mine", ["hydra.run.dir=mine/1"]),
        ("mine", ["-m", "seed=1,2", "hydra.sweep.dir=mine"]),
        ("mine/2_seed=2,test=False", ["-m", "seed=1,2", "test=false,true", "hydra.sweep.dir=mine"]),
        ("mine/1_seed=2", ["-m", "seed=1,2", "hydra.sweep.dir=mine", "resume=auto"]),
        ("outputs", []),
        ("outputs/mine", ["name=mine", "-m", "seed=1,2"]),
    ],
)
def test_a_file_where_a_run_would_write_is_named_before_anything_is_written(
    monkeypatch, runs, capsys, file, argv
):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).touch()
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "model=tiny_random", *argv)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"{file} is a file, not a folder")
    assert not runs


def test_a_sweep_may_lie_next_to_other_files(monkeypatch, runs):
    Path("mine").mkdir()
    Path("mine/0_seed=1.tar").touch()
    command(monkeypatch, cli.train, "model=tiny_random", "-m", "seed=1,2", "hydra.sweep.dir=mine")
    assert len(runs) == 2


def test_a_sweep_may_lie_next_to_other_runs(monkeypatch, runs):
    Path("mine/other").mkdir(parents=True)
    Path("mine/other/results.json").write_text('{"status": "complete"}')
    command(monkeypatch, cli.train, "model=tiny_random", "--multirun", "seed=1,2", "hydra.sweep.dir=mine")
    assert [config.seed for config, _ in runs] == [1, 2]


def test_the_jobs_of_a_sweep_are_checked_before_the_first(monkeypatch, runs, capsys):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "-m", "model=tiny_random", "seed=1,2", "intervention.rank=4,9999,8",
                "intervention.layers=[0],[0,7]")  # fmt: skip
    assert left.value.code == 2
    first, *bad = capsys.readouterr().err.splitlines()
    assert first == "nothing was started: 4 of 7 choices cannot run"
    assert bad[0].startswith("seed=1 intervention.rank=4 intervention.layers=[0,7]: ")
    assert bad[1].startswith("seed=1 intervention.rank=9999 intervention.layers=[0]: rank must lie in 1..32")
    assert len(bad) == 4
    assert runs == []
    assert not Path("outputs").exists()


def test_choices_are_checked_together_where_one_may_not_suit_another(monkeypatch, runs, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, cli.train, "-m", "model=tiny_random", "intervention.rank=4,33",
                "model.config.hidden_size=32,64")  # fmt: skip
    said = capsys.readouterr().err
    assert "1 of 4 choices cannot run" in said
    assert "intervention.rank=33 model.config.hidden_size=32: rank must lie in 1..32" in said


def test_a_run_knows_the_command_that_repeats_it(monkeypatch, runs, tmp_path):
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "mine.yaml").write_text("defaults: [boolq]\nlimit_train: 5\n")
    command(monkeypatch, cli.train, "--config-dir", "own", "-m", "model=tiny_random", "data=mine", "seed=1,2",
            "intervention.layers=[0,1]", "data.prompt='{a}, ${oc.env:HOME}'", "hydra.sweep.dir=a b")  # fmt: skip
    for (config, _), words in zip(runs, sys.modules["reft_lightning.runs.experiment"].commands, strict=True):
        assert words[0] == "reft-train"
        (again,) = compose.preflight(words[1:]).runs.values()
        assert again == config


def test_a_job_returns_the_monitored_metric_for_sweepers(monkeypatch, runs):
    returned = []
    monkeypatch.setattr(cli, "_train", lambda *given, train=cli._train: returned.append(train(*given)))
    command(monkeypatch, cli.train, "-m", "model=tiny_random", "optimizer.lr=0.5,0.25")
    assert returned == [0.5, 0.25]


def test_what_hydra_cannot_read_without_quotes_is_shown_with_them(refuse):
    said = refuse("model=tiny_random", "data.prompt=质问")
    assert said.endswith("""or letters other than a to z: data.prompt="'质问'"\n""")
    (run,) = compose.preflight(
        ["model=tiny_random", "data=custom", "data.path=x", "data.prompt='质问'"]
    ).runs.values()
    assert run.data.prompt == "质问"


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"]])
def test_a_folder_is_not_named_after_what_hydra_knows_later(refuse, words):
    said = refuse(*words, "model=tiny_random", "name=${hydra:job.num}")
    assert said.startswith("name=${hydra:job.num}: the folder is named before Hydra knows this value")


@pytest.mark.parametrize("words", [["launcher=joblib"], ["-m", "launcher=joblib,shared_base", "seed=1,2"]])
def test_a_launcher_is_one_and_for_sweeps(monkeypatch, runs, capsys, words):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, cli.train, "model=tiny_random", *words)
    assert ended.value.code == 2
    assert "a launcher starts the jobs of a sweep: give exactly one, with -m" in capsys.readouterr().err


def test_a_sweep_ends_with_its_jobs_that_failed_and_the_command_of_its_report(monkeypatch, runs, capsys):
    fake = sys.modules["reft_lightning.runs.experiment"]
    fake.SetupError, run = ValueError, fake.run

    def fail(config, folder, *rest, **named):
        if config.seed == 2:
            raise fake.SetupError("no rows")
        ended = {"status": "complete"}
        if config.seed == 3:
            ended = {"status": "stopped", "error": "out of memory"}
        (folder / "results.json").write_text(json.dumps(ended))
        return run(config, folder, *rest, **named)

    monkeypatch.setattr(fake, "run", fail)
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "-m", "model=tiny_random", "seed=1,2,3,4")
    assert left.value.code == 1
    (folder,) = Path("outputs/run").iterdir()
    said, errors = capsys.readouterr()
    assert "this job cannot start: no rows" in said  # the log, at once
    found = f"2 jobs are complete, 2 of those that started are not; to compare them: reft-report {folder}"
    assert said.splitlines()[-1] == found
    assert "no rows\n" in errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-2:] == ["1_seed=2: ended without results", "2_seed=3: stopped: out of memory"]


def test_one_job_is_said_in_the_singular(tmp_path, capsys):
    (tmp_path / "0_seed=1").mkdir()
    (tmp_path / "0_seed=1" / "results.json").write_text('{"status": "complete"}')
    sweep.say_what_came_out(tmp_path)
    assert capsys.readouterr().out.startswith("1 job is complete; to compare them: reft-report")


def test_a_job_knows_in_another_process_what_its_sweep_changes(monkeypatch, runs):
    import pickle

    monkeypatch.setattr(sys, "argv", ["reft-train", "--config-dir", "mine", "-m", "seed=1,2"])
    monkeypatch.setattr(compose, "_swept", {"seed"})
    carried = pickle.dumps(sweep.Job(cli._train))
    monkeypatch.setattr(sys, "argv", ["_submit.py", "a folder"])
    compose.sweep_over(())
    job = pickle.loads(carried)
    assert sys.argv == ["_submit.py", "--config-dir", "mine", "-m", "seed=1,2"]
    assert compose.differing(["model=tiny_random", "seed=1"]) == ["seed=1"]
    assert (job.train, job.elsewhere, job.requeued) == (cli._train, True, False)


def test_a_launcher_without_its_plugin_names_what_to_install(refuse):
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("the plugin for Ray is installed")
    assert refuse("model=tiny_random", "launcher=ray") == (
        "launcher=ray needs a Hydra plugin: pip install 'ray[default]' && pip install --no-deps hydra-ray-launcher\n"
    )
    assert "did you mean 'launcher=joblib'" in refuse("model=tiny_random", "launcher=jolib")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "finished"
    path.mkdir()
    (path / "config.yaml").write_text("seed: 1\n")
    return path


def test_eval_reads_validation_unless_told_otherwise(monkeypatch, runs, folder):
    command(monkeypatch, cli.evaluate, f"run={folder}")
    command(monkeypatch, cli.evaluate, f"run={folder}", "split=test", "limit=10")
    command(monkeypatch, cli.evaluate, "decoding.num_beams=2", "data.path=x", f"run={folder}", "data=custom",
            "evaluate_base=true")  # fmt: skip
    others = ["data=custom", "decoding.num_beams=2", "data.path=x"]
    assert runs == [
        (folder, "validation", None, [], False),
        (folder, "test", 10, [], False),
        (folder, "validation", None, others, True),
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("split=tset", "did you mean 'test'?"),
        ("limt=3", "did you mean 'limit'?"),
        ("limit=-3", "an integer, at least 1; got '-3'"),
        ("data.path=x", "data.path=x applies only to rows other than the run's: add data=NAME"),
        (
            ["data=custom", "limit=3", "data.limit_validation=4"],
            "limit=3 and data.limit_validation=4 both set the number of rows: leave one of them out",
        ),
        ("test", "key=value"),
        ("run=", "run=FOLDER is missing"),
        ("run=finishd", "no such folder; did you mean 'finished'?"),
        ("run=.", "it has no config.yaml"),
    ],
)
def test_eval_explains_a_wrong_argument(monkeypatch, runs, folder, capsys, argument, expected):
    arguments = [argument] if isinstance(argument, str) else argument
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.evaluate, "run=finished", *arguments)
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert expected in said
    assert "usage: reft-eval" in said
    assert runs == []


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2", "RANK": "1"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}]
)
def test_several_processes_are_not_left_to_evaluate_the_same_run(
    monkeypatch, runs, folder, capsys, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        command(monkeypatch, cli.evaluate, f"run={folder}")
    assert "reft-eval runs in one process" in capsys.readouterr().err
    assert runs == []


def test_a_shell_that_salloc_opens_on_a_node_is_one_process(monkeypatch, runs, folder):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967290"}.items():  # what SLURM 22 sets
        monkeypatch.setenv(name, value)
    command(monkeypatch, cli.evaluate, f"run={folder}")
    assert runs


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_logs_in_the_first_process_only(monkeypatch, capsys, rank):
    @cli._command("usage: logs")
    def logs(argv):
        logging.getLogger("reft_lightning.runs").info("begun")
        logging.getLogger("reft_lightning.runs").error("stopped")

    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setenv("LOCAL_RANK", rank)
    command(monkeypatch, logs, "resume=mine")
    said = capsys.readouterr().err
    assert ("begun" in said) == (rank == "0")
    assert "stopped" in said


@pytest.mark.parametrize(("errors", "shown"), [("strict", "?"), ("backslashreplace", "\\ufffd")])
def test_characters_that_the_terminal_lacks_are_question_marks_or_as_the_user_says(
    errors, shown, monkeypatch
):
    @cli._command("usage: shows")
    def shows(argv):
        sys.stdout.write("Größe \ufffd\n")

    output = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors=errors)
    monkeypatch.setattr(sys, "stdout", output)
    command(monkeypatch, shows, "resume=mine")
    output.flush()
    assert output.buffer.getvalue() == f"Größe {shown}\n".encode("latin-1")


@pytest.mark.parametrize("run", [cli.evaluate, cli.chat])
@pytest.mark.parametrize("inside", [True, False])
def test_an_adapter_that_is_given_for_a_run_is_told_from_one(run, inside, monkeypatch, runs, folder, capsys):
    adapter = folder / "adapter" if inside else folder.parent / "alone"
    adapter.mkdir()
    (adapter / CONFIG_FILE).write_text("{}")
    with pytest.raises(SystemExit):
        command(monkeypatch, run, f"run={adapter}")
    said = (
        f"it is the adapter of a run: write run={folder}"
        if inside
        else "an adapter without its run: use reft-serve"
    )
    assert said in capsys.readouterr().err
    assert runs == []


def test_resume_names_its_own_key_where_the_folder_is_missing(monkeypatch, runs, folder, capsys):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "resume=finishd")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("resume=finishd: no such folder; did you mean 'finished'?")
    assert runs == []


def test_chat_hands_its_arguments_on(monkeypatch, folder):
    fake = types.ModuleType("reft_lightning.runs.chat")
    calls = []
    fake.main = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "reft_lightning.runs.chat", fake)
    monkeypatch.setattr(reft_lightning.runs, "chat", fake, raising=False)
    command(monkeypatch, cli.chat, f"run={folder}", "template=chat", "max_new_tokens=8")
    assert calls == [(folder, 8, "chat")]


COMMANDS = [
    cli.train, cli.evaluate, cli.chat, cli.inspect, cli.judge, cli.search, cli.report, cli.dashboard, cli.serve,
    cli.convert,
]  # fmt: skip


@pytest.mark.parametrize("function", COMMANDS)
def test_help_fits_a_screen_and_says_what_the_command_does_with_examples(monkeypatch, capsys, function):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, function, "--help")
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23  # and the prompt
    assert max(map(len, lines)) <= 100
    name = lines[0].partition(":")[0]
    assert lines[1].startswith(f"usage: {name} ")
    examples = lines[lines.index("examples:") + 1 :]
    assert sum(f"{name} " in line for line in examples if line.startswith("  ")) >= 2


def test_a_flag_of_another_grammar_is_answered_in_one_line(monkeypatch, runs, capsys):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, "--model", "tiny_random")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "without dashes: model=VALUE" in said
    assert len(said.splitlines()) == 1


def test_a_folder_without_its_key_is_told_the_key(monkeypatch, runs, folder, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, cli.evaluate, str(folder))
    assert f"write a folder as run={folder}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["model=tiny_random", "--help"]])
def test_help_of_training_prints_the_usage_and_the_groups(monkeypatch, runs, capsys, argv):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, cli.train, *argv)
    assert left.value.code == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "usage: reft-train model=NAME" in said.out
    assert "reft-train resume=FOLDER" in said.out
    lines = said.out.splitlines()
    named = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {"model", "intervention", "data", "trainer", "experiment"} <= named
    assert "smollm2_135m" in said.out
    assert sum(line.startswith("  reft-train ") for line in lines) >= 5
    assert runs == []


def test_ones_own_intervention_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(
        "import torch\nimport reft_lightning as rl\n\n\n"
        "class Scaled(rl.Intervention):\n"
        "    def __init__(self, dim, **settings):\n"
        "        super().__init__(dim, **settings)\n"
        "        self.s = torch.nn.Parameter(torch.ones(dim))\n\n"
        "    def edit(self, h):\n"
        "        return (self.s - 1) * h\n"
    )
    data = short_runs.write_rows(tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ("intervention.method=my_module.Scaled", "intervention.rank=null", "trainer.max_epochs=1")
    with short_runs.log_kept():
        command(monkeypatch, cli.train, *short_runs.arguments(data), *own, "hydra.run.dir=run")
    sys.modules.pop("my_module")
    values = short_runs.results(tmp_path / "run")
    assert values["method"] == "my_module.Scaled"
    assert values["trainable_parameters"] == 2 * 32


def test_garbage_is_not_looked_for_while_torch_is_first_imported(monkeypatch):
    frozen = []  # neither frozen nor unfrozen for real: the objects that the tests have frozen stay frozen
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.delitem(sys.modules, "torch")
    with cli.heavy_imports():
        assert not gc.isenabled()
        assert frozen == []
    assert gc.isenabled()
    assert frozen == [False]


def test_garbage_is_looked_for_when_torch_is_there_already():
    # the jobs of a sweep: what the first one leaves must be collected
    assert "torch" in sys.modules
    frozen = gc.get_freeze_count()
    with cli.heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_folder_of_a_sweep_is_a_folder_though_its_name_has_a_sign_of_equality(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "0_seed=1"
    folder.mkdir()
    with pytest.raises(SystemExit):
        command(monkeypatch, cli.inspect, str(folder))
    said = capsys.readouterr().err
    assert "unknown argument" not in said
    assert str(folder) in said

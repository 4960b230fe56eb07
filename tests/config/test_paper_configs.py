"""The experiments of the paper: each header quotes the numbers of `paper.csv`, each setting is the paper's.

Source: Wu et al. 2024, arXiv:2404.03592 v3. Numbers: Tables 1-4, 13-15 and 17. Settings: Tables 9-12 (GLUE) and the
command of the authors' README (instruction tuning).
"""

import re

import pytest

from reft_lightning.config.compose import compose, config_dir
from reft_lightning.reporting.paper.published import AVERAGE, GROUP, read_rows

CONF = config_dir() / "experiment"
ROWS = {row.experiment: row for row in read_rows()}
INSTRUCTION = [name for name, row in ROWS.items() if row.table == 3]
GLUE = "MNLI SST-2 MRPC CoLA QNLI QQP RTE STS-B"
# Tables 9 to 12, tasks in the order above
GLUE_SETTINGS = {
    ("base", "loreft"): {
        "positions": "f1 f3 f3 f3 f11 f11 f3 f3",
        "dropout": ".05 .10 .05 .20 .05 .05 .05 .05",
        "lr": "6e-4 6e-4 3e-4 4e-4 9e-4 6e-4 9e-4 6e-4",
        "weight_decay": "0 0 0 0 0 0 0 0",
        "warmup": ".06 .1 0 .005 .1 0 0 .03",
        "epochs": "40 40 40 60 20 40 60 60",
        "batch": "32 32 32 32 32 32 32 32",
    },
    ("large", "loreft"): {
        "positions": "f1 f3 f3 f3 f11 f11 f3 f3",
        "dropout": ".05 .05 .20 .20 .05 .05 .05 .05",
        "lr": "6e-4 6e-4 3e-4 1e-4 9e-4 6e-4 6e-4 8e-4",
        "weight_decay": "0 0 0 0 0 0 0 0",
        "warmup": "0 .1 .06 .2 .1 .06 0 .2",
        "epochs": "20 20 30 30 20 20 30 30",
        "batch": "32 32 32 32 32 32 32 32",
    },
    ("base", "direft"): {
        "positions": "f1 f3 f5 f1 f11 f11 f1 f3",
        "dropout": ".05 .10 .05 0 .05 .05 0 .05",
        "lr": "6e-4 6e-4 3e-4 6e-4 9e-4 6e-4 9e-4 6e-4",
        "weight_decay": "0 0 0 .04 0 0 .04 0",
        "warmup": ".06 .1 .1 0 .1 0 0 .03",
        "epochs": "40 40 40 60 20 40 60 60",
        "batch": "32 32 32 32 32 32 8 32",
    },
    ("large", "direft"): {
        "positions": "f1 f3 f1 f1 f11 f7 f3 f3",
        "dropout": ".05 .05 .10 .15 .05 .05 .05 .05",
        "lr": "6e-4 6e-4 9e-4 9e-4 9e-4 9e-4 6e-4 8e-4",
        "weight_decay": "0 0 0 0 0 0 .006 0",
        "warmup": "0 .1 0 0 .1 .1 0 .1",
        "epochs": "20 20 50 60 20 20 30 30",
        "batch": "32 32 32 32 32 32 32 32",
    },
}
UNPRINTED = {f"{GROUP}/gsm8k_direft_tuning"}  # Table 6 prints a search space


def glue_files():
    """Yield (experiment, task as printed, its place in the order of the tables, size, method)."""
    for size, method in GLUE_SETTINGS:
        for place, name in enumerate(GLUE.split()):
            task = name.lower().replace("-", "")
            yield f"{GROUP}/glue_roberta_{size}_{task}_{method}", name, place, size, method


def test_every_experiment_of_the_paper_has_its_numbers_and_the_other_way_round():
    assert {f"{GROUP}/{path.stem}" for path in (CONF / GROUP).glob("*.yaml")} == {*ROWS, *UNPRINTED}
    glue = {f"{GROUP}/{path.stem}" for path in (CONF / GROUP).glob("glue_*.yaml")}
    assert glue == {name for name, *_ in glue_files()}


@pytest.mark.parametrize("name", ROWS)
def test_the_header_quotes_table_row_and_numbers(name):
    row = ROWS[name]
    numbers = dict(row.numbers)
    average = numbers.pop(AVERAGE, None)
    header = re.sub(r"\s*\n#\s*", " ", (CONF / f"{name}.yaml").read_text().partition("\n#\n")[0])
    assert f"Table: {row.table}, " in re.sub(" +", " ", header)
    assert f"row {row.row} (" in header
    assert f"mean of {row.seeds} seeds" in header
    assert f"Expected: {', '.join(f'{task} {quoted(number)}' for task, number in numbers.items())}" in header
    assert average is None or f"Average:  {quoted(average)}" in header
    assert all(override in header for override in row.overrides)


def test_every_experiment_averages_losses_as_the_authors_trainer_did():
    for path in (CONF / GROUP).glob("*.yaml"):
        text = path.read_text()
        assert "\nloss_reduction: micro_batch_mean #" in text or f"\n  - {GROUP}/" in text, path.name


def quoted(number):
    """84.2 (0.43), with two decimals where the paper prints them."""
    value = f"{number.value:.1f}" if number.measure or number.task == AVERAGE else f"{number.value:.2f}"
    return value if number.deviation is None else f"{value} ({number.deviation:.2f})"


@pytest.mark.parametrize(("name", "task", "place", "size", "method"), list(glue_files()))
def test_glue_has_the_settings_of_tables_9_to_12(name, task, place, size, method):
    found = compose([f"experiment={name}"])
    wanted = {key: cells.split()[place] for key, cells in GLUE_SETTINGS[size, method].items()}
    assert found.intervention.positions == wanted["positions"]
    assert found.intervention.dropout == float(wanted["dropout"])
    assert found.optimizer.lr == float(wanted["lr"])
    assert found.optimizer.weight_decay == float(wanted["weight_decay"])
    assert found.scheduler.warmup_ratio == float(wanted["warmup"])
    assert found.trainer.max_epochs == int(wanted["epochs"])
    assert found.data.batch_size * found.trainer.accumulate_grad_batches == int(wanted["batch"])
    assert found.scheduler._target_.endswith(".linear")
    assert (found.intervention.method, found.intervention.rank) == (method, 1)
    assert (found.intervention.layers, found.intervention.tied) == ("all", "all")
    # each seed has its own rows for selection, and the best epoch on them is tested
    assert (found.data.max_length, found.data.split_seed, found.checkpoint.restore_best) == (256, None, True)
    assert (found.data.family, found.data.tasks) == ("glue", [task.lower().replace("-", "")])
    assert found.model.name.endswith(f"roberta-{size}")


@pytest.mark.parametrize("name", INSTRUCTION)
def test_instruction_tuning_has_the_settings_of_the_authors_command(name):
    found = compose([f"experiment={name}"])
    assert found.model.name == "meta-llama/Llama-2-7b-hf"
    assert found.intervention.method == ("direft" if name.endswith("direft") else "loreft")
    assert found.intervention.layers == [3, 9, 18, 24]
    assert found.intervention.rank == (2 if name.endswith("half") else 4)
    assert (found.intervention.positions, found.intervention.tied) == ("f5+l5", "group")
    assert found.intervention.dropout == 0
    optimizer = found.optimizer
    assert (optimizer.lr, optimizer.weight_decay, found.scheduler.warmup_ratio) == (9e-4, 0, 0)
    assert found.scheduler._target_.endswith(".linear")
    assert (found.data.batch_size, found.trainer.accumulate_grad_batches) == (4, 32)
    assert (found.trainer.max_epochs, found.data.max_length) == (9, 768)
    assert (found.data.train_tasks, found.data.tasks) == (["ultrafeedback"], ["alpaca_eval"])
    assert found.data.limit_train == (1000 if name.endswith("1k") else None)
    decoding = found.decoding
    assert (decoding.do_sample, decoding.num_beams) == (False, 1)
    assert (decoding.no_repeat_ngram_size, decoding.repetition_penalty) == (5, 1.1)

"""The paper's tables in literal form, against `conf/experiment/paper`: each number by its benchmark, each setting.

Source: Wu et al. 2024, arXiv:2404.03592 v3. Numbers: Tables 1-4, 13-15 and 17. Settings: Tables 9-12 (GLUE) and the
command of the authors' README (instruction tuning).
"""

import pytest

from reft_lightning.config.compose import compose, config_dir
from reft_lightning.reporting.paper.published import read_row

CONF = config_dir() / "experiment" / "paper"

# table -> columns; then experiment file -> its row, the standard deviation in brackets where the paper prints one
COMMONSENSE = "BoolQ PIQA SIQA HellaSwag WinoGrande ARC-e ARC-c OBQA average"
TABLE_1 = {
    "commonsense_llama_7b_direft": "69.5 83.0 79.0 92.5 80.5 82.2 68.0 77.5 79.0",
    "commonsense_llama_7b_loreft": "69.3 84.4 80.3 93.1 84.2 83.2 68.2 78.9 80.2",
    "commonsense_llama_13b_direft": "71.3 86.1 80.8 94.6 83.6 85.5 72.9 82.7 82.2",
    "commonsense_llama_13b_loreft": "72.1 86.3 81.8 95.1 87.2 86.2 73.7 84.2 83.3",
    "commonsense_llama2_7b_direft": "70.8 83.6 80.2 93.6 82.1 84.8 70.4 81.5 80.9",
    "commonsense_llama2_7b_loreft": "71.1 83.8 80.8 94.3 84.5 85.6 72.2 82.3 81.8",
    "commonsense_llama3_8b_direft": "73.4 88.7 81.0 95.6 85.5 91.8 81.8 85.4 85.4",
    "commonsense_llama3_8b_loreft": "75.1 90.2 82.0 96.3 87.4 92.4 81.6 87.5 86.6",
}
TABLE_14 = {
    "commonsense_llama_7b_loreft_3_epochs": "68.3 83.5 79.7 92.7 82.6 83.2 67.4 78.5 79.5",
    "commonsense_llama_13b_loreft_3_epochs": "72.0 85.6 82.1 94.8 85.3 86.9 73.0 85.0 83.1",
}
ARITHMETIC = "AQuA GSM8K MAWPS SVAMP average"
TABLE_2 = {
    "arithmetic_llama_7b_direft": "21.3 24.1 74.5 42.7 40.6",
    "arithmetic_llama_7b_loreft": "21.4 26.0 76.2 46.8 42.6",
    "arithmetic_llama_13b_direft": "20.5 35.8 80.8 54.8 48.0",
    "arithmetic_llama_13b_loreft": "23.6 38.1 82.4 54.2 49.6",
}
TABLE_15 = {
    "arithmetic_llama_7b_loreft_3_epochs": "22.4 21.6 69.5 43.6 39.3",
    "arithmetic_llama_13b_loreft_3_epochs": "23.4 35.5 81.8 54.6 48.8",
}
TABLE_17 = {
    "ablation_llama_7b_lobireft": "14.4 14.2 59.9 36.8 31.3(0.47)",
    "ablation_llama_7b_consreft": "20.1 21.2 67.9 39.2 37.1(0.19)",
    "ablation_llama_7b_direft_orthonormal": "21.3 27.4 76.6 46.3 42.9(0.37)",
    "ablation_llama_7b_noreft": "23.1 25.5 75.4 45.6 42.4(0.71)",
    "ablation_llama_7b_direft": "21.3 24.1 74.5 42.7 40.6(0.44)",
    "ablation_llama_7b_loreft": "21.4 26.0 76.2 46.8 42.6(0.46)",
    "ablation_llama_13b_lobireft": "16.8 25.3 69.3 46.8 39.5(0.81)",
    "ablation_llama_13b_consreft": "21.9 35.6 80.3 51.7 47.4(0.64)",
    "ablation_llama_13b_direft_orthonormal": "25.1 36.7 81.9 53.6 49.3(0.39)",
    "ablation_llama_13b_noreft": "23.5 36.5 82.1 54.1 49.0(0.63)",
    "ablation_llama_13b_direft": "20.5 35.8 80.8 54.8 48.0(1.23)",
    "ablation_llama_13b_loreft": "23.6 38.1 82.4 54.2 49.6(0.71)",
}
TABLE_3 = {
    "instruction_llama2_7b_direft": "84.85",
    "instruction_llama2_7b_loreft": "85.60",
    "instruction_llama2_7b_loreft_half": "84.12",
    "instruction_llama2_7b_loreft_1k": "81.91",
}
# one experiment file a number: glue_roberta_base_mnli_direft; the deviations are Table 13's
GLUE = "MNLI SST-2 MRPC CoLA QNLI QQP RTE STS-B"
TABLE_4 = {
    ("base", "direft"): "82.5(.22) 92.6(.76) 88.3(1.23) 58.6(1.99) 91.3(.19) 86.4(.27) 76.4(1.48) 89.3(.56)",
    ("base", "loreft"): "83.1(.26) 93.4(.64) 89.2(2.62) 60.4(2.60) 91.2(.25) 87.4(.23) 79.0(2.76) 90.0(.29)",
    ("large", "direft"): "88.7(.13) 95.4(.60) 88.5(2.16) 66.7(2.21) 93.9(.39) 88.1(.47) 86.9(1.56) 91.2(.29)",
    ("large", "loreft"): "89.2(.27) 96.2(.72) 90.1(1.17) 68.0(1.44) 94.1(.35) 88.5(.45) 87.5(1.49) 91.6(.43)",
}
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
UNPRINTED = {"gsm8k_direft_tuning"}  # Table 6 prints a search space


def number(cell):
    """`84.2(.43)` as the value and its standard deviation."""
    value, _, deviation = cell.rstrip(")").partition("(")
    return float(value), float(deviation) if deviation else None


def numbers(columns, cells):
    return dict(zip(columns.split(), map(number, cells.split()), strict=True))


def glue_files():
    """Yield (file, task as printed, its place in the order of the tables, size, method)."""
    for size, method in TABLE_4:
        for place, name in enumerate(GLUE.split()):
            yield (
                f"glue_roberta_{size}_{name.lower().replace('-', '')}_{method}",
                name,
                place,
                size,
                method,
            )


PRINTED = {
    **{name: ("1", 3, numbers(COMMONSENSE, cells)) for name, cells in TABLE_1.items()},
    **{name: ("14", 3, numbers(COMMONSENSE, cells)) for name, cells in TABLE_14.items()},
    **{name: ("2", 3, numbers(ARITHMETIC, cells)) for name, cells in TABLE_2.items()},
    **{name: ("15", 3, numbers(ARITHMETIC, cells)) for name, cells in TABLE_15.items()},
    **{name: ("17", 3, numbers(ARITHMETIC, cells)) for name, cells in TABLE_17.items()},
    **{name: ("3", 2, numbers("Win-rate", cells)) for name, cells in TABLE_3.items()},
    **{
        name: ("4", 5, {task: number(TABLE_4[size, method].split()[place])})
        for name, task, place, size, method in glue_files()
    },
}


def test_every_experiment_of_the_paper_stands_in_a_table_here():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*PRINTED, *UNPRINTED}


@pytest.mark.parametrize("name", PRINTED)
def test_the_header_has_the_papers_numbers(name):
    row = read_row(CONF / f"{name}.yaml")
    assert (row.table, row.seeds, dict(row.numbers)) == PRINTED[name]


@pytest.mark.parametrize(("name", "task", "place", "size", "method"), list(glue_files()))
def test_glue_has_the_settings_of_tables_9_to_12(name, task, place, size, method):
    found = compose([f"experiment=paper/{name}"])
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


@pytest.mark.parametrize("name", TABLE_3)
def test_instruction_tuning_has_the_settings_of_the_authors_command(name):
    found = compose([f"experiment=paper/{name}"])
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

"""A sweep under DDP: each job runs once on each rank, in one folder, and leaves nothing to the next."""

import json
import os
import subprocess
import sys

import pytest

from reft_lightning.runs import ddp_launch

SCRIPT = """
import json
import os
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule, Trainer

from reft_lightning.runs.ddp_launch import RANK_VARIABLES, single_job_ddp


class Toy(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, _):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)


@hydra.main(version_base="1.3", config_path=None)
def main(config):
    folder = Path(HydraConfig.get().runtime.output_dir)
    with single_job_ddp():
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(Toy())
        rank = trainer.global_rank
    left = [name for name in RANK_VARIABLES if name in os.environ]
    facts = {"value": config.value, "steps": trainer.global_step, "world": trainer.world_size, "left": left}
    with open(folder / f"rank{rank}.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")


main()
"""


@pytest.mark.slow
def test_a_sweep_under_ddp_runs_each_job_once_on_each_rank(tmp_path, root):
    (tmp_path / "toy.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ddp_launch.RANK_VARIABLES}
    environment["PYTHONPATH"] = str(root)
    subprocess.run(
        [sys.executable, "toy.py", "-m", "+value=1,2", "hydra.sweep.dir=sweep"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        timeout=150,
    )
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("rank*.jsonl"))
    assert written == [f"sweep/{job}/rank{rank}.jsonl" for job in range(2) for rank in range(2)]
    for job in range(2):
        for rank in range(2):
            lines = (tmp_path / f"sweep/{job}/rank{rank}.jsonl").read_text().splitlines()
            (facts,) = [json.loads(line) for line in lines]  # once
            # 8 rows in batches of 2 over 2 ranks are 2 steps
            assert (facts["value"], facts["steps"], facts["world"]) == (job + 1, 2, 2)
            assert rank == 1 or facts["left"] == []  # the first rank goes on to the next job
    assert len(list(tmp_path.rglob(".hydra"))) == 2


def test_outside_hydra_the_arguments_stay_and_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a cluster sets it
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = list(sys.argv)
    with ddp_launch.single_job_ddp():
        assert sys.argv == argv
        os.environ.update(LOCAL_RANK="0", WORLD_SIZE="2")
    assert "LOCAL_RANK" not in os.environ
    assert os.environ["WORLD_SIZE"] == "4"


def test_a_job_that_fails_leaves_no_ranks_either(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def job():
        with ddp_launch.single_job_ddp():
            os.environ["LOCAL_RANK"] = "0"
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        job()
    assert "LOCAL_RANK" not in os.environ


def test_the_other_ranks_get_the_jobs_overrides_and_not_the_sweeps(monkeypatch):
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "hydra": {
                "overrides": {
                    "task": ["seed=2", "name=a b"],
                    "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.verbose=true"],
                },
                "run": {"dir": "${now:%Y}"},
                "runtime": {"output_dir": "sweep/1"},
            }
        }
    )
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    monkeypatch.setattr(sys, "argv", ["reft-train", "-m", "seed=1,2", "name=a b", "--config-dir", "mine"])
    with ddp_launch.single_job_ddp():
        expected = ["--config-dir", "mine", "seed=2", "name=a b", "hydra.verbose=true", "hydra.mode=RUN"]
        assert sys.argv[1:] == expected
        assert HydraConfig.get().run.dir == "sweep/1"
    assert sys.argv[1] == "-m"
    assert OmegaConf.to_container(config.hydra.run, resolve=False) == {"dir": "${now:%Y}"}

import logging
import logging.config
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from reft_lightning.config.compose import VERSION_BASE, register


@pytest.fixture
def logged(root, tmp_path, monkeypatch):
    """A function that sets the rank of this process, logs as a run does, and returns the lines of the log file."""
    register()
    with initialize_config_dir(str(root / "conf"), version_base=VERSION_BASE):
        config = compose("config", ["model.name=OWNER/NAME"], return_hydra_config=True)
    settings = OmegaConf.to_container(config.hydra.job_logging)
    settings["handlers"]["file"]["filename"] = str(tmp_path / "run.log")
    before = logging.root.handlers[:], logging.root.level

    def lines(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        logging.config.dictConfig(settings)
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("reft_lightning.runs").log(level, logging.getLevelName(level))
        path = tmp_path / "run.log"
        return [line.split("]")[2].strip("[") for line in path.read_text().splitlines()]

    yield lines
    for handler in logging.root.handlers[:]:
        if handler not in before[0]:
            logging.root.removeHandler(handler)
            handler.close()
    logging.root.handlers[:], logging.root.level = before


def test_the_first_process_of_a_run_logs_everything(logged, capfd):
    assert logged(RANK="0", LOCAL_RANK="0") == ["INFO", "WARNING", "ERROR"]
    assert capfd.readouterr().out.count("INFO") == 2  # level and message


def test_a_log_file_is_utf_8_in_every_locale(logged):
    logged()
    assert [h.encoding for h in logging.root.handlers if isinstance(h, logging.FileHandler)] == ["utf-8"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_other_processes_log_only_errors(logged, capfd, name):
    assert logged(**{name: "1"}) == ["ERROR"]
    said = capfd.readouterr().out
    assert "ERROR" in said
    assert "INFO" not in said
    assert "WARNING" not in said


def test_a_reader_that_has_ended_does_not_disturb_a_run(root):
    code = """
import logging, time
from reft_lightning.terminal.log_lines import LogHandler
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LogHandler("stdout")])
for line in range(4):
    logging.info(line)
    time.sleep(0.1)
print("the results", flush=True)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout.readline() == "0\n"
        run.stdout.close()
        assert (run.stderr.read(), run.wait(30)) == ("", 0)


def test_requests_to_the_hub_are_not_logged_and_its_warnings_once(logged, capfd):
    logged()
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).info("a request")
        logging.getLogger(name).warning("a failure")
    for library in (datasets, huggingface_hub):
        assert logging.getLogger(library.__name__).handlers  # which print the warning
        logging.getLogger(f"{library.__name__}.utils").warning("a retry")
    said = capfd.readouterr().out
    assert (said.count("a request"), said.count("a failure"), said.count("a retry")) == (0, 2, 0)

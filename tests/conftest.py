"""What every test gets: no network, no W&B account, quiet libraries, and the places of optional data."""

import functools
import gc
import logging
import os
from pathlib import Path
from types import SimpleNamespace

# Read by the libraries when they are imported, so before any test module is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import pytest
import torch

from reft_lightning.config import compose

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REFT_SHARED") or ROOT.parent / "shared")

# Lightning announces the devices and advertises its products at each Trainer.
for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.WARNING)


def pytest_collection_modifyitems(items):
    missing_shared = pytest.mark.skip(reason=f"no shared data in {SHARED}: set REFT_SHARED to its folder")
    missing_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(missing_shared)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing_gpu)


def pytest_collection():
    """Turn the garbage collector off while tests are collected: it takes a quarter of that time and frees nothing."""
    gc.disable()


def pytest_collection_finish():
    """Leave what was imported and collected out of every later search for garbage, of which each run makes one."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(
        10_000
    )  # a model is more objects than the 700 after which Python looks through the young ones
    gc.enable()


@pytest.fixture(scope="session")
def root():
    """The folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """The folder of the shared data; only for tests marked ``shared``."""
    return SHARED


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of the invented rows of a short run, to be read only."""
    import short_runs

    return short_runs.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def no_weights(monkeypatch):
    """What is refused here is refused before weights are loaded."""

    def loaded(**_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", loaded)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _files_are_composed_once():
    """What the YAML files of each choice of groups make is kept over tests: Hydra takes a fifth of a second for it."""
    known, alone, folders = {}, compose._compose, [compose.config_dir()]

    @functools.wraps(alone)
    def kept(overrides, vocabulary, own):
        if len(known) > 100:
            known.clear()
        return alone(overrides, vocabulary, known if vocabulary.folders == folders else own)

    compose._compose = kept
    yield
    compose._compose = alone


@pytest.fixture(autouse=True, scope="session")
def _runs_leave_their_garbage():
    """A run collects garbage at its end, for a large model; a tiny one is not worth a search of the session's heap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reft_lightning.runs.experiment.gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_kept():
    """Tests of many rows leave no files in the user's cache, and none waits for the disk: no power failure is tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reft_lightning.data.encoding_cache.SMALL", 10**9)
        patch.setattr(os, "fsync", lambda _: None)
        yield

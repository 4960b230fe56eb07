"""A study that is continued may be someone else's: the names in it run no code from its directory."""

import pytest
import real_searches
import short_runs

from reft_lightning.runs.experiment import SetupError
from reft_lightning.search import command
from reft_lightning.search.trial import run_job
from reft_lightning.search.worker import prepare
from reft_lightning.suggest import names_of_a_stranger

EVIL = "import pathlib\n\npathlib.Path({!r}).touch()\n\n\ndef ran():\n    pass\n"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose trials name a module of its directory."""
    data = short_runs.write_rows(tmp_path / "data")
    (tmp_path / "evil_of_a_study.py").write_text(EVIL.format(str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    values = real_searches.contents(data)
    values["base"] = [*values["base"], "+callbacks.mine._target_=evil_of_a_study.ran"]
    return real_searches.make_study(tmp_path / "study", values)


def test_a_trial_of_a_stranger_imports_no_module_of_the_directory(study, tmp_path):
    folder = study.folder / "trials" / "loreft" / "0"
    overrides = study.plan.trial_overrides("loreft", {"intervention.rank": 1, "optimizer.lr": 1e-3})
    job = {
        "kind": "winner",
        "method": "loreft",
        "number": 0,
        "params": {},
        "seed": 1,
        "overrides": overrides[:-1],
    }
    prepare(folder, job)
    with names_of_a_stranger(), pytest.raises(SetupError, match=r"evil_of_a_study.*add trust_code=true"):
        run_job(study.folder, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("more", "trusted"), [([], False), (["trust_code=true"], True)])
def test_a_study_that_goes_on_is_trusted_only_where_the_user_says_so(study, monkeypatch, more, trusted):
    class Stopped(Exception):
        pass

    def worker(study, trusted):
        raise Stopped(trusted)

    monkeypatch.setattr(command, "Worker", worker)
    with pytest.raises(Stopped) as stopped:
        command.main([f"folder={study.folder}", *more])
    assert stopped.value.args == (trusted,)

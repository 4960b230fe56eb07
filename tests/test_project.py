"""The frame: pins, packaging, make targets, and that no file carries what belongs to one machine."""

import re
import stat
import subprocess
import sys
import tomllib
import zipfile

import pytest


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_name_no_cuda_package(pins):
    assert not [name for name in pins if name.startswith(("nvidia", "triton"))]


def test_constraints_are_exact_versions_without_hosts(root):
    for line in (root / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


def test_every_direct_dependency_is_pinned(project, pins):
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    names = {_canonical(re.match(r"[A-Za-z0-9_.-]+", item)[0]) for group in groups for item in group}
    assert names - {"reft-lightning"} <= set(pins)


def test_what_is_installed_is_what_is_pinned(pins):
    from importlib.metadata import version

    for name in ("torch", "lightning", "transformers", "hydra-core"):
        installed = version(name).partition("+")[0]
        assert installed == pins[name], f"{name} {installed} is installed, constraints.txt has {pins[name]}"


def test_every_script_exists(project):
    import importlib

    for target in project["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_continuous_integration_runs_the_make_target(root):
    script = root / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text()
    workflow = (root / ".github" / "workflows" / "test.yml").read_text()
    assert "bash .ci/run" in workflow


def test_no_file_names_a_machine(root):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    home = re.compile(r"(?<![\w.~/])/(?:root|home/\w+|work|opt)/\w")
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        if not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = home.search(text) if path.name != "test_project.py" else None
        assert found is None, f"{name}: {found[0]!r}"


@pytest.mark.slow
def test_the_wheel_carries_the_configurations(root, tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (root / "conf").rglob("*.yaml"):
        assert f"reft_lightning/conf/{file.relative_to(root / 'conf').as_posix()}" in names

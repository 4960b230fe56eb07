"""The arrows of the package, read from its imports: which part may know which."""

import ast

import pytest

from reft_lightning.composition import config_dir

PACKAGE = config_dir().parent / "reft_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 400  # lines
# Imported where they are used: heavy, or optional.
LAZY = {"peft", "wandb", "matplotlib", "optuna"}
HYDRA = {"experiment", "search", "cli", "composition", "launch"}


def module_of(path):
    parts = ("reft_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, top_level_only=False):
    """Dotted names of everything that a file imports, relative imports resolved."""
    tree = ast.parse(path.read_text())
    inside = module_of(path).split(".")
    package = inside if path.name == "__init__.py" else inside[:-1]
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if top_level_only and (id(node) in lazy or id(node) in checking):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def parts_of(path):
    """The parts of the package that a file knows: the first name after ``reft_lightning``."""
    return {n.split(".")[1] for n in imports_of(path) if n.startswith("reft_lightning.")}


def files_of(part):
    return [path for path in FILES if path.relative_to(PACKAGE).parts[0] in (part, f"{part}.py")]


def outside(path):
    """The parts that a file knows beside its own."""
    return parts_of(path) - {path.relative_to(PACKAGE).parts[0].removesuffix(".py")}


@pytest.mark.parametrize("part", ["interventions", "positions", "sites", "schema"])
def test_the_ideas_import_nothing_of_the_package(part):
    assert files_of(part)
    for path in files_of(part):
        assert outside(path) == set(), path.name


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_data_and_evaluation_know_neither_the_model_nor_the_interventions(part):
    assert files_of(part)
    for path in files_of(part):
        assert not outside(path) & {"model", "interventions", "module", "baselines", "experiment"}, path.name


@pytest.mark.parametrize(("part", "other"), [("data", "evaluation"), ("evaluation", "data")])
def test_data_and_evaluation_do_not_know_each_others_insides(part, other):
    for path in files_of(part):
        inside = {n for n in imports_of(path) if n.startswith(f"reft_lightning.{other}.")}
        deep = {
            n for n in inside if (PACKAGE / other / f"{n.split('.')[2]}.py").exists() and n.count(".") > 2
        }
        allowed = {n for n in deep if n.startswith(f"reft_lightning.{other}.base.")}  # the interface
        assert deep - allowed == set(), path.name


def test_the_lightning_module_does_not_know_that_reft_exists():
    (path,) = files_of("module")
    assert not parts_of(path) & {"interventions", "model", "positions", "sites"}
    assert not {n for n in imports_of(path) if n.split(".")[0] == "peft"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_entry_points_see_hydra(path):
    if path.stem not in HYDRA:
        assert not {n for n in imports_of(path) if n.split(".")[0] == "hydra"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_and_optional_packages_are_imported_where_used(path):
    assert not {n.split(".")[0] for n in imports_of(path, top_level_only=True)} & LAZY


def test_what_answers_a_typo_imports_nothing_heavy():
    light = {"torch", "transformers", "lightning", "datasets", "numpy"}
    for name in ("schema", "vocabulary", "composition", "cli"):
        (path,) = files_of(name)
        assert not {n.split(".")[0] for n in imports_of(path, top_level_only=True)} & light


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_holds_one_idea(path):
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    assert len(path.read_text().splitlines()) <= LIMIT


def test_the_reader_of_imports_sees_relative_ones():
    seen = imports_of(PACKAGE / "composition.py")
    assert {"reft_lightning.schema.Config", "reft_lightning.interventions.settings_of"} <= seen
    top = imports_of(PACKAGE / "composition.py", top_level_only=True)
    assert "reft_lightning.interventions.settings_of" not in top

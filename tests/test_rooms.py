"""The house: which rooms there are, and which way the arrows between them run, read from the imports."""

import ast
import functools
from pathlib import Path

import pytest

import reft_lightning

PACKAGE = Path(reft_lightning.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT_FILES = {"__init__.py", "cli.py", "suggest.py"}
# Lowest first; those of one line stand side by side and do not know each other.
FLOORS = (
    {"suggest", "terminal"},
    {"storage", "interventions"},
    {"base_models"},
    {"adapters", "evaluation"},
    {"speed", "data", "exchange"},
    {"training"},
    {"config"},
    {"runs"},
    {"search", "inspection", "serving", "integrations"},
    {"reporting"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# imported where they are used: heavy, or optional
LAZY = {"peft", "wandb", "wandb_workspaces", "matplotlib", "optuna", "openai", "fastapi", "uvicorn"}
LAZY_MODULE = "reft_lightning.serving.app"  # made of such packages, and itself imported where it is used
HYDRA = {"config", "runs", "search", "cli"}


def module_of(path):
    parts = ("reft_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path, top_level_only=False, root=PACKAGE):
    """Dotted names of everything that a file imports, relative imports resolved."""
    tree = ast.parse(path.read_text())
    package = (root.name, *path.relative_to(root).parts[:-1])
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
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def arrows():
    """(room, other room, file) of every import from one room into another."""
    for path in FILES:
        for name in imports_of(path):
            if name.startswith("reft_lightning.") and room_of(path) != "__init__":
                other = name.split(".")[1]
                if other != room_of(path):
                    yield room_of(path), other, module_of(path)


def packages(path):
    return {name.split(".")[0] for name in imports_of(path)}


def test_the_root_holds_three_files_and_the_rooms():
    assert {path.name for path in PACKAGE.glob("*.py")} == ROOT_FILES
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | {name.removesuffix(".py") for name in ROOT_FILES} - {"__init__"} == set(FLOOR)


def test_every_arrow_leads_to_a_lower_floor():
    upwards = [f"{file}: {room} -> {other}" for room, other, file in arrows() if FLOOR[other] >= FLOOR[room]]
    assert upwards == []


def test_the_arrows_are_read():
    found = {(room, other) for room, other, _ in arrows()}
    assert {
        ("adapters", "interventions"),
        ("data", "evaluation"),
        ("runs", "training"),
        ("cli", "runs"),
    } <= found
    assert len(found) > 30


@pytest.mark.parametrize("room", ["terminal", "suggest", "storage", "interventions"])
def test_the_lowest_rooms_know_nothing_of_transformers(room):
    files = [path for path in FILES if room_of(path) == room]
    assert files
    for path in files:
        assert not packages(path) & {"transformers", "lightning", "hydra", "omegaconf"}, path.name


@pytest.mark.parametrize("room", ["training", "data", "evaluation"])
def test_what_trains_and_evaluates_does_not_know_that_reft_exists(room):
    for path in (path for path in FILES if room_of(path) == room):
        inside = {name for name in imports_of(path) if name.startswith("reft_lightning.")}
        known = {name for name in inside if name.split(".")[1] in ("interventions", "adapters")}
        assert {name.split(".")[2] for name in known} <= {"adapted"}, path.name  # the protocol
        assert "peft" not in packages(path), path.name


def test_positions_and_sites_know_nothing_of_the_model():
    for name in ("positions", "sites"):
        path = PACKAGE / "adapters" / "reft" / f"{name}.py"
        inside = {n for n in imports_of(path) if n.startswith("reft_lightning.")}
        of_bases = tuple(f"reft_lightning.base_models.{part}." for part in ("stacks", "vision"))
        outside = {name for name in inside if not name.startswith(of_bases)}
        assert {name for name in outside if not name.startswith("reft_lightning.suggest.")} == set()


def test_only_what_reads_the_command_line_sees_hydra():
    assert {room_of(path) for path in FILES if "hydra" in packages(path)} <= HYDRA


def test_heavy_and_optional_packages_are_imported_where_used():
    for path in FILES:
        early = imports_of(path, top_level_only=True)
        assert not any(name.startswith(LAZY_MODULE) for name in early), module_of(path)
        assert module_of(path) == LAZY_MODULE or not {name.split(".")[0] for name in early} & LAZY, path


def test_a_file_is_named_after_its_idea():
    vague = {"utils", "util", "helpers", "misc", "common", "manager", "base_utils"}
    assert not {path.stem for path in FILES} & vague


def test_what_answers_a_typo_imports_nothing_heavy():
    light = {"torch", "transformers", "lightning", "datasets", "numpy"}
    names = (
        "suggest.py",
        "cli.py",
        "adapters/methods.py",
        "config/schema.py",
        "config/explain.py",
        "config/compose.py",
    )
    for name in names:
        assert not {n.split(".")[0] for n in imports_of(PACKAGE / name, top_level_only=True)} & light


def test_the_tests_stand_in_the_rooms_of_what_they_test():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    for folder in folders - {Path(".")}:
        assert (PACKAGE / folder).is_dir() or folder == Path("experiments"), folder


def test_no_test_module_imports_another():
    for path in TESTS.rglob("*.py"):
        assert not {name for name in packages_of_test(path) if name.startswith("test_")}, path


def packages_of_test(path):
    return {name.split(".")[0] for name in imports_of(path, root=TESTS)}

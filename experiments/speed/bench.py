"""All benchmarks, their peers' environments, one table of figures, and whether a goal that was met is lost.

    make bench                                              # random weights of SmolLM2-135M's shape
    python experiments/speed/bench.py --model FOLDER --mixture commonsense_170k.json --adapter FOLDER --rows FILE
    python experiments/speed/bench.py --random --only step files
    python experiments/speed/bench.py --random --quick      # 2 rounds each, committed files untouched

Runs every script of ``SCRIPTS`` one after the other and collects the ``figures`` of their JSON into ``bench.json`` and
the table of README.md. Peers are installed from PyPI into environments of their own under ``.bench/``; one that cannot
be made is left out with the reason. Figures are compared with the ``bench.json`` of the last commit.

Exit status: 0; 1 if a goal that was met in that file is missed now by more than the noise of both measurements, or a
script failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import Figure, default_threads, is_lost, is_met, number, table
from processes import own_waiting

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".bench"
RESULTS = HERE / "results"
BENCH = HERE / "bench.json"
README = HERE / "README.md"
BEGIN, END = "<!-- bench: written by bench.py -->", "<!-- bench: end -->"


@dataclass(frozen=True)
class Peer:
    """A package that is compared with, in an environment of its own.

    Args:
        steps: arguments of ``pip install``, one call each.
        check: a statement that must run there.
    """

    steps: tuple[tuple[str, ...], ...]
    check: str


def pinned(*names: str) -> tuple[str, ...]:
    """Return requirements with the versions of constraints.txt."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60]
    )
    return tuple(f"{name}=={pins[name]}" for name in names)


def peers() -> dict[str, Peer]:
    """Return the recipes; both take the torch of constraints.txt, so that products are the same."""
    shared = pinned("torch", "transformers", "accelerate", "datasets", "matplotlib")
    constraints = ("-c", str(ROOT / "constraints.txt"))
    return {
        # --no-deps: pyreft pins transformers 4.45 and asks for jupyter, wandb and torchvision, unused here
        "pyreft": Peer(
            (
                (*shared, "evaluate", "ipywidgets", "plotnine", "scikit-learn", *constraints),
                ("--no-deps", "pyreft==0.1.0", "pyvene==0.1.8"),
            ),
            "import pyreft",
        ),
        # adapters declares transformers ~=4.57.6, which the constraints of this project exclude
        "adapters": Peer(
            ((*pinned("torch"), "adapters==1.3.0", "transformers==4.57.6"),),
            "import adapters",
        ),
    }


@dataclass(frozen=True)
class Script:
    """A benchmark script.

    Args:
        needs: options of this command that it cannot run without, such as ``model``.
        takes: options that are passed on where they are given.
        peers: peers whose python it takes.
        arguments: further arguments.
        quick: further arguments of a quick run.
    """

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


SOURCE = ("model", "random")
SCRIPTS: dict[str, Script] = {
    "step": Script(takes=SOURCE, peers=("pyreft", "adapters"), quick=("--launches", "1")),
    "interventions": Script(peers=("pyreft",)),
    "files": Script(peers=("pyreft",)),
    "generate": Script(takes=SOURCE, peers=("pyreft",)),
    "overhead": Script(takes=SOURCE),
    "whole_pass": Script(takes=(*SOURCE, "mixture"), peers=("pyreft",), quick=("--limit", "64")),
    "verified_decoding": Script(needs=("model", "adapter", "rows"), takes=("model", "adapter", "rows")),
    "option_likelihood": Script(takes=SOURCE),
    "compile": Script(takes=SOURCE),
    "encoding": Script(takes=("model", "mixture")),
    "startup": Script(),
    "scaling": Script(),
}


# --- peers' environments -----------------------------------------------------------------------------------------


def environment(name: str, peer: Peer, folder: Path) -> Path:
    """Return the python of a peer's environment, which is made where it is missing or its recipe has changed.

    Raises:
        RuntimeError: if it cannot be made; says what pip said last.
    """
    home = folder / name
    python = home / "bin" / "python"
    recipe = hashlib.sha256(repr((peer, platform.python_version())).encode()).hexdigest()
    stamp = home / "recipe"
    if stamp.is_file() and stamp.read_text() == recipe:
        return python
    log.info("making the environment of %s in %s", name, home)
    venv.create(home, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "10"]
    for step in peer.steps:
        for attempt in (
            1,
            2,
            3,
        ):  # a slow index drops connections; the next attempt takes what is in the cache
            done = subprocess.run([*pip, *step], cwd=ROOT, capture_output=True, text=True)
            if done.returncode == 0:
                break
            log.warning("pip failed, attempt %d of 3", attempt)
        else:
            raise RuntimeError(f"pip could not install {' '.join(step)}: {_last_line(done.stderr)}")
    done = subprocess.run([str(python), "-c", peer.check], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{peer.check!r} fails: {_last_line(done.stderr)}")
    stamp.write_text(recipe)
    return python


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def find_pythons(names: set[str], given: dict[str, str | None]) -> tuple[dict[str, str], dict[str, str]]:
    """Return peer -> python of its environment, and peer -> why it is left out."""
    pythons, reasons = {}, {}
    recipes = peers()
    for name in sorted(names):
        if given.get(name):
            pythons[name] = given[name]
            continue
        try:
            pythons[name] = str(environment(name, recipes[name], CACHE))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reasons[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    return pythons, reasons


# --- running -----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one script gave: its figures, or why there are none."""

    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: str = ""


def command(
    name: str, script: Script, args: argparse.Namespace, pythons: dict[str, str], out: Path
) -> list[str]:
    """Return the command line of a script."""
    line = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), "--threads", str(args.threads)]
    for option in script.takes:
        value = vars(args)[option]
        if value is True:
            line.append(f"--{option}")
        elif value:
            line += [f"--{option}", str(value)]
    for peer in script.peers:
        if peer in pythons:
            line += [f"--{peer}-python", pythons[peer]]
    if args.quick:
        line += ["--rounds", "2", *script.quick]
    elif args.rounds:
        line += ["--rounds", str(args.rounds)]
    return [*line, *script.arguments]


def run_script(
    name: str,
    script: Script,
    args: argparse.Namespace,
    pythons: dict[str, str],
    reasons: dict[str, str],
    folder: Path,
) -> Found:
    """Run one script and read its figures."""
    missing = [option for option in script.needs if not vars(args)[option]]
    if missing:
        return Found(left_out={name: f"needs {', '.join(f'--{option}' for option in missing)}"})
    if not (HERE / f"{name}.py").is_file():
        return Found(left_out={name: "there is no such script"})
    out = folder / name
    log.info("--- %s", name)
    line = command(name, script, args, pythons, out)
    done = subprocess.run(line, cwd=ROOT, env=own_waiting())
    if done.returncode != 0:
        return Found(failed=f"{name}.py ended with status {done.returncode}; its message stands above")
    content = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    facts = {
        key: content[key]
        for key in ("model", "date", "torch", "threads", "launches", "rounds", "load_after")
        if key in content
    }
    given = content.get("left_out", {})
    left_out = {what: reasons.get(_peer_of(why, script), why) for what, why in given.items()}
    return Found(content.get("figures", []), facts, left_out)


def _peer_of(why: str, script: Script) -> str:
    """Return the peer whose missing python a script names as the reason."""
    return next((peer for peer in script.peers if f"--{peer}-python" in why), "")


# --- one table, and what was committed before --------------------------------------------------------------------


def merge(before: dict[str, Any], found: dict[str, Found]) -> dict[str, Any]:
    """Return the content of bench.json: what scripts gave now, and what the file says of those that did not run.

    Figures of a script that failed are dropped: they say nothing of this code.
    """
    scripts = dict(before.get("scripts", {}))
    for name, result in found.items():
        scripts[name] = {**result.facts, "left_out": result.left_out}
        if result.failed:
            scripts[name]["failed"] = result.failed
    figures = [
        one for one in before.get("figures", []) if one["script"] not in found and one["script"] in scripts
    ]
    figures += [{**one, "script": name} for name, result in found.items() for one in result.figures]
    order = {name: i for i, name in enumerate(SCRIPTS)}
    figures.sort(key=lambda one: order.get(one["script"], len(order)))
    return {"scripts": scripts, "figures": figures}


def lost(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each goal that was met before and is missed now by more than the noise.

    Figures of another model or another number of threads say nothing of the code and are not compared.
    """
    alike = {
        name
        for name, facts in now["scripts"].items()
        if all(facts.get(k) == before.get("scripts", {}).get(name, {}).get(k) for k in ("model", "threads"))
    }
    earlier = {(one["script"], one["what"]): one for one in before.get("figures", [])}
    sentences = []
    for one in now["figures"]:
        old = earlier.get((one["script"], one["what"]))
        if old is not None and one["script"] in alike and is_lost(old, one):
            sentences.append(
                f"{one['what']}: {number(one['value'])} ({number(one['low'])} to {number(one['high'])}), "
                f"before {number(old['value'])} ({number(old['low'])} to {number(old['high'])}), "
                f"goal {number(one['goal'])}"
            )
    return sentences


def committed() -> dict[str, Any]:
    """Return the bench.json of the last commit, or the file where this is no git checkout; empty if there is none."""
    name = BENCH.relative_to(ROOT).as_posix()
    try:
        shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return on_disk()
    inside = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True)
    if inside.returncode != 0:
        return on_disk()
    return json.loads(shown.stdout) if shown.returncode == 0 else {}


def on_disk() -> dict[str, Any]:
    """Return the bench.json of the working tree; empty if there is none."""
    return json.loads(BENCH.read_text(encoding="utf-8")) if BENCH.is_file() else {}


def text_of(content: dict[str, Any]) -> str:
    """Return the table of all figures, and what was not measured, as Markdown."""
    met = [is_met(one) for one in content["figures"]]
    dates = sorted({facts["date"] for facts in content["scripts"].values() if "date" in facts})
    when = dates[0] if len(set(dates)) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "never"
    lines = [f"Measured {when}: {met.count(True)} of {met.count(True) + met.count(False)} goals met."]
    for name in content["scripts"]:
        figures = [one for one in content["figures"] if one["script"] == name]
        if figures:
            facts = content["scripts"][name]
            about = ", ".join(
                f"{key} {facts[key]}"
                for key in ("model", "launches", "rounds", "threads", "torch")
                if key in facts
            )
            lines.append(f"`{name}.py` ({about}):\n\n{table(figures)}")
    reasons: dict[str, list[str]] = {}
    for facts in content["scripts"].values():
        for what, why in facts.get("left_out", {}).items():
            reasons.setdefault(why, []).append(what)
        if "failed" in facts:
            lines.append(f"Failed: {facts['failed']}.")
    lines += [f"Not measured: {', '.join(dict.fromkeys(what))} ({why})." for why, what in reasons.items()]
    return "\n\n".join(lines)


def between_markers(text: str, table: str) -> str:
    """Return a text with what stands between the two markers replaced.

    Raises:
        ValueError: if a marker is missing, stands twice, or they are in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN!r} and below it {END!r}, once each")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


# --- command -----------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", type=Path, help="folder of a Hugging Face causal model, with its tokenizer"
    )
    source.add_argument("--random", action="store_true", help="random weights, shape of SmolLM2-135M")
    parser.add_argument("--adapter", type=Path, help="adapter trained on --model, for verified decoding")
    parser.add_argument("--rows", type=Path, help="commonsense test rows, for verified decoding")
    parser.add_argument("--mixture", type=Path, help="commonsense training rows, for the whole pass")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SCRIPTS, default=list(SCRIPTS),
                        help=f"of {', '.join(SCRIPTS)}; figures of the others stay as they are")  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds, results in .bench/quick, nothing committed changes"
    )
    parser.add_argument("--rounds", type=int, help="of every script; each script's own number unless given")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of torch (all cores)")
    for peer in peers():
        parser.add_argument(
            f"--{peer}-python", help=f"python of an environment with {peer} instead of making one"
        )
    return parser.parse_args(argv)


def main() -> int:
    """Run the scripts, write the table, compare."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    scripts = {name: SCRIPTS[name] for name in SCRIPTS if name in args.only}
    given = {peer: vars(args)[f"{peer}_python"] for peer in peers()}
    pythons, reasons = find_pythons({peer for script in scripts.values() for peer in script.peers}, given)
    folder = CACHE / "quick" if args.quick else RESULTS
    found = {
        name: run_script(name, script, args, pythons, reasons, folder) for name, script in scripts.items()
    }
    before = committed()
    content = merge({} if args.quick else on_disk(), found)
    text = text_of(content)
    target = folder / "bench.json" if args.quick else BENCH
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not args.quick:
        README.write_text(between_markers(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    log.info("\n%s\n\nwrote %s", text, target.relative_to(ROOT))
    failed = [result.failed for result in found.values() if result.failed]
    gone = lost(before, content)
    for sentence in failed:
        log.error("failed: %s", sentence)
    for sentence in gone:
        log.error("lost: %s", sentence)
    return 1 if failed or gone else 0


if __name__ == "__main__":
    sys.exit(main())

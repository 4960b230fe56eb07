"""experiments/reliability: runs that meet a fault are, after the same command once more, the runs without one."""

import json
import subprocess
import sys

import pytest

# a full disk and a cache that cannot be written are mounts of their own, which need root
EACH = [
    ("kill", 0.3), ("kill", 0.62), ("kill_anytime", 0.4), ("sigterm", 0.62), ("ctrl_c", 0.02), ("ctrl_c", 0.7),
    ("out_of_memory", 0.5), ("nan_loss", 0.9), ("nan_gradient", 0.7), ("loader_worker_killed", 0.3),
    ("rank_0_killed", 0.5), ("rank_1_killed", 0.6),
]  # fmt: skip


def inject(root, folder, faults):
    plan, out = folder / "plan.json", folder / "out.json"
    plan.write_text(json.dumps([{"fault": fault, "point": point, "seed": 1} for fault, point in faults]))
    command = [sys.executable, "experiments/reliability/inject.py", "--plan", str(plan), "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcomes = json.loads(out.read_text())["outcomes"]
    assert len(outcomes) == len(faults)
    assert all(outcome["recovered"] for outcome in outcomes)
    for (fault, point), outcome in zip(faults, outcomes, strict=True):
        # a reader of rows that has read its last is not missed
        assert outcome["commands"] in ((1, 2) if fault == "loader_worker_killed" else (2,)), (fault, point)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_loses_nothing_to_any_fault(root, tmp_path):
    inject(root, tmp_path, EACH)

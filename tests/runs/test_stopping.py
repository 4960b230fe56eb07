"""What stopped a run, in one line: memory, disk, numbers, a dead process."""

from multiprocessing.resource_sharer import DupFd

import pytest
import torch

from reft_lightning.runs.stopping import trouble_of


def raised(action):
    with pytest.raises(OSError) as caught:  # noqa: PT011  whichever the machine has
        action()
    return caught.value


def of_a_dead_worker():
    """Fetch a batch from a process that is no longer there."""
    batch = DupFd.__new__(DupFd)
    batch._id = ("/nowhere/at/all", 1)
    batch.detach()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "a data-loading process died",
        ),
        (raised(of_a_dead_worker), "a data-loading process died"),
        (OSError(28, "No space left on device"), "cannot write to disk"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:7"), "another process of this run died"),
        (FloatingPointError("train/loss is nan"), "train/loss is nan"),
    ],
    ids=["worker", "its batch", "disk", "memory", "rank", "numbers"],
)
def test_what_is_no_fault_of_the_code_is_said_in_one_line(error, said):
    assert said in trouble_of(error)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), KeyError("x"), OSError("x")]
)
def test_the_traceback_of_anything_else_is_shown(error):
    assert trouble_of(error) is None

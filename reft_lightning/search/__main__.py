"""One of several workers of a study; :func:`reft_lightning.search.command.run` starts it."""

import sys

from .command import run_worker

run_worker(sys.argv[1:])

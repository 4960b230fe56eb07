"""One of several workers of a study; :func:`reft_lightning.search.run` starts it."""

import sys

from . import run_worker

run_worker(sys.argv[1:])

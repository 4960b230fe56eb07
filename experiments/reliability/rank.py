"""The other rank of a run under `inject.py`: `reft-train` with the fault that the environment names."""

import json
import os

from inject import Counters, Fault, import_everything, watch

if __name__ == "__main__":
    from reft_lightning import cli

    import_everything()
    fault, at = json.loads(os.environ["FAULT"])
    watch(fault and Fault(**fault), at, Counters())
    cli.train()

"""The interventions of a large model alone, forward and backward, next to pyreft's.

    python experiments/speed/interventions.py --pyreft-python pyreft-venv/bin/python --out interventions

No base model: hidden states of width d come in with a gradient wanted and go out, as between two blocks. 32 layers of
LoReFT, d = 4096, r = 8, 8 rows with 14 positions. pyreft keeps a d x d buffer a layer (64 MiB at d = 4096) and its
backward takes about a second a layer, so it runs ``--peer-layers`` layers and its time is scaled up: its layers share
nothing. Ours runs all of them, because R of all layers is computed at once.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from figures import add_arguments, header, ratio, seconds_table, write
from processes import interleaved, is_worker, serve

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
ROWS, POSITIONS = 8, 14


def hidden_states(dim: int) -> torch.Tensor:  # (b, positions, d)
    """Return hidden states that a gradient is wanted for."""
    return torch.randn(ROWS, POSITIONS, dim).requires_grad_(True)


def ours(dim: int, layers: int, rank: int, **_: int):
    """All layers of this project, with R computed once for all, as a forward pass of a model does."""
    from reft_lightning.interventions import LoReFT, rotations
    from reft_lightning.interventions.subspace import lend

    stack = [LoReFT(dim, rank=rank) for _ in range(layers)]

    def run(number: int) -> None:
        x = hidden_states(dim).flatten(0, 1)
        with lend(rotations(stack)):
            for phi in stack:
                x = phi(x)
        x.sum().backward()

    return run


def pyreft(dim: int, rank: int, peer_layers: int, **_: int):
    """Some layers of pyreft."""
    import pyreft as peer

    stack = [
        peer.LoreftIntervention(embed_dim=dim, low_rank_dimension=rank, dtype=torch.float32)
        for _ in range(peer_layers)
    ]

    def run(number: int) -> None:
        x = hidden_states(dim)
        for phi in stack:
            x = phi(x)
        x.sum().backward()

    return run


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "interventions", rounds=8, model=False, peers=("pyreft",))
    parser.add_argument("--dim", type=int, default=4096, help="width d")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--peer-layers", type=int, default=2, help="layers that pyreft runs; scaled to --layers"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve({"ours": ours, "pyreft": pyreft})
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    settings = {name: vars(args)[name] for name in ("dim", "layers", "rank", "peer_layers")}
    with_peer = args.pyreft_python is not None
    records = interleaved(
        __file__,
        ["ours", "pyreft"] if with_peer else ["ours"],
        settings,
        rounds=args.rounds,
        warmup=args.warmup,
        threads=args.threads,
        pythons={"pyreft": args.pyreft_python} if with_peer else {},
        name="interventions",
    )
    figures = []
    if with_peer:
        scale = args.layers / args.peer_layers
        what = f"interventions alone, d={args.dim}, {args.layers} layers, r={args.rank}: pyreft / ours"
        above = [seconds * scale for seconds in records["pyreft"]["wall"]]
        note = f"pyreft: {args.peer_layers} layers x {scale:g}"
        goal = 100 if (args.dim, args.layers, args.rank) == (4096, 32, 8) else None
        figures.append(ratio(what, above, records["ours"]["wall"], goal=goal, better="higher", note=note))
    missing = {} if with_peer else {"pyreft": "no --pyreft-python"}
    facts = header("Interventions alone", args, torch=torch.__version__, **settings, left_out=missing)
    text = seconds_table(records, "ours")
    if with_peer:
        text += f"\n\nThe times of pyreft are of {args.peer_layers} layers, ours of {args.layers}."
    write(args.out, facts, records, figures, text)
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()

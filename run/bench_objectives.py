#!/usr/bin/env python3
"""Time and memory of an objective's training step, next to the same model and loss in other people's code.

    python run/bench_objectives.py                                       # tiny, all that have a peer
    python run/bench_objectives.py --objective clip coca --preset base --batch 8 --pairs 3

The peers: open_clip (CLIP, CoCa), transformers (MAE), and lightly with timm's ViT (SimCLR, SimSiam). On a CPU, in fp32,
with captions that fill the text, so that padding, of which we compute nothing, plays no part. OMP_NUM_THREADS=1 gives
the steadiest times.
"""

import torch
from jsonargparse import Namespace

from mug.model.presets import PRESETS
from mug.run.benchmarks.objective_step import compare_with_peer, describe
from mug.run.benchmarks.peers import PEERS
from mug.run.benchmarks.record import Record
from mug.run.common.command_line import Parser, check_min
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.packages import load_package


def main(console: Console) -> None:
    options = parse()
    for objective in options.objective:
        load_package(PEERS[objective].package, "bench")  # before minutes of measurements
    record = Record(options.json)
    console.info(f"CPU, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}, fp32")
    for objective in options.objective:
        record.add(compare_with_peer(objective, options.preset, options.batch, options.pairs))
        console.info(describe(record.rows[-1]))


def parse() -> Namespace:
    """The command line.

    Raises:
        RunError: an objective without a peer, an unknown preset, or a number out of range.
    """
    parser = Parser(prog="bench_objectives.py", description=__doc__.splitlines()[0])
    parser.add_argument("--objective", nargs="+", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--preset", type=str, default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--pairs", type=int, default=12, help="timed steps of each side, after one that is not")
    parser.add_argument("--json", type=str, help="write all results to this file, a JSON object a line")
    options = parser.parse_args()
    for name, given, known in (("objective", options.objective, PEERS), ("preset", [options.preset], PRESETS)):
        if unknown := [value for value in given if value not in known]:
            raise RunError(f"--{name} {unknown[0]} is not one of {', '.join(known)}")
    check_min(options, {"batch": 2, "pairs": 1}, "--")
    return options


if __name__ == "__main__":
    run_command(main)

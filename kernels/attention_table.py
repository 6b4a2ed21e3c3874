"""Which backend attention takes on a GPU: attention_table.json, read once, and made from benchmark rows."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("attention_table.json")
# Upper bounds on tokens. Above 64 they are whole tiles of the kernels: 197 falls to 256, 257 to 320, 577 to 640.
BUCKETS = (16, 32, 64, 128, 256, 320, 640, 1280)


class Key(NamedTuple):
    """One entry.

    Args:
        architecture: such as "sm_90".
        training: forward and backward together; else forward alone.
        head_dim: D.
        tokens: bucket of the longer of queries and keys.
        causal, varlen: as in the call; varlen is packing by cu_seqlens.
    """

    architecture: str
    training: bool
    head_dim: int
    tokens: int
    causal: bool
    varlen: bool


def architecture(device: torch.device | str) -> str:
    """Of a CUDA device, such as "sm_90" of H100 and H200."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def bucket(tokens: int) -> int:
    """The least bound that holds so many tokens; 0 where they are more than was ever measured."""
    for bound in BUCKETS:
        if tokens <= bound:
            return bound
    return 0


def read_table(path: Path = PATH) -> dict[Key, str]:
    """Key → backend."""
    entries = json.loads(path.read_text())["entries"]
    return {Key(*(entry[field] for field in Key._fields)): entry["backend"] for entry in entries}


def fastest(rows: Iterable[dict]) -> dict[Key, str]:
    """The backend with the least geometric mean of times for each key, among those that served all of its shapes.

    Args:
        rows: one timing each, with `backend`, `pass` ("forward", "both"; others are passed over), `architecture`,
            `head_dim`, `tokens` (the longer of Nq and Nk), `causal`, `varlen`, `milliseconds`, and `shape`: anything
            hashable that tells apart what one backend measured under the same key, such as (B, Nq, Nk, H).
    """
    times: dict[Key, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["pass"] in ("forward", "both") and bucket(row["tokens"]):
            known = {**row, "training": row["pass"] == "both", "tokens": bucket(row["tokens"])}
            key = Key(*(known[field] for field in Key._fields))
            times[key][row["backend"]][row["shape"]] = row["milliseconds"]
    choice = {}
    for key, backends in times.items():
        shapes = set().union(*backends.values())
        means = {name: _log_mean(t.values()) for name, t in backends.items() if t.keys() == shapes}
        if means:
            choice[key] = min(means, key=means.get)
    return choice


def _log_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return sum(logs) / len(logs)


def write_table(rows: Iterable[dict], measured: dict[str, str], path: Path = PATH) -> None:
    """Write what `rows` say into the table; entries of architectures that they do not name stay.

    Args:
        measured: where the figures come from (device, driver, versions, date, command), kept beside the entries for
            each architecture.
    """
    table = json.loads(path.read_text())
    new = fastest(rows)
    architectures = {key.architecture for key in new}
    kept = {key: name for key, name in read_table(path).items() if key.architecture not in architectures}
    table["entries"] = [{**key._asdict(), "backend": name} for key, name in sorted({**kept, **new}.items())]
    table["measured"] = {**table["measured"], **{architecture: measured for architecture in sorted(architectures)}}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table["entries"])
    entries = f"[\n{lines}\n  ]" if lines else "[]"
    path.write_text(f'{{\n  "measured": {json.dumps(table["measured"])},\n  "entries": {entries}\n}}\n')


TABLE = read_table()

"""Which backend attention uses on a GPU: attention_table.json, read once, and written from benchmark rows."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("attention_table.json")
# Upper bounds on tokens. Above 64 they are full tiles of the kernels: 197 falls to 256, 257 to 320, 577 to 640.
BUCKETS = (16, 32, 64, 128, 256, 320, 640, 1280)


class Key(NamedTuple):
    """One entry.

    Args:
        architecture: such as "sm_90".
        training: forward and backward together; else only forward.
        head_dim: D.
        queries, keys: buckets of how many of them a sequence has.
        causal, varlen: as in the call; varlen is packing by cu_seqlens.
    """

    architecture: str
    training: bool
    head_dim: int
    queries: int
    keys: int
    causal: bool
    varlen: bool


def architecture(device: torch.device | str) -> str:
    """Returns the architecture of a CUDA device, such as "sm_90" of H100 and H200."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def bucket(tokens: int) -> int:
    """Returns the smallest bound for so many tokens; 0 where they are more than was ever measured."""
    for bound in BUCKETS:
        if tokens <= bound:
            return bound
    return 0


def read_table(path: Path = PATH) -> dict[Key, str]:
    """Key → backend."""
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return {Key(*(entry[field] for field in Key._fields)): entry["backend"] for entry in entries}


def fastest(rows: Iterable[dict]) -> dict[Key, str]:
    """Returns for each key the backend with the smallest geometric mean time, of those that served all its shapes.

    Args:
        rows: one timing each, with `backend`, `pass` ("forward", "both"; others are passed over), `architecture`,
            `head_dim`, `queries`, `keys`, `causal`, `varlen`, `milliseconds`, and `shape`: anything hashable that
            distinguishes what one backend measured under the same key, such as (B, Nq, Nk, H).
    """
    times: dict[Key, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        bounds = {name: bucket(row[name]) for name in ("queries", "keys")}
        if row["pass"] in ("forward", "both") and all(bounds.values()):
            known: dict[str, Any] = {**row, "training": row["pass"] == "both", **bounds}
            key = Key(*(known[field] for field in Key._fields))
            times[key][row["backend"]][row["shape"]] = row["milliseconds"]
    choice = {}
    for key, backends in times.items():
        shapes = set().union(*backends.values())
        means = {name: _log_mean(t.values()) for name, t in backends.items() if t.keys() == shapes}
        if means:
            choice[key] = min(means, key=lambda name: means[name])
    return choice


def _log_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return sum(logs) / len(logs)


def write_table(rows: Iterable[dict], measured: dict[str, str], path: Path = PATH) -> None:
    """Write the results of `rows` into the table; entries whose keys they do not measure stay.

    A reader meanwhile, or after a kill, finds the old table or the new one.

    Args:
        measured: where the times come from (device, driver, versions, date, command), kept next to the entries for
            each architecture, as of the last writing.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    new = fastest(rows)
    architectures = sorted({key.architecture for key in new})
    entries = sorted({**read_table(path), **new}.items())
    table["entries"] = [{**key._asdict(), "backend": name} for key, name in entries]
    table["measured"] = {**table["measured"], **dict.fromkeys(architectures, measured)}
    lines = ",\n".join("    " + json.dumps(entry) for entry in table["entries"])
    entries = f"[\n{lines}\n  ]" if lines else "[]"
    partial = path.with_suffix(".partial")
    text = f'{{\n  "measured": {json.dumps(table["measured"])},\n  "entries": {entries}\n}}\n'
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


TABLE = read_table()

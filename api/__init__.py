"""MUG from Python: load a run or an export; embed, caption and reconstruct images; train on pairs (docs/python.md)."""

from mug.api.models import Model, load
from mug.api.pairs import read_pairs
from mug.api.training import train

__all__ = ["Model", "load", "read_pairs", "train"]

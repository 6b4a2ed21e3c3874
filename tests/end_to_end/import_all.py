"""Imports every module of the installed package, and prints where it lies and how many there are."""

import importlib
import pkgutil
import sys

import mug

names = [found.name for found in pkgutil.walk_packages(mug.__path__, "mug.")]
for name in names:
    importlib.import_module(name)
sys.stdout.write(f"{len(names)} modules in {', '.join(mug.__path__)}\n")

"""Run a command whose batches take a second more to be read: python slow_data.py run/pretrain.py OPTIONS."""

import runpy
import sys
import time

from mug.data.kinds.pairs import Pairs

read = Pairs.batch


def read_slowly(self, *arguments):
    time.sleep(1)
    return read(self, *arguments)


if __name__ == "__main__":
    Pairs.batch = read_slowly
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")

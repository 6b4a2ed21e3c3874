import os

# Threads that wait for each other on a busy machine make these small products many times slower, in commands too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # read when a kernel is defined, so before any test module imports triton
    os.environ["TRITON_INTERPRET"] = "1"

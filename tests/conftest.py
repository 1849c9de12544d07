import os

import torch

# Small networks on shared machines: a second thread would wait more than it works. Subprocesses read the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

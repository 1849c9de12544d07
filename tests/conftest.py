import os
import signal

import torch

# Small networks on shared machines: a second thread would wait more than it works. Subprocesses read the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The programs leave signals ignored that they find so, as in the background of a script: tests may run there, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

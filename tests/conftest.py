"""One thread in every test and in every process that a test starts: more of them fight for the cores, and lose."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

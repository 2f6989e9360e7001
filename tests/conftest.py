"""One thread, no network and no wait for the disk, for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# A process that is killed loses nothing that it has written; only a machine without power does.
os.fsync = lambda handle: None

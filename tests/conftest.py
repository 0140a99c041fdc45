"""Settings all tests share."""

import torch

# Tiny models: on a busy machine a second thread waits for its core ten times longer than it computes.
torch.set_num_threads(1)

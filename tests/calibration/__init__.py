"""Tests of the offline half; pytest calls these two functions around all of them."""

import torch

_THREADS = torch.get_num_threads()


def setup_module() -> None:
    # Tiny tensors: on a busy machine two threads that wait for each other take ten times as long as one.
    torch.set_num_threads(1)


def teardown_module() -> None:
    torch.set_num_threads(_THREADS)

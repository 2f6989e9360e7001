import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # Models this small run ten times slower on several threads of a busy machine than on one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    """One thread (two tests at once would otherwise fight for the cores) and the same random numbers in every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

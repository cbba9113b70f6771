import os
import warnings
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    """One thread (tests side by side would fight for the cores) and the same random numbers in every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def weights() -> Path:
    """The cache with the real models, made if need be by the real code; else the test is skipped, loudly.

    UNIMOE_TEST_WEIGHTS=0 skips such tests without trying.
    """
    from unimoe.errors import UserError
    from unimoe.prepare import cache_folder, prepare

    problem = "UNIMOE_TEST_WEIGHTS=0"
    if os.environ.get("UNIMOE_TEST_WEIGHTS") != "0":
        try:
            prepare()
            return cache_folder()
        except UserError as error:
            problem = str(error)
    warnings.warn(f"NOTHING IS TESTED ON REAL WEIGHTS: {problem}", stacklevel=1)
    pytest.skip(f"NO REAL WEIGHTS: {problem}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved model of random weights that sees and hears, two of four experts in its first layer."""
    from unimoe.testing import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), {"num_experts": 4, "top_k": 2})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

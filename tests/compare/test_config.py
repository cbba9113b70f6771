from importlib.resources import files
from pathlib import Path

import pytest

from unimoe.compare.config import read_config
from unimoe.compare.design import read_designs


@pytest.mark.parametrize(
    "file", sorted(Path(str(files("unimoe.configs").joinpath("compare"))).glob("*.yaml"))
)
def test_shipped_comparisons_can_be_read(file):
    config = read_config(str(file))
    assert len(read_designs(config.designs, config.placement)) >= 3 and config.match == "active"

"""Settings of a run: limits that look alike, and former names."""

import pytest
from jsonargparse import get_loader

from unimoe.stages.cli import main
from unimoe.training import lightning_cli as cli
from unimoe.training import sharding


def test_one_batch_is_not_all_of_them():
    assert cli._is_off(1.0, 1.0) and cli._is_off(None, 1.0) and cli._is_off(None, None)
    assert not cli._is_off(1, 1.0) and not cli._is_off(0.5, 1.0) and not cli._is_off("00:01:00:00", None)


def test_configurations_of_version_0_1_are_read_with_the_current_names():
    """config.yaml of an old run names ``Sharded``, which is ``FSDP2Strategy`` today."""
    strategy = "{class_path: unimoe.training.sharding.Sharded, init_args: {expert_parallel: 2}}"
    found = get_loader(cli._YAML)(f"trainer: {{strategy: {strategy}}}\ndata: {{too_long: cut, steps: 3}}\n")
    module, _, name = found["trainer"]["strategy"]["class_path"].rpartition(".")
    assert module == sharding.__name__ and getattr(sharding, name) is sharding.FSDP2Strategy
    assert found["trainer"]["strategy"]["init_args"] == {"expert_parallel": 2}
    assert found["data"] == {"overflow": "truncate", "steps": 3}


def test_the_help_describes_the_fields_of_dataclasses(capsys):
    """They are read from the source for a help text only, also after a command that did without."""
    with pytest.raises(Exception, match="no_such_flag"):
        main(["fit", "--no_such_flag", "1"])
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.lora.help"])
    assert end.value.code == 0 and "Rank r of the update." in capsys.readouterr().out

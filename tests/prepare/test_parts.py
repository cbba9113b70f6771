"""The table of parts: every row is complete, and its converter exists."""

import importlib
import re

import pytest

from unimoe.errors import UserError
from unimoe.prepare.parts import PARTS, find_part


@pytest.mark.parametrize("part", PARTS.values(), ids=list(PARTS))
def test_a_row_is_complete(part):
    assert re.fullmatch(r"[0-9a-f]{64}", part.sha256)
    assert re.search(rf"-{part.version}(-.*\.whl|\.tgz)$", part.filename)
    assert part.size > 0 and part.room > 0 and part.licence
    module, function = part.converter.split(":")
    assert callable(getattr(importlib.import_module(f"unimoe.prepare.{module}"), function))


def test_no_two_parts_share_a_folder():
    assert len({part.folder for part in PARTS.values()}) == len(PARTS)


def test_an_unknown_part_is_an_error():
    assert find_part("llm") is PARTS["llm"]
    with pytest.raises(UserError, match="no part is called 'video'; the parts are .*llm"):
        find_part("video")

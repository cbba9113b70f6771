import pytest

from unimoe.commands.fit import system
from unimoe.errors import UserError


def test_the_file_says_which_system(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("system: detection\n")
    assert system(["fit", "-c", str(path)]) == "detection"
    assert system(["fit", f"--config={path}", "--system", "stages"]) == "stages"
    assert system(["fit", "-h"]) == "stages"
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        system(["fit", "-c", str(path)])

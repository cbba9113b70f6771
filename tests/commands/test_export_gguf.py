"""``unimoe export gguf`` as a command."""

import pytest

from unimoe.commands import main as cli
from unimoe.inference.gguf import SOURCE, source_hash
from unimoe.inference.llama_cpp import Llama
from unimoe.testing import IMAGE, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for part in tiny_model(folder, {"router": {"kind": "top_p"}, "placement": "none"}, image=IMAGE):
        part.save_pretrained(folder / "model")
    return folder / "model"


def test_a_file_that_names_its_model(folder, tmp_path):
    file = tmp_path / "new" / "m.gguf"
    assert cli.main(["export", "gguf", str(folder), str(file), "--type", "f16"]) == 0
    llama = Llama(file, 1, 256)
    assert llama.metadata(SOURCE) == source_hash(folder)
    assert llama.metadata("general.file_type") == "1"
    llama.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.bin"], "m.bin: expected a name that ends with .gguf"),
        (["m.gguf", "--type", "q4_1"], "invalid choice: 'q4_1'"),
    ],
)
def test_mistakes(folder, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "gguf", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

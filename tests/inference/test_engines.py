from pathlib import Path

import pytest

from unimoe.errors import UserError
from unimoe.inference.engines import load_engine


def test_torch_is_the_default(tiny_folder):
    model, processor = load_engine(str(tiny_folder), device="cpu")
    assert type(model).__name__ == "UniMoeForConditionalGeneration" and processor.tokenizer is not None


@pytest.mark.parametrize("given", [{"type": "q8_0"}, {"gguf": Path("m.gguf")}])
def test_settings_of_another_engine_are_refused(tiny_folder, given):
    with pytest.raises(UserError, match="the engine torch has no such setting; add --engine llama.cpp"):
        load_engine(str(tiny_folder), **given)

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unimoe.compare.base import open_base
from unimoe.compare.text import Texts, read_text
from unimoe.compare.trunk import Trunk
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_loss
from unimoe.testing import tiny_model


def ids(batches):
    return [part["input_ids"] for batch in batches for part in batch]


def test_a_seed_gives_every_design_the_same_batches(small):
    config = small()
    data = Texts(config, open_base(config))
    first, again, other = (ids(data.train(seed, 4)) for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert {tuple(one.shape) for one in first} == {(2, 17)}
    assert torch.equal(first[2], ids(data.train(0, 3))[2])  # whatever the number of steps


def test_windows_pass_the_trunk_once_and_lose_the_same(small, tmp_path):
    """The layers below the first one with experts run once for each step, whatever the number of designs."""
    model = tiny_model(tmp_path / "parts")[0]
    decoder: Any = model.model.language_model
    config = small()
    plain = Texts(config, open_base(config))
    (batch,) = plain.train(0, 1)
    whole, count = answer_loss(model, batch)
    runs = []
    decoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    base: Any = SimpleNamespace(trunk=Trunk(model, 1), processor=open_base(config).processor)
    data = Texts(config, base)
    for _ in range(3):
        (batch,) = data.train(0, 1)
        upper, upper_count = answer_loss(model, batch)
        assert upper_count == count
        torch.testing.assert_close(upper, whole)
    assert len(runs) == 1
    held = [data.evaluation("test")["digits"] for _ in range(2)]
    assert held[0] is held[1] and "inputs_embeds" in held[0][0][0]


def test_whole_numbers_are_rows_of_each_file(small, texts):
    files = {str(texts / "numbers.txt"): 1, str(texts / "prose.txt"): 3}
    config = small(train=files)
    data = Texts(config, open_base(config))
    decode = data.tokenizer.decode
    for batch in ids(data.train(0, 5)):
        digits = [sum(letter.isdigit() for letter in decode(row)) > 5 for row in batch]
        assert digits == [True, False, False, False]


def test_losses_are_bits_per_byte(small, texts):
    """A byte is a token here, so nats a token are bits a byte times ln 2; é has two bytes."""
    config = small()
    data = Texts(config, open_base(config))
    assert data.loss("digits", math.log(2)) == pytest.approx(1)
    windows = ids(data.evaluation("test")["digits"])
    assert len(windows) == 1 and windows[0].shape == (2, 17)
    assert data.tokenizer.decode(windows[0][0]) == (texts / "numbers.txt").read_text()[:17]


def test_lines_of_json(texts):
    (texts / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    assert read_text(str(texts / "a.jsonl")) == "one\n\ntwo"
    for content, message in (('{"txt": 1}', 'expected lines of {"text"'), ("[", "expected lines")):
        (texts / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_text(str(texts / "a.jsonl"))
    (texts / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="expected text in UTF-8"):
        read_text(str(texts / "b.txt"))

import functools
import gc
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Slow tests have a quarter of an hour each, where they name no limit: the machine may be busy.

    Their files come first in the share of each process, and are dealt out evenly: pytest-xdist gives every
    process a part of the list without gaps, and what they take from each other at the end is small.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    files = Counter(item.path for item in slow)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    shares: list[list[pytest.Item]] = [[] for _ in range(processes)]
    weights = [0] * processes
    for path, weight in files.most_common():
        lightest = weights.index(min(weights))
        weights[lightest] += weight
        shares[lightest] += [item for item in items if item.path == path]
    others = iter([item for item in items if item.path not in files])
    for number, share in enumerate(shares, 1):
        size = len(items) * number // processes - len(items) * (number - 1) // processes
        share += islice(others, max(0, size - len(share)))
    items[:] = [*chain(*shares), *others]


def pytest_collection_finish():
    """What the imports have made stays: a full garbage collection need not look through it each time, for a
    third of a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic():
    """One thread (tests side by side would fight for the cores), the same random numbers, and the log of a
    command in every test, whichever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("unimoe").setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def _callbacks_are_looked_up_once():
    """Lightning asks for those of plugins for each Trainer, and reads the metadata of every installed
    distribution."""
    registry = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is not None and not hasattr(registry.entry_points, "cache_clear"):
        registry.entry_points = functools.cache(registry.entry_points)


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
def built():
    """The operators in C++, compiled once into the cache; tests of them are skipped where no compiler can."""
    from unimoe.errors import UserError
    from unimoe.kernels import native

    try:
        native.build()
    except UserError as error:
        pytest.skip(str(error))
    native.ops.cache_clear()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved model of random weights that sees and hears, two of four experts in its first layer."""
    from unimoe.testing import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), {"num_experts": 4, "top_k": 2})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detector_folder(tmp_path_factory) -> Path:
    """A saved detector of random weights that knows the words cat, red and car."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast, TimmBackboneConfig

    from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection

    folder = tmp_path_factory.mktemp("tiny_detector")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "cat", "red", "car"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    backbone = TimmBackboneConfig(backbone="test_efficientnet", out_indices=[2, 3, 4])
    sizes = {"d_model": 32, "ffn_dim": 32, "num_heads": 4, "decoder_layers": 2, "num_queries": 10}
    torch.manual_seed(0)
    config = DynamicDinoConfig(
        backbone_config=backbone, text_config=text, csp_blocks=1, csp_expansion=0.5, **sizes
    )
    DynamicDinoForObjectDetection(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory) -> Path:
    """What ``unimoe prepare`` makes, in small: red and blue squares for sprites, grey photos, a random text
    encoder that knows the concepts' names."""
    from PIL import Image
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from unimoe.synthetic.concepts import HELD_OUT, TRAINED

    root = tmp_path_factory.mktemp("tiny_parts")
    for name in ("sprites", "photos"):
        (root / name).mkdir()
    for i, concept in enumerate(TRAINED + HELD_OUT):
        colour = (255, 0, 0, 255) if i % 2 else (0, 0, 255, 255)
        Image.new("RGBA", (72, 40), colour).save(root / "sprites" / f"{ord(concept.char):x}.png")
    for i in range(6):
        Image.new("RGB", (140, 120), (90 + i, 90 + i, 90 + i)).save(root / "photos" / f"p{i}.png")
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [word for concept in TRAINED + HELD_OUT for word in concept.name.split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*marks.values(), ".", *words]))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(root / "text")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(root / "text")
    return root


@pytest.fixture(params=[0, 4, 16], ids=lambda count: f"shifted by {count}")
def shifted(request) -> Callable[[Any], Any]:
    """A function that moves a tensor, or all weights of a module (in place), so many bytes from an aligned
    address.

    Matrix libraries choose their path, and with it the rounding, by alignment: what compares results of equal
    weights bit for bit asks for this and shows that its loading does not depend on where a file has them.
    Weights in files begin anywhere; fresh tensors of torch begin at multiples of 64 bytes.
    """

    def move(found: Any) -> Any:
        if isinstance(found, torch.nn.Module):
            for tensor in [*found.parameters(), *found.buffers()]:
                tensor.data = move(tensor.data)
            return found
        size = found.element_size()
        room = found.new_empty(found.numel() + 64 // size)
        start = (request.param - room.data_ptr()) % 64 // size
        return room[start : start + found.numel()].view(found.shape).copy_(found)

    return move

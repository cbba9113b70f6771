"""The library's checks at load, and sequences in its cache."""

import ctypes
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.inference import llama_cpp
from unimoe.inference.gguf import write_gguf
from unimoe.inference.llama_cpp import INSTALL, VERSION, ContextParams, Llama, ModelParams, load_library
from unimoe.testing import IMAGE, tiny_model

load_afresh = load_library.__wrapped__


def refused(match, *settings):
    with pytest.raises(UserError, match=match) as error:
        load_afresh(*settings)
    assert INSTALL in str(error.value) and "\n" not in str(error.value)


def test_an_engine_that_is_not_installed_or_of_another_version(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(llama_cpp, "version", missing)
    refused("needs xllamacpp, found none: pip install 'xllamacpp==")
    monkeypatch.setattr(llama_cpp, "version", lambda name: "2025.1.1")
    refused(f"needs xllamacpp {VERSION}, found 2025.1.1")
    monkeypatch.setattr(llama_cpp, "version", lambda name: VERSION)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    refused("without its library")


def test_a_library_for_another_processor_or_with_other_functions(tmp_path, monkeypatch):
    (tmp_path / "other.so").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(100))
    refused("cannot be loaded on this machine", tmp_path / "other.so")
    monkeypatch.setattr(llama_cpp.ctypes, "CDLL", lambda path: SimpleNamespace())
    refused("has no function llama_backend_init", tmp_path / "other.so")


def test_a_structure_of_another_layout_is_refused():
    for function in (load_library().llama_model_default_params, load_library().llama_context_default_params):
        llama_cpp._check_defaults(function())
    shifted = ContextParams()
    ctypes.memmove(
        ctypes.addressof(shifted) + 4, ctypes.addressof(load_library().llama_context_default_params()), 128
    )
    with pytest.raises(
        UserError, match="ContextParams has another layout: its default of n_ctx is 0, expected 512"
    ):
        llama_cpp._check_defaults(shifted)
    with pytest.raises(UserError, match="ModelParams has another layout"):
        llama_cpp._check_defaults(ModelParams())


def test_a_processor_without_the_instructions_of_the_build(monkeypatch):
    info = "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | "
    monkeypatch.setattr(Path, "read_text", lambda self: "flags\t: sse3 avx fma\n")
    with pytest.raises(UserError, match="needs a processor with AVX2, which this one lacks"):
        llama_cpp._check_processor(info)
    monkeypatch.setattr(Path, "read_text", lambda self: "flags\t: sse3 avx2 fma\n")
    llama_cpp._check_processor(info)
    monkeypatch.setattr(Path, "read_text", lambda self: "Features\t: fp asimd\n")  # not x86
    llama_cpp._check_processor(info)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    model, processor = tiny_model(folder, {"placement": "interval"}, image=IMAGE)
    write_gguf(model.eval(), processor.tokenizer, folder / "m.gguf", "f32")
    return folder / "m.gguf"


def test_sequences_keep_apart_while_the_cache_grows(file):
    """Each token's logits are those of its sequence alone, before and after a larger context takes over."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (3, 300), generator=generator).tolist()
    llama = Llama(file, rows=3, cells=2000)
    alone = []
    for row in ids:
        alone.append(llama.decode(row, [0] * len(row)))
        llama.forget(0)
    llama.close()
    llama, sizes = Llama(file, rows=3, cells=2000), set()
    for place in range(0, 300, 50):
        for row in range(3):
            llama.decode(ids[row][place : place + 49], [row] * 49)
        found = llama.decode([ids[row][place + 49] for row in range(3)], [0, 1, 2])
        sizes.add(llama._cells)
        assert_close(found, torch.stack([alone[row][place + 49] for row in range(3)]), atol=1e-4, rtol=0)
    assert len(sizes) > 1 and llama.lengths == {0: 300, 1: 300, 2: 300}
    llama.close()


def test_a_cache_that_is_full_and_rows_out_of_range(file):
    llama = Llama(file, rows=1, cells=256)
    with pytest.raises(RuntimeError, match="at most 256 positions, found 300"):
        llama.decode([1] * 300, [0] * 300)
    assert llama.decode([1], [0]).shape == (1, llama.vocab_size)
    llama.close()
    for rows in (0, 257):
        with pytest.raises(UserError, match=f"1..256 answers at once, found {rows}"):
            Llama(file, rows, 256)

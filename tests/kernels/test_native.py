import ctypes
import logging
import re
import shutil

import pytest
import torch

from unimoe.errors import UserError
from unimoe.kernels import native


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path))
    native.ops.cache_clear()
    yield
    native.ops.cache_clear()


def test_unbuilt_is_no_error_and_says_how_to_build(caplog):
    with caplog.at_level(logging.INFO, logger=native.__name__):
        assert native.ops() is None
    assert caplog.messages == [
        "the experts' loops run in Python; python -m unimoe.kernels.native builds faster ones"
    ]


def test_a_broken_library_is_a_warning(caplog):
    native.library().parent.mkdir()
    native.library().write_bytes(b"no library")
    assert native.ops() is None
    assert "build it anew: python -m unimoe.kernels.native" in caplog.text


def test_another_torch_or_source_is_another_library(monkeypatch, tmp_path):
    path = native.library()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert native.library() != path
    monkeypatch.undo()
    source = tmp_path / "native.cpp"
    source.write_text("// other")
    monkeypatch.setattr(native, "SOURCES", (source,))
    assert native.library().name != path.name


def test_no_compiler_is_a_user_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no C\\+\\+ compiler 'no-such-compiler' found"):
        native.build()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_a_source_that_does_not_compile_leaves_its_messages(monkeypatch, tmp_path):
    source = tmp_path / "native.cpp"
    source.write_text("int main( {")
    monkeypatch.setattr(native, "SOURCES", (source,))
    with pytest.raises(UserError, match=r"cannot build native.cpp \(exit code 1\), see .*\.log"):
        native.build()
    assert "error" in native.library().with_suffix(".log").read_text()
    assert not native.library().exists()


def test_no_operator_is_defined_twice():
    """The second definition would end the process."""
    ours = re.findall(r'm\.def\(\s*"(\w+)\(', "".join(path.read_text() for path in native.SOURCES))
    python = "".join(path.read_text() for path in native.SOURCES[0].parent.glob("*.py"))
    ours += re.findall(r'"unimoe::(\w+)"', python)
    assert ours and len(ours) == len(set(ours))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_builds_a_library_that_loads_once(monkeypatch, tmp_path, caplog):
    """A small one: the operators themselves are compiled by the fixture ``built``, for the tests of them."""
    source = tmp_path / "native.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "SOURCES", (source,))
    path = native.build()
    assert path == native.library() and ctypes.CDLL(str(path)).answer() == 42
    assert sorted(path.parent.iterdir()) == [path]
    with caplog.at_level(logging.INFO, logger=native.__name__):
        assert native.ops() is torch.ops.unimoe
    assert caplog.messages == [f"the experts' loops run in C++: {path}"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.build() == path, "what is built is not built again"

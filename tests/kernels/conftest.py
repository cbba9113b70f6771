import pytest

from unimoe.kernels import native


@pytest.fixture(params=["python", "native"])
def loop(request, monkeypatch):
    """The cpu form with its loop in Python and in C++."""
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    if request.param == "python":
        monkeypatch.setattr(native, "ops", lambda: None)
    else:
        request.getfixturevalue("built")
        if native.ops() is None:
            pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")
    return request.param

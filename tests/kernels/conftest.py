import pytest

from unimoe.kernels import native


@pytest.fixture(params=["python", "native"])
def loop(request, monkeypatch):
    """The cpu form with its loop in Python and, where that is built, in C++."""
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    if request.param == "python":
        monkeypatch.setattr(native, "ops", lambda: None)
    elif native.ops() is None:
        pytest.skip("not built (python -m unimoe.kernels.native)")
    return request.param

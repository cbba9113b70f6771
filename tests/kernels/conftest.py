import pytest

from unimoe.errors import UserError
from unimoe.kernels import native


@pytest.fixture(scope="session")
def built():
    """The loop in C++, compiled once into the cache; tests of it are skipped where no compiler can."""
    try:
        native.build()
    except UserError as error:
        pytest.skip(str(error))
    native.ops.cache_clear()


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

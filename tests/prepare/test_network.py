import urllib.error

import pytest

from unimoe.errors import UserError
from unimoe.prepare.network import ask, reason, shown


def test_messages_never_show_a_password():
    assert shown("https://name:secret@index.example/simple/x/") == "https://index.example/simple/x/"
    assert shown("https://index.example/simple/") == "https://index.example/simple/"


def test_a_network_error_in_a_few_words():
    refused = ConnectionRefusedError(111, "Connection refused")
    assert reason(urllib.error.URLError(refused)) == "[Errno 111] Connection refused"
    assert reason(TimeoutError()) == "TimeoutError"


def test_certificates_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"trusted certificates .*ca\.pem: cannot be read"):
        ask("https://index.example/", certificates=str(tmp_path / "ca.pem"))


def test_a_local_file_is_read_without_a_network(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"content")
    with ask((tmp_path / "a.txt").as_uri()) as response:
        assert response.read() == b"content"

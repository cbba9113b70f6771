import hashlib
import subprocess
import sys

import pytest
import torch

from unimoe.errors import UserError
from unimoe.files import fingerprint, lock_folder, new_folder


def test_a_fingerprint_is_the_sha256_of_all_content_in_order():
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T  # numpy has no bfloat16
    raw = tensor.contiguous().view(torch.int16).numpy().tobytes()
    expected = hashlib.sha256("é".encode() + b"\x00\xff" + raw).hexdigest()
    assert fingerprint("é", b"\x00\xff", tensor) == expected
    assert fingerprint() == hashlib.sha256().hexdigest()
    assert fingerprint(torch.tensor(1.5)) == fingerprint(torch.tensor(1.5).numpy().tobytes())


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    code = f"""
from unimoe.errors import UserError
from unimoe.files import lock_folder
try:
    with lock_folder({str(folder)!r}, "--output"):
        print("held")
except UserError as error:
    print(error)
"""
    with lock_folder(folder):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert (
            done.stdout
            == f"{folder} is in use by another run; wait for it to end or choose another --output\n"
        )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "held\n" and not list(tmp_path.iterdir())


def test_a_new_folder_holds_nothing(tmp_path):
    for free in (tmp_path / "none", tmp_path):
        assert new_folder(free) == free
    (tmp_path / "file").write_text("kept")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="OUTPUT .* is there already"):
            new_folder(taken, "OUTPUT")

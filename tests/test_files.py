import hashlib

import torch

from unimoe.files import fingerprint


def test_a_fingerprint_is_the_sha256_of_all_content_in_order():
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T  # numpy has no bfloat16
    raw = tensor.contiguous().view(torch.int16).numpy().tobytes()
    expected = hashlib.sha256("é".encode() + b"\x00\xff" + raw).hexdigest()
    assert fingerprint("é", b"\x00\xff", tensor) == expected
    assert fingerprint() == hashlib.sha256().hexdigest()
    assert fingerprint(torch.tensor(1.5)) == fingerprint(torch.tensor(1.5).numpy().tobytes())

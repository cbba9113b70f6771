import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from unimoe.model.by_modality import ByModality


def test_modules_are_found_by_modality():
    image, speech = nn.Linear(2, 3), nn.Linear(4, 3)
    parts = ByModality({"image": image})
    parts["speech"] = speech
    assert list(parts) == list(parts.keys()) == ["image", "speech"] and len(parts) == 2
    assert parts["speech"] is speech and "speech" in parts and "video" not in parts
    assert dict(parts.items()) == {"image": image, "speech": speech}
    assert list(parts.values()) == [image, speech]
    assert set(parts.state_dict()) == {"image.weight", "image.bias", "speech.weight", "speech.bias"}
    del parts["image"]
    assert list(parts) == ["speech"]
    with pytest.raises(KeyError, match="image"):
        parts["image"]


def test_a_call_runs_the_module_of_its_modality_and_the_hooks():
    parts, called = ByModality({"image": nn.Linear(2, 3), "speech": nn.Linear(4, 3)}), []
    parts.register_forward_hook(lambda module, args, output: called.append(args[0]))
    x_TD = torch.randn(5, 4)
    assert torch.equal(parts("speech", x_TD), parts["speech"](x_TD)) and called == ["speech"]


def test_peft_can_train_a_copy():
    parts = ByModality({"image": nn.Linear(2, 3)})
    wrapped = ModulesToSaveWrapper(parts, "default")
    copy = wrapped.modules_to_save["default"]
    with torch.no_grad():
        copy["image"].weight.add_(1)
    x_TD = torch.ones(1, 2)
    torch.testing.assert_close(wrapped("image", x_TD), parts("image", x_TD) + 2)

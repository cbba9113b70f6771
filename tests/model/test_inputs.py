import inspect

from unimoe.model.configuration import MEDIA_INPUTS
from unimoe.model.inputs import MediaInputs
from unimoe.model.modeling import UniMoeForConditionalGeneration, UniMoeModel


def test_the_arguments_of_forward_are_those_of_the_encoders():
    """By the signature transformers tells known arguments of ``generate`` from misspelt ones."""
    names = [name for names in MEDIA_INPUTS.values() for name in names]
    assert [*names, "encoded_media"] == list(MediaInputs.__annotations__)
    for model in (UniMoeModel, UniMoeForConditionalGeneration):
        assert set(MediaInputs.__annotations__) < set(inspect.signature(model.forward).parameters)

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from unimoe.model.configuration import UniMoeConfig
from unimoe.testing import IMAGE


def test_a_modality_needs_an_encoder_and_a_connector():
    with pytest.raises(
        StrictDataclassClassValidationError, match="unknown modality 'smell' in the configuration"
    ):
        UniMoeConfig(modalities={"smell": IMAGE})
    with pytest.raises(
        StrictDataclassClassValidationError, match="modality 'image' needs the keys 'encoder' and 'connector'"
    ):
        UniMoeConfig(modalities={"image": {"encoder": IMAGE["encoder"]}})


def test_saved_and_loaded_it_is_the_same(tmp_path):
    text = {"model_type": "llama", "hidden_size": 32, "tie_word_embeddings": True}
    config = UniMoeConfig(text_config=text, modalities={"image": IMAGE}, image_token_id=7)
    assert config.tie_word_embeddings and config.token_ids() == {"image": 7}
    config.save_pretrained(tmp_path)
    again = UniMoeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.text_config.hidden_size == 32

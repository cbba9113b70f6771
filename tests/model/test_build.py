import pytest
import torch

from unimoe.errors import UserError
from unimoe.model.build import add_modalities
from unimoe.model.loading import load_model
from unimoe.testing import IMAGE, SPEECH, tiny_model


def test_a_finished_model_gets_a_further_medium(tmp_path):
    model, processor = tiny_model(tmp_path, image=IMAGE)
    with pytest.raises(UserError, match="takes no speech"):
        encode_speech(processor)
    ids = torch.arange(10, 40)[None]
    before = model(input_ids=ids).logits
    processor = add_modalities(model, processor, {"speech": SPEECH})
    assert torch.equal(model(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path / "both")
    processor.save_pretrained(tmp_path / "both")
    loaded, processor = load_model(tmp_path / "both", device="cpu", hub=False)
    batch = processor.pad([encode_speech(processor)])
    assert (batch["input_ids"] == loaded.config.speech_token_id).sum() == 10
    assert loaded(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_a_medium_is_added_once(tmp_path):
    model, processor = tiny_model(tmp_path, image=IMAGE)
    with pytest.raises(UserError, match="modalities.image: the model has image already"):
        add_modalities(model, processor, {"image": IMAGE})


def test_frames_start_as_pictures(tmp_path):
    model, processor = tiny_model(tmp_path, image=IMAGE)
    video = {
        "encoder": {"type": "frames", "image": IMAGE["encoder"], "frames": 8},
        "connector": {**IMAGE["connector"], "time": "mean", "weights": "image"},
    }
    add_modalities(model, processor, {"video": video})
    assert "weights" not in (model.config.modalities or {})["video"]["connector"]
    features = torch.randn(1, 8, 4, model.model.encoders["image"].hidden_size)
    with torch.no_grad():
        tokens = model.model.connectors["video"](features.flatten(1, 2))[0]
        frames = model.model.connectors["image"](features[0])[0]
    torch.testing.assert_close(tokens[0], frames.mean(0))
    other = {**video, "connector": {"type": "mlp", "time": "mean", "weights": "image"}}
    del model.model.encoders["video"]
    with pytest.raises(UserError, match="weights have shapes"):
        add_modalities(model, processor, {"video": other})


def encode_speech(processor):
    sound = {"type": "speech", "speech": torch.zeros(16000).numpy()}
    return processor.encode([{"role": "user", "content": [sound, {"type": "text", "text": "What?"}]}])

"""The converted parts at work: they are what they say they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unimoe.prepare import default_part
from unimoe.prepare.copied import PHOTO_FILES

pytestmark = pytest.mark.weights

SPOKEN = Path(__file__).parent / "animal_in_the_picture.flac"  # flite, voice slt, 16 kHz


def test_smollm2_tokenizer(weights: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_part("llm"))
    assert len(tokenizer("x =  5").input_ids) == 4  # 5 with the pre-tokenizer as the loader leaves it
    assert len(tokenizer("2026").input_ids) == 4
    for text in ("x =  5", "A cat,  a dog\n\n\tand 12.5 % naïve 日本語 🙂", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(weights: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = default_part("llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.max_position_embeddings == 8192
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_efficientnet_names_photos(weights: Path):
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.imagenet_info import ImageNetInfo
    from timm.data.transforms_factory import transforms_imagenet_eval

    model = timm.create_model(f"local-dir:{default_part('image')}", pretrained=True).eval()
    settings, names = resolve_model_data_config(model), ImageNetInfo()
    keys = ("crop_pct", "interpolation", "mean", "std")
    transform: Any = transforms_imagenet_eval(
        settings["input_size"][1:], **{key: settings[key] for key in keys}
    )
    for photo, expected, least in (("chelsea.png", "cat", 0.8), ("coffee.png", "espresso", 0.8)):
        picture = Image.open(default_part("photos") / photo).convert("RGB")
        with torch.no_grad():
            p_3 = model(transform(picture)[None]).softmax(-1)[0].topk(3)
        found = {names.index_to_description(int(i)): float(p) for p, i in zip(*p_3, strict=True)}
        assert sum(p for name, p in found.items() if expected in name) > least, found


def test_efficientnet_keeps_batch_norm_statistics(weights: Path):
    state = load_file(default_part("image") / "model.safetensors")
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    assert len(variances) == 49 and not any(torch.all(value == 1) for value in variances)


def test_whisper_writes_down_what_was_said(weights: Path):
    import whisper
    from tokenizers import Tokenizer

    folder = default_part("speech")
    config = json.loads((folder / "config.json").read_text())
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**config["dims"])).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    mel_MF = whisper.log_mel_spectrogram(_samples(SPOKEN), n_mels=80, padding=0)
    mel_1MF = whisper.pad_or_trim(mel_MF, 3000)[None]
    ids = list(config["prompt"])
    with torch.no_grad():
        features_1SD = model.encoder(mel_1MF)
        assert features_1SD.shape == (1, 1500, 384)
        while ids[-1] != 50256 and len(ids) < 30:
            ids.append(int(model.decoder(torch.tensor([ids]), features_1SD)[0, -1].argmax()))
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[len(config["prompt"]) : -1])
    assert text.strip().lower() == "what animal is in the picture?"


def _samples(file: Path) -> torch.Tensor:
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32")
    assert rate == 16000
    return torch.nn.functional.pad(torch.from_numpy(samples), (0, 30 * rate - len(samples)))


def test_minilm_knows_what_is_near(weights: Path):
    from transformers import AutoModel, AutoTokenizer

    folder = default_part("text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    batch = tokenizer(["cat", "kitten", "motorway"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states_BSD, mask_BS1 = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean_BD = torch.nn.functional.normalize((states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1), dim=-1)
    near, far = (mean_BD[0] @ mean_BD[1]).item(), (mean_BD[0] @ mean_BD[2]).item()
    assert near > 0.45 and far < 0.35


def test_sprites_and_photos_can_be_drawn(weights: Path):
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(default_part("sprites") / "openmoji.ttf", 96)
    picture = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(picture).text((4, 4), "🐈", font=font, embedded_color=True)
    assert picture.getbbox() and len(picture.getcolors(128 * 128) or []) > 20  # drawn, and in colours
    for name in PHOTO_FILES:
        with Image.open(default_part("photos") / name) as photo:
            assert min(photo.convert("RGB").size) >= 170

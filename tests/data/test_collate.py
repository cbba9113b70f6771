import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unimoe.data import Collator, ModalityBatchSampler, parse_record
from unimoe.data.collate import count_tokens
from unimoe.errors import UserError
from unimoe.media.video import write_video
from unimoe.model.configuration import IGNORED
from unimoe.model.loss import aux_loss
from unimoe.moe import record
from unimoe.moe.join import join
from unimoe.testing import AUDIO, SPEECH, VIDEO, tiny_model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    for name, seconds in (("short.wav", 0.7), ("long.flac", 1.5)):
        soundfile.write(folder / name, 0.1 * noise.standard_normal(int(22050 * seconds)), 22050)
    records = [
        {"image": ["a.png", "b.png"], "conversations": turns("<image><image>\nSame?", "No, not at all.")},
        {"conversations": turns("Hi", "Hello!", "Is <|im_end|> a word?", "No, <|im_end|> is none.")},
        {"speeches": ["short.wav"], "conversations": turns("<speech>", "So you say.")},
        {"speeches": ["long.flac"], "image": "b.png", "conversations": turns("<image><speech>", "A fox.")},
    ]
    return [parse_record(record, f"data.json[{index}]", folder) for index, record in enumerate(records)]


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def answers(sample):
    assistant = [turn for turn in sample.messages if turn["role"] == "assistant"]
    return "".join(turn["content"][0]["text"] + "<|im_end|>" for turn in assistant)


def test_labels_are_the_assistants_words_and_end_of_turn_and_nothing_else(built, samples):
    _, processor = built
    batch = Collator(processor)(samples)
    for sample, ids, labels, mask in zip(
        samples, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        learned = labels != IGNORED
        assert processor.tokenizer.decode(labels[learned]) == answers(sample)
        assert torch.equal(labels[learned], ids[learned])
        assert not (learned & (mask == 0)).any()


def test_media_of_all_rows_in_order(built, samples):
    _, processor = built
    batch = Collator(processor)(samples)
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])  # b.png twice
    assert batch["speech_features"].shape[:2] == (2, 80)
    assert batch["speech_frames"].tolist() == [70, 150]
    widths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (4, int(widths.max()))
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()  # padded on the right


def test_a_text_batch_holds_no_media(built, samples):
    batch = Collator(built[1])([samples[1]])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_a_typed_placeholder_is_text(built):
    _, processor = built
    texts = "What is <image>?", "<image> is a tag."
    question, answer = ([{"type": "text", "text": text}] for text in texts)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = parse_record({"messages": messages}, "data.json[5]")
    batch = Collator(processor)([sample])
    assert processor.tokenizer.convert_tokens_to_ids("<image>") not in batch["input_ids"]
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]) == answers(sample)


def test_batches_of_a_loader(built, samples):
    sampler = ModalityBatchSampler([sample.modality for sample in samples * 2], 2, steps=9)
    loader = DataLoader(samples * 2, batch_sampler=sampler, collate_fn=Collator(built[1]))
    batches = list(loader)
    assert len(batches) == len(loader) == 9
    assert all(len(batch["input_ids"]) == 2 for batch in batches)


def test_a_batch_trains_the_model(built, samples):
    model, processor = built
    loss = model(**Collator(processor)(samples)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.model.connectors.parameters())
    model.zero_grad()


def test_over_long_samples(built, samples):
    _, processor = built
    sample = samples[1]
    length = len(processor.encode(sample.messages)["input_ids"])
    assert Collator(processor, max_length=length)([sample])["input_ids"].shape[1] == length
    message = rf"^data\.json\[1\]: the sample has {length} tokens, more than max_length 40"
    with pytest.raises(UserError, match=message):
        Collator(processor, max_length=40)([sample])
    cut = Collator(processor, max_length=60, overflow="truncate")([sample])
    whole = Collator(processor)([sample])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, :60])


@pytest.mark.parametrize(("index", "length"), [(1, 10), (0, 20)])
def test_truncation_never_takes_media_or_all_answers(built, samples, index, length):
    with pytest.raises(UserError, match="would remove media or all assistant text"):
        Collator(built[1], max_length=length, overflow="truncate")([samples[index]])


def test_long_samples_may_be_left_out(built, samples, caplog):
    collator = Collator(built[1], max_length=70, overflow="drop")
    batch = collator([*samples, samples[1]])
    lengths = [len(built[1].encode(sample.messages)["input_ids"]) for sample in samples]
    assert max(lengths) > 70 and len(batch["input_ids"]) == sum(length <= 70 for length in lengths)
    (warning,) = caplog.messages  # once a sample
    assert warning.startswith("data.json[1]: the sample has") and "it is dropped (1 so far)" in warning
    for nothing in (*collator.packed(samples[1:2], 100), *collator.bucket_by_length(samples[1:2])):
        assert nothing["labels"].tolist() == [[IGNORED]]  # a step that learns nothing


def test_nothing_to_learn(built):
    prompt = parse_record({"conversations": turns("Hi")}, "data.json[9]", training=False)
    with pytest.raises(UserError, match=r"^data\.json\[9\]: there is no assistant text"):
        Collator(built[1])([prompt])


def test_undecodable_media_name_the_sample(built, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    record = {"image": "a.png", "conversations": turns("<image>", "x")}
    sample = parse_record(record, "data.json[3]", tmp_path)
    with pytest.raises(UserError, match=r"^data\.json\[3\]: cannot decode the image .*a\.png"):
        Collator(built[1])([sample])


def test_parts_of_like_length_hold_every_sample_once_and_little_padding(built, samples):
    _, processor = built
    collator = Collator(processor)
    long = parse_record({"conversations": turns("Say much", "word " * 60)}, "data.json[4]", ".")
    together, parts = [*samples, long, *samples], collator.bucket_by_length([*samples, long, *samples])
    rows = [
        row[mask == 1].tolist()
        for part in parts
        for row, mask in zip(part["input_ids"], part["attention_mask"], strict=False)
    ]
    alone = [collator([sample])["input_ids"][0].tolist() for sample in together]
    assert sorted(rows) == sorted(alone) and len(parts) > 1
    for part in parts:
        assert part["attention_mask"].float().mean() >= 0.7


def test_prompts_of_like_length_share_a_batch_and_each_is_encoded_once(built, samples, monkeypatch):
    _, processor = built
    asked = [sample.split_answer()[0] for sample in samples] * 9  # 36: more than are in memory at a time
    collator, encoded = Collator(processor), []
    encode = collator.processor.encode
    monkeypatch.setattr(collator.processor, "encode", lambda *args: encoded.append(args) or encode(*args))
    batches = list(collator.prompt_batches(asked, 2))
    assert len(encoded) == len(asked)
    assert sorted(index for chosen, _ in batches for index in chosen) == list(range(36))
    for chosen, batch in batches[:4]:
        expected = collator.prompts([asked[index] for index in chosen])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    widths = [batch["input_ids"].shape[1] for _, batch in batches]
    assert widths[:16] == sorted(widths[:16])


def mean_loss(model, parts):
    logits, labels = [], []
    for part in parts:
        inputs = {name: value for name, value in part.items() if name != "labels"}
        logits.append(model(**inputs).logits[:, :-1].flatten(0, 1))
        labels.append(part["labels"][:, 1:].flatten())
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))


@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "top_k": 2, "balance_coef": 0.01, "z_coef": 1e-3}])
def test_packed_rows_have_the_loss_and_gradients_of_the_padded_batch(tmp_path, samples, moe):
    model, processor = tiny_model(tmp_path, moe)
    model.eval()  # batch statistics of the image tower would differ
    collator = Collator(processor)
    lengths = [len(row[1]) for row in collator._encode(samples)]
    results = []
    for parts in ([collator(samples)], collator.packed(samples, sum(lengths) - 1)):
        model.zero_grad()
        with record() as records:
            loss = mean_loss(model, parts)
        (loss + aux_loss(model, join(records))).backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (padded, grads), (packed, packed_grads) = results
    assert len(parts) == 2 and {part["input_ids"].shape[0] for part in parts} == {1}
    assert count_tokens(collator(samples)) == sum(map(count_tokens, parts)) == sum(lengths)
    assert len(grads) == len(packed_grads) > 20
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    for found, expected in zip(packed_grads, grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_packed_sample_does_not_see_its_neighbours(built, samples):
    model, processor = built
    collator = Collator(processor)
    (together,) = collator.packed(samples, 1000)
    assert model(**together).loss.isfinite()
    starts = (together["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(samples) and (together["labels"][0, starts] == IGNORED).all()
    embeds = model.get_input_embeddings()(together["input_ids"]).detach().requires_grad_()
    states = model.model(inputs_embeds=embeds, position_ids=together["position_ids"]).last_hidden_state
    states[0, starts[1] : starts[2]].sum().backward()
    seen = embeds.grad[0].abs().sum(-1).nonzero().flatten()
    assert (seen.min(), seen.max() + 1) == (starts[1], starts[2])


def test_rows_are_filled(built, samples):
    collator = Collator(built[1])
    parts = collator.packed(samples * 8, 256)
    lengths = [part["input_ids"].shape[1] for part in parts]
    assert max(lengths) <= 256 and sum(lengths) > 0.85 * 256 * len(lengths)
    assert sum((part["position_ids"] == 0).sum() for part in parts) == 8 * len(samples)


def test_records_of_films_and_both_kinds_of_sound_become_a_batch(tmp_path):
    pytest.importorskip("av")
    model, processor = tiny_model(tmp_path / "model", video=VIDEO, speech=SPEECH, audio=AUDIO)
    write_video(tmp_path / "a.mp4", [Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(9)], rate=3)
    soundfile.write(tmp_path / "s.wav", np.zeros(8000), 8000)
    columns = {"videos": ["a.mp4"], "speeches": ["s.wav"], "audios": ["s.wav"]}
    record = {**columns, "messages": turns("<video>First? <audio> <speech>", "A fox.")}
    batch = Collator(processor)([parse_record(record, "data.json[0]", tmp_path)])
    assert batch["video_pixels"].shape == (1, 4, 3, 64, 64) and batch["video_frames"].tolist() == [4]
    assert batch["speech_frames"].tolist() == batch["audio_frames"].tolist() == [100]
    learned = batch["labels"][batch["labels"] != IGNORED]
    assert processor.tokenizer.decode(learned) == "A fox.<|im_end|>"
    model(**batch).loss.backward()
    assert model.model.connectors["video"].positions.grad.abs().sum(1).gt(0).tolist() == [True] * 4
    record["videos"] = ["s.wav"]
    with pytest.raises(UserError, match=r"data.json\[1\]: the video .*s.wav holds no frames"):
        Collator(processor)([parse_record(record, "data.json[1]", tmp_path)])

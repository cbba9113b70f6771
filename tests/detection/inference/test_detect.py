"""Boxes, labels that are members of the list, and lists that are longer than a prompt."""

import logging
import math

import pytest
import torch

from unimoe.detection.inference.detect import Detections, PromptChunks, detect, postprocess
from unimoe.detection.model.text_cache import TextFeatureCache


def test_scores_are_means_over_the_tokens_of_a_name():
    logits = torch.full((1, 2, 5), -math.inf)
    logits[0, :, :4] = torch.tensor([[0.0, 2.0, -2.0, 9.0], [0.0, -1.0, -1.0, 9.0]])
    tokens = torch.tensor([[False, True, False, False, False], [False, True, True, False, False]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 0.5, 0.5, 1.0]]])
    (found,) = postprocess(logits, boxes, [tokens], [(200, 100)], top=3)
    s = torch.sigmoid
    wanted = [(s(torch.tensor(2.0)), 0), (torch.tensor(0.5), 1), (s(torch.tensor(-1.0)), 0)]
    assert found.scores_K.tolist() == pytest.approx([float(score) for score, _ in wanted])
    assert found.labels_K.tolist()[:2] == [0, 1]
    torch.testing.assert_close(found.boxes_K4[0], torch.tensor([80.0, 30.0, 120.0, 70.0]))
    torch.testing.assert_close(found.boxes_K4[2], torch.tensor([0.0, 0.0, 50.0, 100.0]))  # inside the picture
    (strict,) = postprocess(logits, boxes, [tokens], [(200, 100)], threshold=0.6)
    assert len(strict.scores_K) == 1
    (all_pairs,) = postprocess(logits, boxes, [tokens], [(200, 100)])
    assert len(all_pairs.scores_K) == 4  # fewer than 300 pairs


def test_chunked_names_keep_their_ids_and_the_backbone_runs_once(
    tiny_detector, tokenizer, caplog, monkeypatch
):
    """1,203 names: every detection of a chunk is what its prompt alone gives."""
    model = tiny_detector().eval()
    words = ["cat", "dog", "tree", "red car", "a cat", "mat"]
    names = [words[i % 6] for i in range(1203)]
    with caplog.at_level(logging.INFO):
        chunks = PromptChunks.of(names, tokenizer, max_names=400)
    assert "1203 names do not fit one prompt of 256 tokens: asking in 12" in caplog.text
    assert sum(chunks.chunks, []) == list(range(1203))

    calls, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *args: calls.append(1) or encode(*args))
    pixels, sizes = torch.randn(2, 3, 64, 64), [(640, 480), (64, 64)]
    cache = TextFeatureCache(model)
    found = detect(model, chunks, pixels, None, sizes, cache, top=5)
    assert len(calls) == 1 and all(len(one.labels_K) == 5 * len(chunks.chunks) for one in found)

    last = chunks.chunks[-1]
    alone = detect(
        model, PromptChunks.of([names[i] for i in last], tokenizer), pixels[1:], None, sizes[1:], cache, top=5
    )
    torch.testing.assert_close(found[1].labels_K[-5:], alone[0].labels_K + last[0])
    torch.testing.assert_close(found[1].boxes_K4[-5:], alone[0].boxes_K4, rtol=1e-3, atol=1e-2)
    assert isinstance(found[0], Detections) and found[0].labels_K.max() < 1203

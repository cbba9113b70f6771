import pytest
import torch

from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.evaluator import DetectionEvaluator, coco_results, detect_batch, score
from unimoe.detection.inference.detect import Detections
from unimoe.detection.model.text_cache import TextFeatureCache


@pytest.fixture
def data(world):
    """Eight images; the ids of their categories are 5, 15, 25 and 35."""
    return read_detection(world / "val.json")


def test_detections_are_written_as_coco_does(data):
    boxes_K4 = torch.tensor([[10.0, 20, 40, 60], [0, 0, 64, 64]])
    found = Detections(boxes_K4, torch.tensor([0.75, 0.5]), torch.tensor([3, 0]))
    assert coco_results(data, data.samples[2], found) == [
        {"image_id": 3, "category_id": 35, "bbox": [10, 20, 30, 40], "score": 0.75},
        {"image_id": 3, "category_id": 5, "bbox": [0, 0, 64, 64], "score": 0.5},
    ]
    assert boxes_K4[0].tolist() == [10, 20, 40, 60], "the detections themselves stay"


def test_an_image_that_comes_twice_counts_once(data, tiny_detector, tokenizer):
    """The last batch of a rank may repeat images, so that all ranks take as many steps."""
    model = tiny_detector(image_size=64).eval()
    evaluator = DetectionEvaluator(model, tokenizer, data, top=3)
    for rows in ([0, 1], [1]):
        for batch in eval_dataloader(data, model, chosen=rows):
            evaluator.update(batch)
    assert evaluator.images == 2 and [row["image_id"] for row in evaluator.results] == [1] * 3 + [2] * 3
    evaluator.update(EvalBatch([], [], None))
    assert evaluator.images == 2


def test_other_names_are_asked_for_under_the_ids_of_the_set(data, tiny_detector, tokenizer):
    model = tiny_detector(image_size=64).eval()
    batches = list(eval_dataloader(data, model, chosen=[0]))
    _, right = score(model, tokenizer, data, batches)
    _, wrong = score(model, tokenizer, data, batches, names=["mat", "red", "a cat", "on"])
    for found in (right, wrong):
        assert {row["category_id"] for row in found} == {5, 15, 25, 35}
    assert {row["score"] for row in right} != {row["score"] for row in wrong}
    prompts = DetectionEvaluator(model, tokenizer, data, names=["mat", "red", "a cat", "on"]).prompts
    (alone,) = detect_batch(model, prompts, batches[0], TextFeatureCache(model))
    assert alone.scores_K.tolist() == [row["score"] for row in wrong]


def test_lvis_is_asked_for_in_forties(data, tiny_detector, tokenizer, monkeypatch):
    monkeypatch.setattr("unimoe.detection.evaluation.evaluator.LVIS_NAMES", 3)
    model = tiny_detector()
    chunks = [
        DetectionEvaluator(model, tokenizer, data, style).prompts.chunks for style in ("coco", "lvis-fixed")
    ]
    assert chunks == [[[0, 1, 2, 3]], [[0, 1, 2], [3]]]

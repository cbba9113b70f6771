import torch

from unimoe.compare.evaluation import evaluate
from unimoe.model.configuration import IGNORED
from unimoe.model.loading import load_model


def test_exact_answers_are_those_of_greedy_decoding(tiny_folder):
    model, processor = load_model(tiny_folder)
    prompts = [processor.tokenizer(text, return_tensors="pt").input_ids for text in ("Name it.", "How many?")]
    rows = [
        model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False) for ids in prompts
    ]
    batches = []
    for ids, row in zip(prompts, rows, strict=True):
        labels = row.clone()
        labels[:, : ids.shape[1]] = IGNORED
        batches.append([{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels}])
    nats, exact = evaluate(model, batches)
    assert nats > 0 and exact == 1.0
    batches[0][0]["labels"][0, -1] = (rows[0][0, -1] + 1) % 50
    assert evaluate(model, batches)[1] == 0.5

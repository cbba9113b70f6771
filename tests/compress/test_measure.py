import math

import pytest
import torch

from unimoe.compress.measure import measure, milliseconds_per_token, reference, resident_bytes
from unimoe.errors import UserError


@torch.no_grad()
def test_the_original_has_no_distance_to_itself(families, ids):
    model = families("mixtral")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :4] = -100
    original = reference(model, {"a": [batch]})
    found = measure(model, original, {"a": [batch]})["a"]
    assert found.kl == 0 and found.agreement == 1 and found.tokens == 10
    log_probs = model(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    expected = -log_probs.gather(-1, ids[:, 4:, None]).mean()
    assert math.isclose(found.nll, float(expected), rel_tol=1e-5)
    model.lm_head.weight.mul_(2)
    changed = measure(model, original, {"a": [batch]})["a"]
    after = model(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    kl = (log_probs.exp() * (log_probs - after)).sum(-1).mean()
    assert math.isclose(changed.kl, float(kl), rel_tol=1e-4) and changed.agreement == 1
    batch["labels"][:] = -100
    with pytest.raises(UserError, match="a: the samples have no answers"):
        reference(model, {"a": [batch]})


def test_bytes_count_shared_weights_once(families):
    model = families("mixtral")
    assert resident_bytes(model) >= sum(weight.numel() for weight in model.parameters()) * 4
    before = resident_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert before - resident_bytes(model) == 64 * 32 * 4
    assert milliseconds_per_token(model, 2) > 0

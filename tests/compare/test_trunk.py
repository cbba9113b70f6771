import pytest
import torch

from unimoe.compare.trunk import Trunk, batches_of, trunk_of
from unimoe.model.host_loss import answer_loss, last_hidden
from unimoe.testing import IMAGE, tiny_model


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path, image=IMAGE)[0]


def sample(length: int) -> dict:
    ids = torch.randint(3, 200, (1, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_model_above_its_trunk_gives_the_same_losses_and_gradients(model):
    samples = [sample(length) for length in (5, 6, 20)]
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    loss, count = answer_loss(model, samples)
    (gradient,) = torch.autograd.grad(loss, weight)
    trunk = Trunk(model, 1)
    upper, upper_count = answer_loss(model, batches_of([trunk.row(one) for one in samples]))
    assert count == upper_count == 28
    torch.testing.assert_close(upper, loss)
    torch.testing.assert_close(torch.autograd.grad(upper, weight)[0], gradient)


def test_the_layers_of_the_trunk_run_once_for_a_sample(model):
    runs = []
    model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    trunk = trunk_of(model, 1)
    assert trunk is not None and len(runs) == 2  # the check: whole, and once through the trunk
    (batch,) = batches_of([trunk.row(sample(7))])
    for _ in range(3):
        answer_loss(model, [batch])
    assert len(runs) == 3


def test_rows_of_similar_length_share_a_batch():
    rows = [
        {"input_ids": torch.arange(n), "labels": torch.arange(n), "inputs_embeds": torch.ones(n, 2)}
        for n in (8, 3, 9, 4)
    ]
    short, long = batches_of(rows)
    assert short["input_ids"].shape == (2, 4) and long["inputs_embeds"].shape == (2, 9, 2)
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert short["labels"][0].tolist() == [0, 1, 2, -100]


def test_there_is_no_trunk_where_it_would_change_the_output(model, monkeypatch):
    assert trunk_of(model, 0) is None
    decoder = model.model.language_model
    before = decoder.forward

    def scaled(inputs_embeds=None, **kwargs):  # as Gemma scales its embeddings
        return before(inputs_embeds=3 * inputs_embeds, **kwargs)

    monkeypatch.setattr(decoder, "forward", scaled)
    batch = sample(6)
    with torch.no_grad():
        expected = last_hidden(model, batch)
        assert trunk_of(model, 1) is None
        assert torch.equal(last_hidden(model, batch), expected)

"""Shifts of router logits on a random Mixtral, and on a random model of ours with an image."""

import pytest
import torch
from PIL import Image

from unimoe.compress.rewire import context_loss, no_other_gradients, train
from unimoe.compress.route import choose
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral, tiny_model

IDS = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [8, 9, 10, 11, 12, 8, 9]])
PROMPT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.fixture(scope="module")
def mixtral():
    return tiny_mixtral()


def test_no_step_changes_no_bit(mixtral):
    layers = view(mixtral)
    with torch.no_grad():
        before = mixtral(**PROMPT).logits
        shifts = train(layers, 2, context_loss(mixtral, PROMPT), 0)
        with shifts.applied():
            assert torch.equal(mixtral(**PROMPT).logits, before)
    assert [tuple(delta.shape) for delta in shifts.delta_LBE] == [(2, 4), (2, 4)]


def test_steps_make_the_context_more_probable_and_leave_the_model_as_it_was(mixtral):
    layers, weights = view(mixtral), {name: one.clone() for name, one in mixtral.state_dict().items()}
    loss = context_loss(mixtral, PROMPT)
    with torch.inference_mode():  # as the server's thread is
        before, logits = loss(), mixtral(**PROMPT).logits
        with no_other_gradients(mixtral):
            shifts = train(layers, 2, loss, 5)
        with shifts.applied():
            assert bool((loss() < before).all())
        assert torch.equal(mixtral(**PROMPT).logits, logits)
    assert all(torch.equal(one, weights[name]) for name, one in mixtral.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in mixtral.parameters())
    assert not any(delta.requires_grad for delta in shifts.delta_LBE)


def test_rows_do_not_act_on_one_another(mixtral):
    layers = view(mixtral)
    both = train(layers, 2, context_loss(mixtral, PROMPT), 3)
    for row, begin in enumerate((2, 0)):
        alone = {"input_ids": IDS[row : row + 1, begin:]}
        one = train(layers, 1, context_loss(mixtral, alone), 3)
        for mine, ours in zip(one.delta_LBE, both.delta_LBE, strict=True):
            assert torch.allclose(mine[0], ours[row], atol=0.02)  # Adam divides small gradients by themselves


def test_only_the_half_of_the_layers_that_is_least_sure_moves(mixtral):
    shifts = train(view(mixtral), 2, context_loss(mixtral, PROMPT), 1)
    moved_LB = torch.stack([delta_BE.any(1) for delta_BE in shifts.delta_LBE])
    surprises = []

    def see(layer, logits_TE):
        best_TK = logits_TE.log_softmax(-1).topk(2, dim=1).values
        surprises.append([-best_TK.view(2, 7, 2)[row, begin:].mean() for row, begin in enumerate((2, 0))])
        return logits_TE

    with torch.no_grad(), choose(view(mixtral), see):
        mixtral(**PROMPT)
    first_B = torch.tensor([one > other for one, other in zip(*surprises, strict=True)])
    assert torch.equal(moved_LB, torch.stack([first_B, ~first_B]))


def test_a_prompt_with_an_image_counts_its_text(tmp_path):
    model, processor = tiny_model(tmp_path, {"num_experts": 4, "top_k": 2})
    model.eval()
    content = [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": "what?"}]
    encoded = processor.encode([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor.pad([encoded], "left")
    loss = context_loss(model, batch)
    with torch.no_grad():
        logits = model(**batch).logits[0].float()
        ids = batch["input_ids"][0]
        text = ids[1:] != model.config.token_ids()["image"]
        wanted = torch.nn.functional.cross_entropy(logits[:-1][text], ids[1:][text])
    assert torch.allclose(loss()[0], wanted, atol=1e-5)
    assert text.sum() == len(ids) - 1 - 4  # an image is four tokens

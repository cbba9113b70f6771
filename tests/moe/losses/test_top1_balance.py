import torch

from unimoe.moe import Context, LayerRecord, Routing, load_balance, top1_balance


def record(logits: torch.Tensor) -> LayerRecord:
    index, E = logits.topk(1).indices, logits.shape[1]
    routing = Routing.from_topk(index, torch.ones_like(index).float(), logits, logits.softmax(-1), E)
    return LayerRecord(0, routing, Context())


def test_exact_values_of_three_cases():
    """A sure and balanced choice, equal probabilities, collapse."""
    balanced, equal, collapsed = 80 * torch.eye(4).repeat(4, 1), torch.zeros(16, 4), torch.zeros(16, 4)
    collapsed[:, 2] = 80
    found = top1_balance([record(one) for one in (balanced, equal, collapsed)], {})
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 4.0]))


def test_equal_probabilities_with_one_winner_do_not_look_balanced():
    logits = torch.zeros(64, 16)
    logits[:, 3] = 0.01
    one = record(logits)
    assert load_balance([one]) < 1.02 and top1_balance([one], {}) > 15.7


def test_a_low_temperature_is_the_hard_choice():
    logits = torch.zeros(64, 16)
    logits[torch.arange(64), torch.arange(64) % 16] = 0.1
    assert top1_balance([record(logits)], {}, temperature=1e-3) < 1.001


def test_two_ranks_have_the_loss_of_one(same_on_two_ranks):
    same_on_two_ranks(top1_balance, temperature=0.5)

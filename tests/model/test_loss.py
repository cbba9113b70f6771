import torch
from torch.nn import functional as nnf

from unimoe.model.configuration import IGNORED
from unimoe.model.host_loss import answer_loss
from unimoe.model.loss import cross_entropy_sum, supervised
from unimoe.testing import tiny_model


def test_each_label_is_predicted_from_the_position_before_it():
    states_BTX = torch.arange(6.0).reshape(1, 6, 1)
    labels_BT = torch.tensor([[7, IGNORED, 3, IGNORED, 5, 4]])  # nothing is in front of the first
    states_SX, labels_S = supervised(states_BTX, labels_BT)
    assert states_SX.flatten().tolist() == [1, 3, 4] and labels_S.tolist() == [3, 5, 4]


def test_training_and_forward_have_one_loss(tmp_path):
    model, _ = tiny_model(tmp_path)
    ids_BT = torch.randint(10, 200, (2, 12))
    labels_BT = ids_BT.masked_fill(torch.rand(2, 12) < 0.5, IGNORED)
    with torch.no_grad():
        output = model(input_ids=ids_BT, labels=labels_BT)
        loss, count = answer_loss(model, [{"input_ids": ids_BT, "labels": labels_BT}])
    assert count == int((labels_BT[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=0)
    shifted = nnf.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    torch.testing.assert_close(loss, shifted, rtol=1e-6, atol=0)


def test_the_sum_is_computed_in_float32():
    logits_SV = torch.randn(100, 50, dtype=torch.bfloat16)
    labels_S = torch.randint(0, 50, (100,))
    wanted = nnf.cross_entropy(logits_SV.float(), labels_S, reduction="sum")
    assert torch.equal(cross_entropy_sum(logits_SV, labels_S), wanted)

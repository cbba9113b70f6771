import torch

from unimoe.moe import Routing
from unimoe.moe.slots import of_slots, slots


def test_slots_of_a_ragged_routing_and_back():
    chosen_TE = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    weight_TE = torch.tensor([[0.25, 0, 0.75], [0, 1.0, 0], [0, 0, 0]])
    routing = Routing.from_mask(chosen_TE, weight_TE, weight_TE, weight_TE)
    index_TK, weight_TK = slots(routing)
    assert index_TK.tolist() == [[0, 2], [1, 3], [3, 3]]  # 3: an empty slot
    assert weight_TK.tolist() == [[0.25, 0.75], [1, 0], [0, 0]]
    again = of_slots(routing, index_TK, weight_TK)
    assert torch.equal(again.dense(), weight_TE) and torch.equal(again.chosen(), chosen_TE)

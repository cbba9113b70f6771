import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, ModalityRouter, TopK

D = 16


def test_exact_each_modality_has_a_router_of_its_own():
    router = ModalityRouter(D, 4, 2, init_std=1.0).double()
    x, modality = torch.randn(10, D, dtype=torch.float64), torch.arange(10) % 5
    found = router(x, Context(modality_T=modality)).dense()
    for kind in range(5):
        own = TopK(D, 4, 2).double()
        own.weight.data = router.weight.data[4 * kind : 4 * kind + 4]
        expected = own(x[modality == kind], Context()).dense()
        torch.testing.assert_close(found[modality == kind], expected, rtol=0, atol=1e-9)


def test_an_unknown_modality_is_text():
    router, x = ModalityRouter(D, 4, 2, init_std=1.0), torch.randn(6, D)
    text = router(x, Context(modality_T=torch.zeros(6, dtype=torch.int64)))
    assert torch.equal(router(x, Context()).logits_TE, text.logits_TE)


def test_logits_as_weights_are_not_divided_by_their_sum():
    with pytest.raises(UserError, match="renormalize is true, expected false with score: logits"):
        ModalityRouter(D, 4, 2, score="logits")
    router = ModalityRouter(D, 4, 4, score="logits", renormalize=False, init_std=1.0)
    routing = router(torch.randn(6, D), Context())
    torch.testing.assert_close(routing.dense(), routing.logits_TE)
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(6))

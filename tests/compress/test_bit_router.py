import torch

from unimoe.compress.bit_router import BitRouter, bit_loss, capped, mixture


def test_probabilities_of_each_experts_own_map():
    router = BitRouter(3, 8, [2, 3, 4])
    torch.nn.init.normal_(router.weight)
    x, expert = torch.randn(10, 8), torch.randint(0, 3, (10,))
    p = router(x, expert)
    torch.testing.assert_close(p.sum(1), torch.ones(10))
    for row in range(10):
        logits = router.weight[expert[row]] @ x[row] + router.bias[expert[row]]
        torch.testing.assert_close(p[row], logits.softmax(0))


def test_an_untrained_router_takes_the_most_bits():
    assert (
        BitRouter(2, 4, [2, 4])(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)).argmax(1) == 1
    ).all()


def test_capacity_is_kept_and_what_overflows_has_no_place():
    p = torch.randn(100, 3).softmax(1)
    choice = capped(p, [0.3, 0.4, 0.1])
    assert ((choice == p.argmax(1)) | (choice == -1)).all()
    counts = [(choice == one).sum().item() for one in range(3)]
    assert counts[0] <= 30 and counts[1] <= 40 and counts[2] == 10


def test_a_price_lowers_the_bits_where_they_do_not_matter():
    """Expert 0 needs its bits, expert 1 gives the same at both numbers."""
    router = BitRouter(2, 4, [2, 4])
    x, expert = torch.randn(64, 4), torch.arange(64) % 2
    full = torch.randn(64, 6)
    coarse = torch.where((expert == 0)[:, None], torch.randn(64, 6), full)
    optimizer = torch.optim.Adam(router.parameters(), 0.2)
    for _ in range(60):
        p = router(x, expert)
        loss = bit_loss(mixture(torch.stack([coarse, full]), p), full, [p], router.bits, alpha=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    high = router(x, expert)[:, 1]
    assert high[expert == 0].mean() > 0.8 and high[expert == 1].mean() < 0.2

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import Context, ExpertsChoose, MoEConfig, RouterDescription, install_moe

SAMPLE = torch.tensor([7] * 8 + [3] * 4)
"""Two samples of 8 and 4 tokens."""


def test_each_expert_takes_its_best_tokens_of_each_sample():
    router, x = ExpertsChoose(8, 4, 2, init_std=1.0), torch.randn(12, 8)
    routing = router(x, Context(sample_T=SAMPLE))
    for sample, taken in ((7, 4), (3, 2)):  # k n / E
        rows = sample == SAMPLE
        for expert in range(4):
            best = routing.probs_TE[rows, expert].topk(taken).indices.sort().values
            assert torch.equal(routing.chosen()[rows, expert].nonzero()[:, 0], best)
    torch.testing.assert_close(routing.dense(), routing.probs_TE * routing.chosen())


def test_padding_is_neither_taken_nor_counted():
    router, x = ExpertsChoose(8, 4, 2, init_std=1.0), torch.randn(12, 8)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[0, 5, 8, 9, 10, 11]] = True  # the second sample is padding alone
    routing = router(x, Context(sample_T=SAMPLE, pad_T=pad))
    without = router(x[~pad], Context())
    assert not routing.chosen()[pad].any()
    assert torch.equal(routing.chosen()[~pad], without.chosen())


def test_exact_all_experts_for_all_tokens_is_the_dense_mixture():
    router, x = ExpertsChoose(8, 4, 4, init_std=1.0), torch.randn(12, 8)
    routing = router(x, Context(sample_T=SAMPLE))
    assert routing.chosen().all() and torch.equal(routing.dense(), routing.probs_TE)


def test_earlier_choices_depend_on_later_tokens_so_causal_models_refuse():
    router, x = ExpertsChoose(8, 4, 1, init_std=1.0), torch.randn(12, 8)
    whole = router(x, Context()).chosen()[:6]
    x[6:] += 5 * torch.randn(6, 8)
    assert not torch.equal(router(x, Context()).chosen()[:6], whole)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    with pytest.raises(UserError, match="experts_choose lets later tokens decide .* a causal LM must not"):
        install_moe(model, MoEConfig(router={"kind": "experts_choose"}))


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="k is 5, expected 1..4"):
        ExpertsChoose(8, 4, 5)


def test_it_describes_itself():
    assert ExpertsChoose(8, 4, 2).describe() == RouterDescription(4, 2, fixed=False)

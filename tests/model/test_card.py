from unimoe.model.card import model_card
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.testing_hosts import FAMILIES


def test_the_card_names_what_the_model_is():
    host, _ = FAMILIES["qwen2_audio"][0]()
    moe = MoEConfig.for_upcycling({"experts": {"copies": 3}, "router": {"k": 2}})
    upcycle_model(host, moe)
    card = model_card(host, "owner/base", moe)
    assert "base_model: owner/base" in card and "import unimoe" in card and "| 1 of 2: 0 |" in card

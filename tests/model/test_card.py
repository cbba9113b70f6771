from unimoe.model.card import model_card, upcycled_from
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.testing_hosts import FAMILIES


def test_the_card_names_what_the_model_is(tmp_path):
    host, _ = FAMILIES["qwen2_audio"][0]()
    moe = MoEConfig.for_upcycling({"experts": {"copies": 3}, "router": {"k": 2}})
    upcycle_model(host, moe)
    card = model_card(host, "owner/base", moe)
    assert "base_model: owner/base" in card and "import unimoe" in card and "| 1 of 2: 0 |" in card
    (tmp_path / "README.md").write_text(card)
    assert upcycled_from(tmp_path) == "owner/base" and upcycled_from("runs/none") == "runs/none"
    later = model_card(host, "owner/base", moe, trained="stage moe, 3 steps")
    assert "from owner/base. Trained by `unimoe fit`: stage moe, 3 steps. It takes text, audio." in later
    local = model_card(host, str(tmp_path), moe)
    assert "base_model" not in local and f"from {tmp_path.name}. It takes" in local

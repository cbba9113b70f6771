"""Tiny random models of eleven multimodal families as hosts of MoE layers."""

import copy
import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5Model

from unimoe.errors import UserError
from unimoe.model.configuration import MODALITIES
from unimoe.model.host import find_decoder, install_host, token_ids
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig, record
from unimoe.moe.install import moe_layers
from unimoe.testing import run_together
from unimoe.testing_hosts import FAMILIES, inputs, question

COPIES = {"experts": {"copies": 3}, "router": {"k": 2}}
SLICES = {
    "experts": {"copies": 2, "slices": 2},
    "router": {"k": 2},
    "combine": "k_weight",
    "placement": "all",
}


def hosted(name, moe=None):
    dense, processor = FAMILIES[name][0]()
    host = copy.deepcopy(dense)
    torch.manual_seed(1)
    upcycle_model(host, MoEConfig.for_upcycling(moe or COPIES))
    return dense, host, processor


def asked(name):
    """Text, one item of each modality, and two of the first."""
    kinds = FAMILIES[name][1]
    text = [()] if name != "paligemma" else []  # its processor insists on an image
    return [*text, *((kind,) for kind in kinds), (kinds[0], kinds[0])]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_starts_as_the_dense_model_and_knows_its_tokens(name):
    dense, host, processor = hosted(name)
    assert len(moe_layers(host)) == 1
    for kinds in asked(name):
        batch = inputs(processor, question(*kinds))
        with record() as records:
            found = host(**batch).logits
        torch.testing.assert_close(found, dense(**batch).logits, rtol=0, atol=1e-5)
        seen = records[0].ctx.modality_T
        assert seen is not None and len(seen) == batch["input_ids"].numel()
        counts = dict(zip(MODALITIES, seen.bincount(minlength=5).tolist(), strict=True))
        for kind in set(kinds):
            expected = "image" if name in ("internvl", "glm4v") else kind  # they show videos as images
            assert counts[expected] == int((batch["input_ids"] == token_ids(host.config)[expected]).sum()) > 0


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_batch_and_beams_equal_single_answers(name):
    _, host, processor = hosted(name)
    kind = FAMILIES[name][1][0]
    short, long = question(kind), question(kind, kind)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    alone = [host.generate(**inputs(processor, one), **settings)[0, -3:] for one in (short, long)]
    batch = inputs(processor, short, long)
    with record() as records:
        together = host.generate(**batch, **settings)
    assert torch.equal(together[:, -3:], torch.stack(alone))
    pad_T = records[0].ctx.pad_T
    padding = int((batch["attention_mask"] == 0).sum())
    assert padding == (0 if pad_T is None else int(pad_T.sum()))
    assert (padding == 0) == (name == "llava_onevision")  # several images get fewer tokens each
    one, both = (
        host.generate(**some, **settings, num_beams=2)[:, -3:] for some in (inputs(processor, short), batch)
    )
    assert torch.equal(one[0], both[0])


LOAD = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
answers = {}
for name, folder in json.loads(sys.argv[1]).items():
    auto = AutoModelForImageTextToText if name == "llava" else AutoModelForMultimodalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = torch.load(f"{folder}/batch.pt")
    answers[name] = model.generate(**batch, max_new_tokens=4, do_sample=False).tolist()
    model.half().float().save_pretrained(f"{folder}/again")
    assert json.load(open(f"{folder}/again/config.json"))["quantization_config"]["moe"]
print(json.dumps(answers))
"""


@torch.no_grad()
def test_a_new_process_loads_them_and_gives_the_same_answers(tmp_path):
    expected, folders = {}, {}
    for name in FAMILIES:
        _, host, processor = hosted(name, SLICES)
        folder = folders[name] = str(tmp_path / name)
        host.save_pretrained(folder)
        batch = inputs(processor, question(FAMILIES[name][1][0]))
        torch.save(batch, f"{folder}/batch.pt")
        expected[name] = host.generate(**batch, max_new_tokens=4, do_sample=False).tolist()
    (said,) = run_together(1, LOAD, json.dumps(folders))
    assert json.loads(said.splitlines()[-1]) == expected


def test_models_that_are_no_hosts_are_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=8))
    with pytest.raises(UserError, match="a mixture of experts already; only dense models can be upcycled"):
        install_host(mixtral, MoEConfig())
    t5 = T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8))
    with pytest.raises(UserError, match="T5Model has no decoder that stands alone"):
        find_decoder(t5)
    _, host, _ = hosted("llava")
    with pytest.raises(UserError, match="a mixture of experts already"):
        install_host(host, MoEConfig())

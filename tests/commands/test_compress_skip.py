"""``unimoe compress skip`` and ``tune`` on a tiny model of images and speech."""

import re

import pytest
import torch

from unimoe.commands import main as cli
from unimoe.compress.bit_router import Reading, reading
from unimoe.compress.plan import Plan
from unimoe.compress.rows import rewritten, unchanged
from unimoe.compress.skip import Thresholds
from unimoe.compress.skip_rules import own_rule
from unimoe.compress.store import compress as structured
from unimoe.model.loading import load_model
from unimoe.moe.view import view

IDS = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 3]])


@pytest.fixture
def compress(mixture, tmp_path):
    def run(verb, *flags):
        data = [str(mixture / "image.jsonl"), str(mixture / "speech.jsonl")]
        output = ["--output", str(tmp_path / "out")]
        return cli.main(["compress", verb, str(mixture / "moe"), *data, *output, *map(str, flags)])

    return run


def test_text_and_media_have_thresholds_and_the_folder_skips_by_them(compress, mixture, tmp_path, capsys):
    held_out = str(mixture / "image.jsonl")
    assert compress("skip", "--ratio", 0.3, "--size", 5, "--held-out", held_out) == 0
    out = capsys.readouterr().out
    loaded, _ = load_model(tmp_path / "out", device="cpu")
    rule = own_rule(view(loaded))
    assert set(rule.tau) == {"text", "image", "speech"} and rule.tau["image"] == rule.tau["speech"]
    assert Plan.from_yaml(tmp_path / "out" / "plan.yaml").skip == rule.to_plan()
    shares = dict(re.findall(r"(text|image|speech) (\d\.\d+)", out.splitlines()[1]))
    assert set(shares) == {"text", "image", "speech"} and "held out" in out
    assert float(re.search(r"([\d.]+) of all expert calls", out)[1]) >= 0.25
    original, _ = load_model(mixture / "moe", device="cpu")
    with torch.no_grad():
        with rewritten(view(loaded), unchanged):
            assert torch.equal(loaded(input_ids=IDS).logits, original(input_ids=IDS).logits)
        skipped = loaded(input_ids=IDS).logits
        assert not torch.equal(skipped, original(input_ids=IDS).logits)


@pytest.mark.parametrize("how", ["one", "odp"])
def test_the_control_and_the_ratio_rule(how, compress, tmp_path, capsys):
    assert compress("skip", "--ratio", 0.2, "--how", how, "--size", 4, "--samples", 2) == 0
    plan = Plan.from_yaml(tmp_path / "out" / "plan.yaml").skip
    assert len(plan["mu"]) == 2 if how == "odp" else len(set(plan["tau"].values())) == 1
    assert "of all expert calls skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ratio", 1.5], "--ratio is 1.5, expected a share of the expert calls"),
        (["--size", 1], "--size is 1"),
        (["--samples", 0], "0 calibration tokens"),
        (["--how", "one", "--power", 1.0], "--power has no effect beside --how one; it is for --how modes"),
        (["--blocks", 2], "--blocks has no effect beside --how modes; it is for --how odp"),
        (["--how", "odp", "--ratio", 0.9], "cannot skip behind their first experts"),
    ],
)
def test_what_cannot_be_skipped_writes_nothing(flags, says, compress, tmp_path, capsys):
    assert compress("skip", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("what", "flag", "value", "other"),
    [
        ("heads", "--experts", 1, "vectors"),
        ("vectors", "--penalty", 0.0, "heads or bits"),
        ("vectors", "--width", 8, "heads"),
        ("bits", "--width", 8, "heads"),
        ("heads", "--levels", 2, "bits"),
    ],
)
def test_flags_of_what_is_not_trained_are_refused(what, flag, value, other, compress, tmp_path, capsys):
    assert compress("tune", "--what", what, flag, value) == 2
    says = f"{flag} has no effect beside --what {what}; it is for --what {other}"
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_heads_are_trained_saved_and_loaded(compress, mixture, tmp_path, capsys):
    flags = ["--what", "heads", "--steps", 12, "--lr", 0.05, "--penalty", 20, "--width", 8]
    assert compress("tune", *flags, "--held-out", mixture / "image.jsonl") == 0
    data, held_out = capsys.readouterr().out.split("held out")
    assert all(float(re.search(r"([\d.]+) of all expert calls", one)[1]) > 0 for one in (data, held_out))
    assert "image " in held_out and "speech  " not in held_out
    loaded, _ = load_model(tmp_path / "out", device="cpu")
    heads = [layer.block.keep_head for layer in view(loaded)]
    assert all(bool(head.down.weight.any()) for head in heads) and own_rule(view(loaded)).width == 8


def test_vectors_are_trained_saved_and_loaded(compress, mixture, tmp_path, capsys):
    flags = ["--what", "vectors", "--steps", 8, "--lr", 0.05, "--held-out", mixture / "image.jsonl"]
    assert compress("tune", *flags) == 0
    shown = r"KL ([\d.]+) cut short, ([\d.]+) tuned"
    found, held_out = (re.findall(shown, one) for one in capsys.readouterr().out.split("held out"))
    assert held_out == found[:1]  # the same file
    before, after = map(sum, zip(*((float(one), float(two)) for one, two in found), strict=True))
    assert len(found) == 2 and after < before
    loaded, _ = load_model(tmp_path / "out", device="cpu")
    assert all(bool((layer.block.theta != 1).any()) for layer in view(loaded))
    assert "forward" in vars(view(loaded)[0].experts)


def test_as_many_experts_as_there_are_leave_nothing_to_tune(compress, tmp_path, capsys):
    assert compress("tune", "--what", "vectors", "--experts", 2) == 2
    assert "expected 1 to 1" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_routers_of_bits_are_trained_saved_and_read(compress, mixture, tmp_path, capsys):
    packed = ["--bits", 4, "--how", "rtn", "--group", 16, "--samples", 1]
    assert compress("quantize", *packed) == 0
    small = (tmp_path / "out").rename(tmp_path / "small")
    data, out = str(mixture / "image.jsonl"), str(tmp_path / "out")
    flags = ["--what", "bits", "--levels", "2", "--steps", "10", "--lr", "0.1", "--penalty", "5"]
    assert cli.main(["compress", "tune", str(small), data, *flags, "--output", out]) == 0
    mean, kl = re.search(
        r"([\d.]+) bits of an expert's weight read[^K]*KL ([\d.]+)", capsys.readouterr().out
    ).groups()
    assert 2 <= float(mean) < 4 and float(kl) > 0
    plan = Plan.from_yaml(tmp_path / "out" / "plan.yaml")
    assert plan.nested == [2, 4] and plan.bits == [[4] * 4] * 2
    loaded, _ = load_model(out, device="cpu")
    with torch.no_grad(), reading(Reading()) as read:
        loaded(input_ids=IDS)
    assert read.pairs_B[0] > 0


def test_bits_are_compared_with_the_model_that_skips_as_before(mixture, tmp_path, capsys):
    loaded, processor = load_model(mixture / "moe", device="cpu")
    structured(loaded, Plan(bits=4, group=16, skip=Thresholds({"text": 0.5, "image": 0.5}).to_plan()))
    loaded.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    data, output = str(mixture / "image.jsonl"), ["--output", str(tmp_path / "out")]
    flags = ["--what", "bits", "--steps", "1", "--lr", "0", "--samples", "1", *output]
    assert cli.main(["compress", "tune", str(tmp_path / "small"), data, *flags]) == 0
    assert "4.00 bits of" in (out := capsys.readouterr().out) and "KL 0.0000" in out

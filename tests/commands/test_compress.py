"""``unimoe compress`` on a tiny model."""

import json

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from unimoe.commands import main as cli
from unimoe.commands.compress import interleave, read_batches
from unimoe.compress.plan import Plan
from unimoe.model.loading import load_model
from unimoe.moe.view import view
from unimoe.testing import tiny_model


@pytest.fixture(scope="module")
def model(mixture):
    return str(mixture / "moe")


@pytest.fixture(scope="module")
def data(mixture):
    return [str(mixture / "image.jsonl"), str(mixture / "speech.jsonl")]


@pytest.fixture(scope="module")
def stats(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("stats") / "s"
    assert cli.main(["compress", "stats", model, *data, "--output", str(output)]) == 0
    return str(output)


def test_stats_name_what_they_saw(stats, model, data, tmp_path, capsys):
    assert (
        cli.main(
            ["compress", "stats", model, data[0], "--output", str(tmp_path / "t"), "--min-tokens", "999"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "tokens of each expert, by MoE layer" in text
        and "8 experts saw fewer than 999 tokens: layer 0" in text
    )
    about = json.loads((tmp_path / "t" / "stats.json").read_text())
    assert about["data"] == data[:1] and about["tokens"] > 40


@pytest.mark.parametrize("how", ["easy_ep", "random"])
def test_a_pruned_folder_is_a_model(how, model, stats, tmp_path):
    output = tmp_path / "p"
    args = [
        "compress",
        "prune",
        model,
        "--stats",
        stats,
        "--how",
        how,
        "--keep",
        "3",
        "--output",
        str(output),
    ]
    assert cli.main(args) == 0
    loaded, _ = load_model(output)
    assert [layer.num_experts for layer in view(loaded)] == [3, 3]
    plan = Plan.from_yaml(output / "plan.yaml")
    assert plan.made_of and all(len(kept) == 3 for kept in plan.keep)
    record = json.loads((output / "stage.json").read_text())
    assert record["stage"] == "compress prune" and record["parents"][0]["sha256"] == plan.made_of


def test_a_global_budget_and_its_plan_again(model, stats, data, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    args = ["compress", "prune", model, "--budget", "0.625", "--globally", "--stats", stats]
    assert cli.main([*args, "--output", str(first)]) == 0
    loaded = AutoModelForMultimodalLM.from_pretrained(first)
    counts = [layer.num_experts for layer in view(loaded)]
    assert sorted(counts) == [2, 3]
    assert Plan.from_yaml(first / "plan.yaml").to_dict() == loaded.config.quantization_config.plan
    assert cli.main(["inspect", str(first), data[0]]) == 0
    assert f"experts by layer  {counts[0]}, {counts[1]}" in capsys.readouterr().out
    assert cli.main(["chat", str(first), "-p", "what is this?"]) == 0
    args = ["compress", "prune", model, "--plan", str(first / "plan.yaml"), "--output", str(again)]
    assert cli.main(args) == 0
    other = AutoModelForMultimodalLM.from_pretrained(again).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in loaded.state_dict().items())
    assert json.loads((again / "stage.json").read_text())["settings"]["plan"] == str(first / "plan.yaml")
    back = [
        "compress",
        "prune",
        str(first),
        "--plan",
        str(first / "plan.yaml"),
        "--output",
        str(tmp_path / "no"),
    ]
    assert cli.main(back) == 2 and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --keep"),
        (["--keep", "5"], "expected 1..4"),
        (["--budget", "1.5"], "expected a share of the experts"),
        (["--budget", "0.1"], "0 experts are to be kept"),
        (["--budget", "0.3", "--globally"], "2 experts are to be kept in all, expected 4..8"),
        (["--plan", "nowhere.yaml"], "--stats has no effect beside --plan"),
    ],
)
def test_bad_input_writes_nothing(flags, message, model, stats, tmp_path, capsys):
    output = tmp_path / "p"
    assert cli.main(["compress", "prune", model, "--stats", stats, *flags, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (None, [], "cannot be read"),
        ("merge: [[0, 0, 1, 1], [0, 0, 1, 1]]", [], "has merge, expected keep:"),
        ("keep: [[0], [1]]\nbits: 4", [], "has bits, expected keep:"),
        ("keep: [[0], [1]]\nskip: {rule: heads, width: 4}", [], "has skip: rule: heads, expected keep:"),
        ("group: 64", [], "has no keep, expected keep:"),
        ("keep: [[0], [1]]", ["--keep", "2"], "--keep has no effect beside --plan"),
        ("keep: [[0], [1]]", ["--how", "reap"], "--how has no effect beside --plan"),
    ],
)
def test_plans_that_prune_cannot_carry_out(text, flags, message, model, tmp_path, capsys):
    plan, output = tmp_path / "plan.yaml", tmp_path / "p"
    if text is not None:
        plan.write_text(text)
    args = ["compress", "prune", model, "--plan", str(plan), *flags, "--output", str(output)]
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_files_of_one_name_stay_apart_and_take_turns(model, data, tmp_path):
    (tmp_path / "a").mkdir()
    other = tmp_path / "a" / "image.jsonl"
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "what"},
                                              {"role": "assistant", "content": "this"}]}))  # fmt: skip
    _, processor = load_model(model)
    found = read_batches(processor, [*data, str(other)], 4, 2)
    assert {name: len(of) for name, of in found.items()} == {data[0]: 2, "speech": 2, str(other): 1}
    first, second = found[data[0]]
    turns = interleave(found)
    assert len(turns) == 5 and turns[0] is first and turns[2] is found[str(other)][0] and turns[3] is second


def test_experts_that_are_not_stacked_have_statistics(data, tmp_path):
    experts = {"copies": 4, "kind": "latent", "size": 8}
    moe = {"experts": experts, "router": {"k": 2}, "placement": "all"}
    built, processor = tiny_model(tmp_path, moe)
    built.save_pretrained(tmp_path / "moe")
    processor.save_pretrained(tmp_path / "moe")
    args = ["compress", "stats", str(tmp_path / "moe"), data[0], "--output", str(tmp_path / "s")]
    assert cli.main(args) == 0


def test_statistics_of_another_model_and_no_samples(model, stats, data, tmp_path, capsys):
    other = tmp_path / "p"
    assert (
        cli.main(["compress", "prune", model, "--stats", stats, "--keep", "2", "--output", str(other)]) == 0
    )
    args = ["compress", "prune", str(other), "--stats", stats, "--keep", "1", "--output", str(tmp_path / "q")]
    assert cli.main(args) == 2 and "is of another model" in capsys.readouterr().err
    args = ["compress", "stats", model, data[0], "--samples", "0", "--output", str(tmp_path / "s")]
    assert cli.main(args) == 2 and "--samples is 0" in capsys.readouterr().err
    assert not (tmp_path / "q").exists() and not (tmp_path / "s").exists()


@pytest.mark.parametrize("how", ["sub_moe", "stun"])
def test_merged_models_and_their_report(how, model, data, tmp_path, capsys):
    merged, page = tmp_path / "merged", tmp_path / "report"
    flags = ["--sparsity", "0.5", "--coselection", "0.5"] if how == "stun" else ["--tokens", "40"]
    args = ["compress", "merge", model, *data, "--keep", "3", "--how", how, "--output", str(merged), *flags]
    assert cli.main(args) == 0
    loaded, _ = load_model(merged)
    layers = view(loaded)
    assert sum(layer.num_experts for layer in layers) == 6
    plan = Plan.from_yaml(merged / "plan.yaml")
    assert (plan.merge is None) == (how == "stun") == (plan.keep is not None)
    if how == "stun":
        zeros = [float((layer.stacks()["down_proj"] == 0).float().mean()) for layer in layers]
        assert all(abs(share - (1 - 0.5 / 0.75)) < 0.02 for share in zeros)
    args = ["compress", "report", model, str(merged), "--data", *data, "--output", str(page), "--steps", "2"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "worst KL" in text or "none of the models" in text
    found = json.loads((page / "report.json").read_text())["models"]
    assert [one["experts"] for one in found] == [[4, 4], [layer.num_experts for layer in layers]]
    assert found[0]["quality"]["image"]["kl"] == 0 < found[1]["quality"]["image"]["kl"]
    assert found[1]["bytes"] < found[0]["bytes"] and found[0]["quality"].keys() == {"image", "speech"}
    assert cli.main(args) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "5"], "--keep is 5, expected 1..4"),
        (["--keep", "2", "--window", "3"], "--window is 3"),
        (["--keep", "3", "--how", "stun", "--sparsity", "0.1"], "cannot follow one of 0.25"),
    ],
)
def test_bad_merges_write_nothing(flags, message, model, data, tmp_path, capsys):
    output = tmp_path / "m"
    assert cli.main(["compress", "merge", model, *data, *flags, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err and not output.exists()

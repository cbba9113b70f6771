import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from unimoe.commands.main import main
from unimoe.model.loading import load_model
from unimoe.stages.select_experts import Score, diverse, leading


def test_guessers_are_left_out_by_perplexity_and_duplicates_by_diversity():
    """3 solvers of which one is there twice more, 3 guessers of the majority's answer, 4 unrelated."""
    kinds = ["solver"] * 3 + ["duplicate"] * 2 + ["guesser"] * 3 + ["unrelated"] * 4
    facts = {"solver": (0.8, 2.0), "duplicate": (0.8, 2.0), "guesser": (0.9, 30.0), "unrelated": (0.1, 9.0)}
    scores = [Score(str(i), *facts[kind]) for i, kind in enumerate(kinds)]
    by_accuracy = sorted(range(12), key=lambda one: -scores[one].accuracy)[:3]
    assert {kinds[one] for one in by_accuracy} == {"guesser"}, "accuracy alone is fooled"
    kept = leading(scores, 5)
    assert sorted(kept) == [0, 1, 2, 3, 4]

    def alike(one: int, other: int) -> float:
        same = {0, 3, 4}  # the duplicates are those of solver 0
        return 8.0 if {one, other} <= same else 0.5

    similar = [[alike(one, other) for other in kept] for one in kept]
    chosen = {kept[place] for place in diverse(5, similar, 3)}
    assert {1, 2} < chosen and len(chosen & {0, 3, 4}) == 1


@pytest.fixture
def bank(aligned, tmp_path):
    """Three adapters of the aligned model's LLM."""
    for seed in range(3):
        model = load_model(aligned)[0]
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(str(tmp_path / "bank" / str(seed)))
    return tmp_path / "bank"


def test_the_command_writes_what_it_chose(aligned, bank, tmp_path, capsys):
    shots = tmp_path / "shots.jsonl"

    def line(text: str) -> str:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return json.dumps({"messages": turns})

    shots.write_text("\n".join(map(line, ["one two", "three"])))
    flags = ["--count", "2", "--candidates", "3", "--max-new-tokens", "2"]
    out = tmp_path / "out.json"
    command = ["select", "experts", str(aligned), str(shots), "--bank", str(bank)]
    assert main([*command, "--output", str(out), *flags]) == 0
    found = json.loads(out.read_text())
    assert len(found["chosen"]) == 2 and len(found["scores"]) == 3
    assert all(score["perplexity"] > 1 and 0 <= score["accuracy"] <= 1 for score in found["scores"])
    assert main([*command, "--count", "4"]) == 2
    assert "--bank holds 3 adapters, expected at least 4" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

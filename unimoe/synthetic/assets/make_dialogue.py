"""Makes ``dialogue.jsonl`` in this folder: the base model's own answers to everyday questions. Run once; the
result ships.

Training on what the model would have said anyway (self-distillation) keeps its plain English while it learns
to see and hear. Needs the prepared language model; run ``python -m unimoe.synthetic.assets.make_dialogue``.
Greedy decoding with a light repetition penalty; an answer is cut after its last whole sentence within 64
tokens, and dropped if there is none.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unimoe.prepare.cache import default_part

LONGEST = 64


def main() -> None:
    folder = Path(__file__).parent
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").split("\n")
    prompts = [prompt for prompt in prompts if prompt]
    tokenizer = AutoTokenizer.from_pretrained(default_part("llm"), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(default_part("llm"), dtype=torch.float32)
    lines = []
    for start in range(0, len(prompts), 20):
        batch = prompts[start : start + 20]
        texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, repetition_penalty=1.1)
        for prompt, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :], strict=True):
            reply = tokenizer.decode(ids, skip_special_tokens=True).strip()
            whole = re.match(r"(?s).*[.!?](?=\s|$)", reply)
            # "1." ends no sentence: an answer cut inside a list is cut before the unfinished item
            reply = re.sub(r"\s*\n?\s*\d+\.$", "", whole[0]).strip() if whole else ""
            if len(reply) > 8:
                lines.append(json.dumps({"turns": [[prompt, reply]]}))
        print(f"{start + len(batch)} of {len(prompts)}", flush=True)
    (folder / "dialogue.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tiny random models for tests: every part of the real ones, nothing to download, milliseconds to run."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unimoe.model.build import Built, build_model
from unimoe.model.chat_template import CHATML
from unimoe.training.curve import read_curve

IMAGE = {
    "encoder": {"type": "timm", "name": "test_efficientnet", "image_size": 64},
    "connector": {"type": "pooled_mlp", "pool": 2},
}
"""A picture becomes 4 tokens."""

SPEECH = {
    "encoder": {
        "type": "whisper",
        "dims": {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2,
                 "n_audio_layer": 1, "n_vocab": 100, "n_text_ctx": 8, "n_text_state": 16, "n_text_head": 2,
                 "n_text_layer": 1},
    },
    "connector": {"type": "pooled_mlp", "stack": 5, "depth": 2},
}  # fmt: skip
"""A second of speech becomes 10 tokens."""


VIDEO = {
    "encoder": {"type": "frames", "image": IMAGE["encoder"], "frames": 4},
    "connector": {"type": "pooled_mlp", "pool": 1},
}
"""A video becomes a token for each of at most 4 frames."""

AUDIO = {"encoder": SPEECH["encoder"], "connector": {"type": "qformer", "num_queries": 3, "num_layers": 1,
                                                     "num_heads": 2, "hidden_size": 16}}  # fmt: skip
"""A sound becomes 3 tokens for each 30 s."""

BEATS = {
    "encoder": {"type": "beats", "embed_dim": 8, "encoder_layers": 1, "encoder_embed_dim": 16,
                "encoder_ffn_embed_dim": 16, "encoder_attention_heads": 2, "conv_pos": 4,
                "conv_pos_groups": 2},
    "connector": AUDIO["connector"],
}  # fmt: skip
"""The same with Uni-MoE's tower for sounds."""

SPEED = {"train/tokens_per_second", "train/pictures_per_second"}
"""Differs from run to run, and the first step after a start has none."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*control, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=CHATML,
    )


def save_tiny_llm(folder: str | Path, layers: int = 2, hidden_size: int = 32) -> Path:
    """A random LLaMA of a few thousand parameters and its tokenizer, a folder that ``build_model`` takes."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_model(folder: str | Path, moe: dict[str, Any] | None = None, **modalities: dict[str, Any]) -> Built:
    """A random model that sees and hears (or what ``modalities`` names); its LLM is in ``folder``/llm."""
    llm = Path(folder) / "llm"
    if not llm.exists():
        save_tiny_llm(llm)
    return build_model(str(llm), modalities or {"image": IMAGE, "speech": SPEECH}, moe)


def run_together(ranks: int, code: str, *arguments: str, timeout: float = 1200) -> list[str]:
    """Run Python code in so many processes of one run, each on one thread; returns what each of them said.

    Raises RuntimeError with all of it when one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={
                **os.environ,
                **place,
                "OMP_NUM_THREADS": "1",
                "WORLD_SIZE": str(ranks),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(said))
    return said


class StopAfter(Callback):
    """Asks a run to stop, as Ctrl-C does, after so many optimizer steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


class DieAt(Callback):
    """Ends a process of a run as ``kill -9`` does, at the beginning of a step, unless torchrun has started it
    again."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.global_rank == self.rank and trainer.global_step == self.step - 1 and not again:
            os.kill(os.getpid(), signal.SIGKILL)


def assert_same_run(output: Path, other: Path) -> None:
    """Two finished stages have the same curve and weights, within 1e-5."""
    curves = [read_curve(folder / "logs" / "metrics.csv") for folder in (output, other)]
    assert len(curves[0]) == len(curves[1])
    for one, two in zip(*curves, strict=True):
        assert one.keys() - SPEED == two.keys() - SPEED
        for key in one.keys() - SPEED:
            assert abs(one[key] - two[key]) <= 1e-5 * max(1, abs(two[key])), (key, one["step"])
    weights = [load_file(folder / "model.safetensors") for folder in (output, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=1e-5)

"""Tiny random models for tests with every part of the real ones: nothing to download, milliseconds to run."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from unimoe.model.build import Built, build_model
from unimoe.model.llm import byte_tokenizer
from unimoe.training.curve import read_curve

IMAGE = {
    "encoder": {"type": "timm", "name": "test_efficientnet", "image_size": 64},
    "connector": {"type": "pooled_mlp", "pool": 2},
}
"""4 tokens per image."""

SPEECH = {
    "encoder": {
        "type": "whisper",
        "dims": {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2,
                 "n_audio_layer": 1, "n_vocab": 100, "n_text_ctx": 8, "n_text_state": 16, "n_text_head": 2,
                 "n_text_layer": 1},
    },
    "connector": {"type": "pooled_mlp", "stack": 5, "depth": 2},
}  # fmt: skip
"""10 tokens per second of speech."""

VIDEO = {
    "encoder": {"type": "frames", "image": IMAGE["encoder"], "frames": 4},
    "connector": {"type": "pooled_mlp", "pool": 1},
}
"""1 token per frame, at most 4 frames per video."""

AUDIO = {"encoder": SPEECH["encoder"], "connector": {"type": "qformer", "num_queries": 3, "num_layers": 1,
                                                     "num_heads": 2, "hidden_size": 16}}  # fmt: skip
"""3 tokens per 30 s of audio."""

BEATS = {
    "encoder": {"type": "beats", "embed_dim": 8, "encoder_layers": 1, "encoder_embed_dim": 16,
                "encoder_ffn_embed_dim": 16, "encoder_attention_heads": 2, "conv_pos": 4,
                "conv_pos_groups": 2},
    "connector": AUDIO["connector"],
}  # fmt: skip
"""The same with Uni-MoE's audio encoder."""

SPEED = {f"train/{unit}_per_second" for unit in ("tokens", "images", "rows")}
"""Columns that differ from run to run; missing in the first step after a start."""


def save_tiny_llm(folder: str | Path, layers: int = 2, hidden_size: int = 32) -> Path:
    """Save a random LLaMA of a few thousand parameters and its tokenizer in a folder for ``build_model``."""
    tokenizer = byte_tokenizer()
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
    """A random model with images and speech, or with ``modalities``; its LLM is saved in ``folder``/llm."""
    llm = Path(folder) / "llm"
    if not llm.exists():
        save_tiny_llm(llm)
    return build_model(str(llm), modalities or {"image": IMAGE, "speech": SPEECH}, moe)


def tiny_mixtral(experts: int = 4, top_k: int = 2, layers: int = 2) -> MixtralForCausalLM:
    """A random Mixtral of a few thousand parameters, whose experts differ, in evaluation mode."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=63,
    )
    return MixtralForCausalLM(config).eval()


def run_together(ranks: int, code: str, *arguments: str, timeout: float = 1200) -> list[str]:
    """Run Python code in several processes of one distributed run, each with one thread.

    The processes are forked from a server that has imported the suite, which saves each the seconds of its
    imports.

    Args:
        ranks: number of processes.
        code: source; finds ``arguments`` in ``sys.argv[1:]`` and its rank in the environment.
        arguments: as on a command line.
        timeout: seconds until a process counts as hanging.

    Returns:
        What each process wrote to stdout and stderr.

    Raises:
        RuntimeError: if a process fails; with the output of all.
        TimeoutError: if a process does not end in time.
    """
    context = _server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, file in enumerate(files):
            environment = {**os.environ, **run, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_run_rank, args=(code, arguments, environment, file))
            process.start()
            processes.append(process)
        try:
            end = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            if any(process.exitcode is None for process in processes):
                raise TimeoutError(f"a process of the run did not end within {timeout:.0f} s")
        finally:
            for process in processes:
                process.kill()
        outputs = [file.read_text() for file in files]
    if any(process.exitcode for process in processes):
        ends = ", ".join(str(process.exitcode) for process in processes)
        raise RuntimeError("\n".join([*outputs, f"exit codes: {ends}"]))
    return outputs


def run_elastic(ranks: int, restarts: int, code: str, *arguments: str) -> list[str]:
    """Run Python code as :func:`run_together` does, under the agent of torchrun: when a process dies, all are
    started again, so many times.

    Returns:
        What each process wrote to stdout and stderr, over all starts.

    Raises:
        RuntimeError: if a process fails after the last restart; with the output of all.
    """
    _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            max_restarts=restarts,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            monitor_interval=0.1,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "logs")),
            signals_to_handle="",  # this process keeps its own handlers
        )
        try:
            elastic_launch(config, _run_restarted)(code, arguments, files)
        except ChildFailedError as error:
            raise RuntimeError("\n".join(file.read_text() for file in files)) from error
        return [file.read_text() for file in files]


def _server() -> ForkServerContext:
    """Starts processes by forking one that has imported the suite, and what a run imports late."""
    context = multiprocessing.get_context("forkserver")
    ours = [f"unimoe.{name}" for name in ("testing", "commands.fit", "stages.cli", "continual.cli")]
    context.set_forkserver_preload(
        [*ours, "unimoe.encoders.timm_image", "whisper.model", "torch.utils.tensorboard"]
    )
    return context


def _run_restarted(code: str, arguments: Sequence[str], files: Sequence[Path]) -> None:
    """One process of :func:`run_elastic`."""
    _run_rank(code, arguments, dict(os.environ), files[int(os.environ["RANK"])])


def _run_rank(code: str, arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
    """One process of :func:`run_together`."""
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    setattr(rank_zero_only, "rank", int(environment["RANK"]))  # noqa: B010  Lightning reads the rank when it is imported
    torch.set_num_threads(1)
    exec(code, {"__name__": "__main__"})


class StopAfter(Callback):
    """Interrupts a run, as Ctrl-C does, after ``step`` optimizer steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **_: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


class AskToStop(Callback):
    """Ends a run after its first step, as early stopping does."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **_: Any) -> None:
        trainer.should_stop = True


class DieAt(Callback):
    """Kills one process of a run (SIGKILL) at the start of a step, unless torchrun has restarted it."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **_: Any) -> None:
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.global_rank == self.rank and trainer.global_step == self.step - 1 and not again:
            os.kill(os.getpid(), signal.SIGKILL)


def assert_same_run(output: Path, other: Path, weights_within: float = 1e-5) -> None:
    """Check that two finished stages have the same curve, within 1e-5, and weights."""
    curves = [read_curve(folder / "logs" / "metrics.csv") for folder in (output, other)]
    assert len(curves[0]) == len(curves[1])
    for one, two in zip(*curves, strict=True):
        assert one.keys() - SPEED == two.keys() - SPEED
        for key in one.keys() - SPEED:
            assert abs(one[key] - two[key]) <= 1e-5 * max(1, abs(two[key])), (key, one["step"])
    weights = [load_file(folder / "model.safetensors") for folder in (output, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=weights_within)

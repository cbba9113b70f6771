"""llama.cpp's C interface, as far as decoding needs it, through ctypes.

The library is the one inside the wheel of xllamacpp, which exports the whole interface. Its structures differ
from build to build, so one version is supported, and what a function returns as the defaults of a structure
is compared with what that version is known to return before anything else is called.

Shapes: N tokens of a batch, H hidden, V vocabulary.
"""

import ctypes
import functools
import importlib.util
import logging
import platform
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unimoe.errors import UserError

log = logging.getLogger(__name__)

VERSION = "2026.10.11549"
"""The version of xllamacpp whose structures are below (llama.cpp b11549)."""
INSTALL = f"pip install 'xllamacpp=={VERSION}'"

MAX_ROWS = 256
"""LLAMA_MAX_SEQ: sequences that llama.cpp tells apart."""
UNIT = 256
"""Cells of a KV cache are allotted in multiples of this."""
F32 = 0
"""GGML type of a KV cache; float16 is the default."""
_ERROR = 4
"""Level of llama.cpp's log from which its messages are kept."""

_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(ctypes.Structure):
    """``llama_model_params``."""

    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """``llama_context_params``."""

    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unknown", c_void_p),  # new since llama.cpp 0.5.0, null by default
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("rest", ctypes.c_uint64 * 8),  # samplers and what else follows; read from the defaults
    ]


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_DEFAULTS: dict[type[ctypes.Structure], dict[str, Any]] = {
    ModelParams: {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
                  "tensor_split": None, "kv_overrides": None, "vocab_only": False, "check_tensors": False,
                  "use_extra_bufts": True, "no_host": False, "no_alloc": False},
    ContextParams: {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4,
                    "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1, "pooling_type": -1,
                    "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_orig_ctx": 0,
                    "defrag_thold": -1.0, "cb_eval": None, "type_k": 1, "type_v": 1, "unknown": None,
                    "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True,
                    "swa_full": True, "kv_unified": False},
}  # fmt: skip
"""What the functions for default parameters return in VERSION."""

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int32]),
}

_said: list[str] = []
"""The last errors of llama.cpp's log."""


@_LOG
def _listen(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _said[:] = [*_said[-9:], text.decode(errors="replace").strip()]


@functools.cache
def load_library(path: Path | None = None) -> ctypes.CDLL:
    """llama.cpp, checked to be the supported build.

    Args:
        path: of a library with the same interface; None takes the one in xllamacpp.

    Raises:
        UserError: xllamacpp is missing, of another version, or made for another processor.
    """
    try:
        library = ctypes.CDLL(str(path or _find()))
    except OSError as error:
        found = f"{platform.system()} on {platform.machine()}"
        raise UserError(
            f"llama.cpp cannot be loaded on this machine ({found}): {error}; {INSTALL} --no-binary xllamacpp"
        ) from error
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise UserError(f"this llama.cpp has no function {name}; expected that of {INSTALL}") from error
        function.restype, function.argtypes = result, arguments
    for function in (library.llama_model_default_params, library.llama_context_default_params):
        _check_defaults(function())
    _check_processor(library.llama_print_system_info().decode())
    library.llama_log_set(_listen, None)
    library.llama_backend_init()
    return library


def _find() -> Path:
    try:
        found = version("xllamacpp")
    except PackageNotFoundError:
        raise UserError(f"the engine llama.cpp needs xllamacpp, found none: {INSTALL}") from None
    if found != VERSION:
        raise UserError(f"the engine llama.cpp needs xllamacpp {VERSION}, found {found}: {INSTALL}")
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob("xllamacpp*.*")):
            if file.suffix in (".so", ".pyd", ".dylib"):
                return file
    raise UserError(f"xllamacpp {found} is installed without its library: {INSTALL} --force-reinstall")


def _check_defaults(found: ctypes.Structure) -> None:
    for name, value in _DEFAULTS[type(found)].items():
        if getattr(found, name) != value:
            raise UserError(
                f"llama.cpp's {type(found).__name__} has another layout: its default of {name} is "
                f"{getattr(found, name)}, expected {value}; {INSTALL} --force-reinstall"
            )


_FLAGS = {"AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX512": "avx512f"}
"""llama.cpp's names of instruction sets -> Linux's."""


def _check_processor(info: str) -> None:
    """Refuse a wheel whose instructions this x86 processor lacks: running it would end the process."""
    needed = {name.strip() for part in info.split("|") if (name := part.split("=")[0].split(":")[-1])}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return
    found = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    missing = [name for name, flag in _FLAGS.items() if name in needed and found and flag not in found]
    if missing:
        raise UserError(
            f"this build of llama.cpp needs a processor with {', '.join(missing)}, which this one lacks; "
            f"{INSTALL} --no-binary xllamacpp --force-reinstall"
        )


class Llama:
    """A GGUF file in llama.cpp, and the KV cache of several sequences.

    The cache grows with what the sequences hold. Not thread-safe.

    Args:
        file: a GGUF file.
        rows: sequences, which are numbered from 0.
        cells: positions that the cache may hold in all, at most.
        library: from :func:`load_library`.

    Raises:
        UserError: llama.cpp cannot load the file, or ``rows`` is out of range.
    """

    def __init__(self, file: Path, rows: int, cells: int, library: ctypes.CDLL | None = None):
        if not 1 <= rows <= MAX_ROWS:
            raise UserError(f"llama.cpp decodes 1..{MAX_ROWS} answers at once, found {rows} (--max-batch)")
        self.library: Any = library or load_library()
        self.rows, self.most = rows, -(-cells // UNIT) * UNIT
        self.lengths: dict[int, int] = {}
        """Cached positions of each sequence that has any."""
        self._context, self._cells = None, 0
        _said.clear()
        self._model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self._model:
            reason = _said[-1] if _said else "no reason given"
            raise UserError(f"{file}: llama.cpp cannot load it: {reason}")
        self.hidden_size: int = self.library.llama_model_n_embd(self._model)
        vocabulary = self.library.llama_model_get_vocab(self._model)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(vocabulary)

    def close(self) -> None:
        """Free the model and the cache."""
        if self._context:
            self.library.llama_free(self._context)
        if self._model:
            self.library.llama_model_free(self._model)
        self._context = self._model = None

    def metadata(self, key: str) -> str | None:
        """A text or number in the file's metadata."""
        buffer = ctypes.create_string_buffer(1024)
        length = self.library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode()

    def decode(self, tokens: Sequence[int] | Tensor, rows: Sequence[int], last_only: bool = False) -> Tensor:
        """Append one token to each of ``rows``, in order; a row may be named several times.

        Args:
            tokens: N ids, or embeddings [N, H].
            rows: N sequences.
            last_only: whether only the last token's logits are wanted.

        Returns:
            Logits [N, V] in float32, or [1, V].

        Raises:
            RuntimeError: llama.cpp fails; the cache is unchanged.
        """
        count = len(rows)
        self._reserve(count)
        positions, lengths = [], dict(self.lengths)
        for row in rows:
            positions.append(lengths.get(row, 0))
            lengths[row] = positions[-1] + 1
        wanted = [int(not last_only or index == count - 1) for index in range(count)]
        sequences = (c_int32 * count)(*rows)
        step = ctypes.sizeof(c_int32)
        pointers = [
            ctypes.cast(ctypes.byref(sequences, index * step), POINTER(c_int32)) for index in range(count)
        ]
        batch = Batch(
            n_tokens=count,
            pos=(c_int32 * count)(*positions),
            n_seq_id=(c_int32 * count)(*[1] * count),
            seq_id=(POINTER(c_int32) * count)(*pointers),
            logits=(c_int8 * count)(*wanted),
        )
        if isinstance(tokens, Tensor):
            embeds_NH = tokens.detach().float().cpu().contiguous()
            batch.embd = ctypes.cast(embeds_NH.data_ptr(), POINTER(c_float))
        else:
            batch.token = (c_int32 * count)(*tokens)
        if status := self.library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {status}: {_said[-1:] or ''}")
        self.lengths = lengths
        found = [index for index in range(count) if wanted[index]]
        return torch.stack([self._logits(index) for index in found])

    def forget(self, row: int) -> None:
        """Free the positions of a sequence."""
        if self.lengths.pop(row, 0) and self._context:
            memory = self.library.llama_get_memory(self._context)
            self.library.llama_memory_seq_rm(memory, row, -1, -1)

    def _logits(self, index: int) -> Tensor:
        found = self.library.llama_get_logits_ith(self._context, index)
        array = ctypes.cast(found, POINTER(c_float * self.vocab_size)).contents
        return torch.frombuffer(array, dtype=torch.float32).clone()

    def _reserve(self, more: int) -> None:
        """Make room for ``more`` positions: a larger context takes over what the sequences hold."""
        needed = sum(self.lengths.values()) + more
        if needed <= self._cells:
            return
        if needed > self.most:
            raise RuntimeError(f"the KV cache holds at most {self.most} positions, found {needed}")
        cells = min(max(2 * self._cells, -(-needed // UNIT) * UNIT), self.most)
        held = {row: self._state(row) for row in self.lengths}
        if self._context:
            self.library.llama_free(self._context)
        self._context, self._cells = self._new_context(cells), cells
        for row, state in held.items():
            if not self.library.llama_state_seq_set_data(self._context, state, len(state), row):
                raise RuntimeError(f"llama.cpp cannot restore sequence {row}")

    def _state(self, row: int) -> Any:
        size = self.library.llama_state_seq_get_size(self._context, row)
        state = ctypes.create_string_buffer(size)
        self.library.llama_state_seq_get_data(self._context, state, size, row)
        return state

    def _new_context(self, cells: int) -> Any:
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, self.rows
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.kv_unified = True  # sequences of any length share the cells
        if self.metadata("general.file_type") == "0":  # float32 throughout; flash attention rounds to float16
            params.type_k = params.type_v = F32
            params.flash_attn_type = 0
        context = self.library.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context: {_said[-1:] or ''}")
        return context

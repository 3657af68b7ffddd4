"""A small random model of any type that transformers has, and inputs for it.

Configs are made by one recipe: the type's own defaults, with each size replaced by a small one that
is chosen by the field's name. ``EXTRA`` has what the recipe cannot know.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPPINGS = {
    "text": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
VOCABULARY = 128
TEXT = 40
"""Tokens from here to the end of the vocabulary mean nothing special."""
LARGEST = 16_000_000
"""Parameters of the largest model that is still small."""

# The first pattern that matches a whole field's name decides. `n` is the default.
Shrink = Callable[[Any], Any]
SIZES: list[tuple[str, int | Shrink]] = [
    # widths of attention
    (r"qk_rope_head_dim|rope_head_dim", lambda n: 16 if n else n),
    (r".*lora_rank|hc_lowrank|lora_r", 32),
    (r"qk_head_dim", lambda n: None),
    (r"(.*_)?(head_dim|head_size|dim_head|d_head)|d_kv|kv_channels|mamba_headdim", 32),
    (
        r"(.*_)?(kv_heads|kv_n_heads|key_value_heads|query_groups)(_.*)?",
        lambda n: 1 if n == 1 else 2,
    ),
    (r"(.*_)?(num_heads|n_heads?|attention_heads)(_per_layer)?", 4),
    (r"linear_num_(key|value)_heads|num_groups|.*n_groups|mamba_ngroups|o_groups", 2),
    # experts
    (r"(n|num)_(group|expert_group)s?|topk_group", 1),
    (r".*(experts?_per_tok(en)?|moe_topk|moe_k|moe_top_k|experts_top_k)", 2),
    (r"(moe_|n_|num_)*(routed_|local_)?experts|zero_expert_num", 2),
    (r"(n|num|moe_num)_shared_experts", lambda n: min(n, 1)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda n: min(n, 1)),
    (r"num_nextn_predict_layers", 0),
    (r"rotary_dim", 16),
    # recurrent states
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"(mamba_)?(num_heads|n_heads)", 8),
    (r"(mamba_)?chunk_size", lambda n: min(n, 16)),
    (r"mamba_d_ssm|d_inner|lru_width|attention_hidden_size", 128),
    (r"(mamba_)?(dt_rank|time_step_rank)", 4),
    # layers
    (r"num_(feat_extract|conv|adapter|lstm|residual)_layers", lambda n: n),
    (
        r"(.*_)?(hidden|encoder|decoder|self|cross)_layers|(.*_)?(n_layers?|num_layers|depth|layers)",
        2,
    ),
    (r"num_blocks|.*_num_layers", 2),
    # widths
    (r"(moe|shared|expert|dense).*(intermediate_size|ffn_hidden_size|expert_dim)", 32),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|mlp_dim)(_mlp)?|n_inner",
        96,
    ),
    (r"feed_forward_size", 96),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|emb_dim|embedding_size)(_global)?",
        128,
    ),
    (
        r"(.*_)?(projection_dim|embed_proj_dim|output_dim|out_dim|in_dim|embedding_dim|proj_dim)",
        128,
    ),
    (r"out_hidden_size|projector_(in|out)put_dim|adapter_input_size|output_channels", 128),
    (r"hidden_size_per_layer_input|d_rel", 16),
    (r"dim", 128),
    # text
    (r"(.*_)?vocab_size(_.*)?|unpadded_vocab_size", lambda n: min(n, VOCABULARY)),
    (r".*hash_byte_group_vocab", 64),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|seq_length)", 1024),
    (r"max_(target|text)_positions|max_(de|en)coder_position_embeddings|rel_extent", 1024),
    (r"model_max_length", 1024),
    (r"sliding_windows?(_size)?|attention_chunk_size|attention_window_size|local_attention", 150),
    (r"window_size", lambda n: 150 if n > 100 else n),
    (r"index_topk", 32),
    # images and sound
    (r"max_source_positions", 100),
    (r"mm_tokens_per_image", 4),
    (r"base_channels", 32),
    (
        r"(num_)?(latents|query_tokens|resampler_n_latents|resampler_num_latents|latent_query_num)",
        4,
    ),
]
_SIZES = [(re.compile(pattern), size) for pattern, size in SIZES]
# Token numbers that must lie in the vocabulary, each of its own.
_TOKEN = re.compile(r".*(token_id|token_index|eoi_token_.*|boi_token_.*|image_patch_id|im_.*_id)")
_ORDINARY = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# Fields of to_dict() that no config is made from.
_NOT_SIZES = re.compile(
    r"_.*|model_type|transformers_version|architectures|id2label|label2id|num_labels|return_dict|"
    r"output_.*|torch_dtype|dtype|chunk_size_feed_forward|problem_type|is_encoder_decoder"
)

_GEMMA = {  # the last layers read the caches of others
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4,
}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "falcon_h1": {"mamba_n_heads": 4},
    "dots1": {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 16},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 2},
    # Its routing drops what lies far from the best by less than this: it must not jump.
    "phimoe": {"router_jitter_noise": 10.0},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "step3p5": {"sliding_window": 150},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 30, "vision_end_token_id": 31},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 30, "vision_end_token_id": 31},
    "chameleon": {"vocabulary_map": {"<image>": 30}},
    "emu3": {"vocabulary_map": {"<image>": 30}},
    "blip-2": {"image_token_index": 30},
    "instructblip": {"image_token_index": 30},
    "instructblipvideo": {"video_token_index": 30},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gemma3n_text": {**_GEMMA, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_GEMMA, "global_head_dim": 64, "intermediate_size": 96},
    "gemma4_unified_text": {**_GEMMA, "global_head_dim": 64, "intermediate_size": 96},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 128, "intermediate_size": 32}},
    "zamba2": {
        "n_mamba_heads": 8,
        "attention_head_dim": 64,
        "attention_hidden_size": 256,
        "hybrid_layer_ids": [1],
    },
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": [
            "sliding_attention",
            "mlp",
            "full_attention",
            "mlp",
            "full_attention",
            "mlp",
        ],
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "mllama_vision_model": {
        "intermediate_layers_indices": [0, 1],
        "num_global_layers": 2,
        "vision_output_dim": 384,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "video_llama_3_vision": {"num_channels": 3},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [6, 6, 4],
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 32,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "glm5_next": {"num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [64, 64],
        "axial_pos_shape": [32, 32],
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
    },
    "mistral_large4_text": {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "full", "shared"],
        "no_rope_layers": [1, 1, 0],
        "kv_source_layers": [0, 0, 2],
    },
    "speecht5": {"vocab_size": 128},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 4, 4, 4],
        }
    },
}
"""By config type, also of a part: fields that the recipe would get wrong."""


def types() -> list[tuple[str, str]]:
    """(config type, name of the model class) of all types with a model that writes text."""
    found: dict[tuple[str, str], None] = {}
    for mapping in MAPPINGS.values():
        for kind, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                found[kind, name] = None
    return sorted(found)


def config_for(kind: str) -> Any:
    """A small config of the type `kind`."""
    cls = CONFIG_MAPPING[kind]
    try:
        fields = cls().to_dict()
    except Exception:  # some say that they need parts
        fields = {}
    return cls(**_small(fields, kind))


def _small(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """`fields` of a config or of a part of one, small."""
    layers = next((fields[name] for name in _LAYERS if isinstance(fields.get(name), int)), None)
    kept = _representatives(fields, layers)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if _NOT_SIZES.fullmatch(name) or name == "per_layer_config":  # which follows from the rest
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {**_small(value, value["model_type"]), "model_type": value["model_type"]}
        elif kept and isinstance(value, (list, tuple)) and len(value) == layers:
            small[name] = [_sized(name, value[index]) for index in kept]
        elif kept and name in _LAYERS:
            small[name] = len(kept)
        elif _TOKEN.fullmatch(name) or name in _ORDINARY:
            small[name] = value
        else:
            small[name] = _sized(name, value)
    if small.get("head_dim", 0) is None:  # as wide as the others' share
        small["head_dim"] = 32
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if all(isinstance(small.get(name), int) for name in ("qk_nope_head_dim", "qk_rope_head_dim")):
        if "qk_head_dim" in fields:
            small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        if fields.get("head_dim") == fields["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]
    if "attention_multiplier" in small:  # the defaults, 1, are no model's
        small["attention_multiplier"] = 32**-0.5
    if "use_cache" in small:
        small["use_cache"] = True
    _small_rope(small, fields)
    _small_image(small, fields)
    _tokens(small)
    small.update(EXTRA.get(kind, {}))
    return {name: value for name, value in small.items() if value is not _MISSING}


_MISSING = object()
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def _sized(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_sized(name, entry) for entry in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in _SIZES:
        if pattern.fullmatch(name):
            return size if isinstance(size, int) else size(value)
    return value


def _representatives(fields: dict[str, Any], layers: int | None) -> list[int]:
    """Layers, at least two, of which there is one of each kind that the config tells apart."""
    if not layers:
        return []
    lists = [
        value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > 2
        if all(isinstance(entry, (str, int)) for entry in value) and "index" not in name
    ]
    if not lists:
        return []
    first: dict[Any, int] = {}
    for index, kinds in enumerate(zip(*lists, strict=True)):
        first.setdefault(kinds, index)
    kept = sorted(first.values())[:6]
    return kept if len(kept) > 1 else [0, 1]


def _small_rope(small: dict[str, Any], fields: dict[str, Any]) -> None:
    """Sections of a rotary embedding have the same shares of a small head as of a large one."""
    for name, value in fields.items():
        sections = value.get("mrope_section") if isinstance(value, dict) else None
        if sections:
            pairs = sum(sections) * _head_dim(small) // _head_dim(fields)
            small[name] = {**value, "mrope_section": _shares(pairs, sections)}


def _shares(total: int, parts: list[int]) -> list[int]:
    shares = [total * part // sum(parts) for part in parts]
    shares[0] += total - sum(shares)
    return shares


def _head_dim(fields: dict[str, Any]) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _small_image(small: dict[str, Any], fields: dict[str, Any]) -> None:
    """Four patches a side, in one tile; features of the last layers."""
    vision = fields.get("vision_config")
    if isinstance(vision, dict) and small.get("image_grid_pinpoints"):
        small["image_grid_pinpoints"] = [[4 * vision.get("patch_size", 14)] * 2]
    for name in ("vision_feature_layer", "vision_feature_layers"):
        if isinstance(small.get(name), list):
            small[name] = [-1, -2][: len(small[name])]
    patch, image = small.get("patch_size"), small.get("image_size")
    if isinstance(patch, int) and patch > 1 and image is not None:
        small["image_size"] = (
            [4 * patch] * len(image) if isinstance(image, (list, tuple)) else 4 * patch
        )


def _tokens(small: dict[str, Any]) -> None:
    """Gives each special token a number of its own in the small vocabulary."""
    free = iter(range(3, TEXT))
    for name, value in small.items():
        if name in _ORDINARY:
            small[name] = _ORDINARY[name]
        elif name.startswith("image_token_i") or (
            _TOKEN.fullmatch(name) and isinstance(value, int) and value >= 0
        ):
            small[name] = next(free)


def model_for(kind: str, name: str) -> Any:
    """A small random model of the class `name`, in eval mode, with weights large enough to matter.

    Raises:
        ValueError: for one that is not small, naming what is large.
    """
    cls = getattr(transformers, name)

    def config() -> Any:
        whole = config_for(kind)
        parts = (part for part in vars(whole).values() if type(part) is cls.config_class)
        return whole if isinstance(whole, cls.config_class) else next(parts, whole)

    with torch.device("meta"):
        sizes = {at: p.numel() for at, p in cls._from_config(config()).named_parameters()}
    if sum(sizes.values()) > LARGEST:
        large = sorted(sizes, key=lambda at: -sizes[at])[:3]
        raise ValueError(
            f"{sum(sizes.values()) / 1e6:.0f} million parameters: "
            + ", ".join(f"{at} {sizes[at] / 1e6:.0f}" for at in large)
        )
    torch.manual_seed(1)
    model = cls._from_config(config()).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08, generator=generator)
    for module in model.modules():
        sections, frequencies = (
            getattr(module, name, None) for name in ("mrope_section", "inv_freq")
        )
        if sections and frequencies is not None and sum(sections) != len(frequencies):
            module.mrope_section = _shares(len(frequencies), sections)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None  # no token ends the text
        model.generation_config.pad_token_id = 0
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = 1
    return model


def ids_of(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token numbers [batch, tokens], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT, VOCABULARY, (batch, tokens), generator=generator)


def inputs_for(model: Any, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to try as ``generate``'s inputs, best first: ("image", "sound" or "text", arguments).

    A batch of two rows; the second of a decoder-only model begins with padding. An encoder gets as
    many tokens as the decoder.
    """
    ids = ids_of(2, tokens)
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        for sound in _sounds(model):
            yield "sound", {**sound, "decoder_input_ids": ids}
        mask[1, -9:] = 0
        text = {"input_ids": ids, "attention_mask": mask}
        if "bbox" in _takes(model):
            text["bbox"] = torch.rand(2, tokens, 4, generator=torch.Generator().manual_seed(6))
        for image in _images(model):
            read = (
                image
                if model.main_input_name == "pixel_values"
                else _with_image(model, image, ids.clone(), mask)
            )
            if read is not None:
                yield "image", {**read, "decoder_input_ids": ids_of(2, tokens, 1)}
        yield "text", {**text, "decoder_input_ids": ids_of(2, tokens, 1)}
        return
    ids[1, :9] = 0
    mask[1, :9] = 0
    for image in _images(model):
        with_image = _with_image(model, image, ids.clone(), mask)
        if with_image is not None:
            yield "image", with_image
    yield "text", {"input_ids": ids, "attention_mask": mask}


def _takes(model: Any) -> set[str]:
    """Names of what the model and its reader of pictures can be given."""
    inner = getattr(model, "model", None)
    readers = (
        model.forward,
        getattr(inner, "forward", None),
        getattr(model, "get_image_features", None),
        getattr(inner, "get_image_features", None),
        getattr(model, "generate", None),
    )
    return {
        name for read in readers if read is not None for name in inspect.signature(read).parameters
    }


def _sounds(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments that are sound for an encoder."""
    main = model.main_input_name
    generator = torch.Generator().manual_seed(2)
    if main == "input_features":
        bins = _find(
            model.config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"
        )
        frames = 2 * (_find(model.config, "max_source_positions") or 100)
        yield {main: torch.randn(2, bins or 80, frames, generator=generator)}
        yield {main: torch.randn(2, frames, bins or 80, generator=generator)}
    elif main in ("input_values", "inputs"):
        yield {main: torch.randn(2, 8000, generator=generator)}
        yield {main: torch.randn(2, 1, 8000, generator=generator)}


def _find(config: Any, *names: str) -> Any:
    """The first of the fields `names` that a config or one of its parts has."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    # A part that is the picture's comes first.
    parts.sort(key=lambda part: "vision" not in str(getattr(part, "model_type", "")))
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def _images(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments that are one picture a row, in the layouts that transformers' models take."""
    takes = _takes(model)
    if "pixel_values" not in takes:
        return
    config = model.config
    patch = _int(_find(config, "patch_size")) or 16
    side = _int(_find(config, "image_size")) or 4 * patch
    channels = _int(_find(config, "in_channels", "in_chans", "num_channels")) or 3
    depth = _int(_find(config, "temporal_patch_size", "patch_temporal")) or 1
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    patches = 8 * 8
    grids = {
        "image_grid_thw": torch.tensor([[1, 8, 8]] * 2),
        "image_grid_hws": torch.tensor([[8, 8]] * 2),
        "grid_thw": torch.tensor([[1, 8, 8]] * 2),
        "grid_thws": torch.tensor([[1, 8, 8]] * 2),
        "image_grid_hw": torch.tensor([[8, 8]] * 2),
    }
    for name in grids.keys() & takes:
        if "image_merge_sizes" in takes:
            merge = {"image_merge_sizes": torch.tensor([2, 2])}
            yield {
                "pixel_values": noise(2 * patches, channels * patch * patch),
                name: grids[name],
                **merge,
            }
        width = channels * depth * patch * patch
        yield {"pixel_values": noise(2 * patches, width), name: grids[name]}
        yield {"pixel_values": noise(2 * patches, channels * patch * patch), name: grids[name]}
        yield {"pixel_values": noise(2 * patches, channels, patch, patch), name: grids[name]}
    extra: dict[str, Any] = {}
    if "image_sizes" in takes:
        yield {"pixel_values": noise(2, channels, side, side)}
        extra["image_sizes"] = torch.tensor([[side, side]] * 2)
    if "spatial_shapes" in takes:
        shapes = {"spatial_shapes": torch.tensor([[8, 8]] * 2)}
        mask = {"pixel_attention_mask": torch.ones(2, patches, dtype=torch.long)}
        yield {"pixel_values": noise(2, patches, channels * patch * patch), **shapes, **mask}
    if "image_position_ids" in takes or "pixel_position_ids" in takes:
        name = "image_position_ids" if "image_position_ids" in takes else "pixel_position_ids"
        at = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1)
        at = at.reshape(1, patches, 2).expand(2, -1, -1).contiguous()
        pool = _int(_find(config, "pooling_kernel_size")) or 1
        side_of = 4 * pool
        yield {"pixel_values": noise(2, patches, channels * patch * patch), name: at}
        at = torch.stack(
            torch.meshgrid(torch.arange(side_of), torch.arange(side_of), indexing="xy"), -1
        )
        at = at.reshape(1, side_of**2, 2).expand(2, -1, -1).contiguous()
        yield {"pixel_values": noise(2, side_of**2, channels * patch * patch), name: at}
    if "aspect_ratio_ids" in takes:
        tiles = _int(_find(config, "max_num_tiles")) or 4
        yield {
            "pixel_values": noise(2, 1, tiles, channels, side, side),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
        }
    tile_mask = {"pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    sizes = {"target_sizes": torch.tensor([[8, 8]] * 2)}
    if "target_sizes" in takes:
        yield {"pixel_values": noise(1, channels, patch, 2 * patches * patch), **sizes}
    if "pixel_attention_mask" in takes:
        yield {"pixel_values": noise(2, 1, channels, side, side), **tile_mask}
    if "high_res_pixel_values" in takes:
        high = _int(_find(config, "high_res_image_size")) or 4 * side
        yield {
            "pixel_values": noise(2, channels, side, side),
            "high_res_pixel_values": noise(2, channels, high, high),
        }
    if "image_attention_mask" in takes:
        extra["image_attention_mask"] = torch.ones(2, 1, 1, dtype=torch.long)
    yield {"pixel_values": noise(2, channels, side, side), **extra}
    yield {"pixel_values": noise(2, 1, channels, side, side), **extra}
    yield {"pixel_values": noise(2, 2, channels, side, side), **extra}


def _int(value: Any) -> int | None:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) else None


@torch.no_grad()
def _with_image(
    model: Any, image: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any] | None:
    """`ids` with a place for each of the picture's features; None for a picture of other make."""
    token = _find(
        model.config, "image_token_id", "image_token_index", "image_patch_id", "im_patch_id"
    )
    token = 30 if token is None and "image_embeds_position_mask" in _takes(model) else token
    given = {"input_ids": ids, "attention_mask": mask, **image}
    features = getattr(model, "get_image_features", None)
    if features is None and hasattr(model, "model"):
        features = getattr(model.model, "get_image_features", None)
    if "qformer_input_ids" in _takes(model):
        given["qformer_input_ids"] = ids_of(2, 5, seed=4)
        given["qformer_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    if token is None or features is None:
        return given
    try:
        known = inspect.signature(features).parameters.keys() - {"input_ids", "attention_mask"}
        found = features(**{name: value for name, value in given.items() if name in known})
    except Exception:  # whatever the model's own code raises for a layout that is not its own
        return None
    count = _rows(found) // 2
    if count == 0 or count > ids.shape[1] - 12:
        more = ids_of(2, max(count, 1) + 16, seed=3)
        given["input_ids"] = ids = torch.cat([ids, more], 1)
        given["attention_mask"] = torch.cat([mask, torch.ones_like(more)], 1)
    ids[:, 11 : 11 + count] = token
    places = ids == token
    for name in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"):
        if name in _takes(model):
            given[name] = places.long()
    return given


def _rows(found: Any) -> int:
    """How many vectors there are in a model's picture features."""
    pooled = getattr(found, "pooler_output", None)
    if pooled is not None:
        found = pooled
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if isinstance(found, torch.Tensor):
        return math.prod(found.shape[:-1])
    return sum(map(_rows, found))

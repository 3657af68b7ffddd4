"""Model families × features of ``generate``: with nothing sealed as without tqai, to the bit; with
sealed tokens as torch's attention over the same codes, dequantised.

The matrix in docs/transformers.md is made here, by this file's tests with ``TQAI_WRITE_DOCS=1``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import features
import page
import pytest
import torch
import tqai
import transformers
from caches import SEALING, assert_equal
from conftest import HALF_SLIDING, SMALL, make_ids
from features import (
    beams,
    chunked,
    forward,
    left_padded,
    plain,
    prompt_lookup,
    sampled,
    turns,
)
from tqai.transformers.attention import functions as attention
from tqai.transformers.model import other_layers

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
SLIDING = {"sliding_window": 150, "layer_types": HALF_SLIDING}
GEMMA_SHARED = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 150,
    "layer_types": HALF_SLIDING * 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 32}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**MOE, "head_dim": 32}),
    "Mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 150}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "head_dim": 16}),
    "Gemma 2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 150}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 16, **SLIDING}),
    "Phi 3, Phi 4": ("Phi3Config", {}),
    "Granite": ("GraniteConfig", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "SmolLM 3": ("SmolLM3Config", {}),
    "GLM 4": ("Glm4Config", {"head_dim": 16}),
    "Cohere 2": ("Cohere2Config", SLIDING),
    "StarCoder 2": ("Starcoder2Config", {"sliding_window": None}),
    "GPT-OSS": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "GPT-2": ("GPT2Config", {"n_positions": 1024}),
    "OPT": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Falcon": ("FalconConfig", {}),
    "GPT-J": ("GPTJConfig", {"rotary_dim": 8, "n_positions": 1024}),
    "Bloom": ("BloomConfig", {}),
    "DiffLlama": ("DiffLlamaConfig", {}),
    "StableLM": ("StableLmConfig", {}),
    "GPT-BigCode": ("GPTBigCodeConfig", {"n_positions": 1024}),
    "ERNIE 4.5": ("Ernie4_5Config", {"head_dim": 16}),
    "EXAONE 4": ("Exaone4Config", {**SLIDING, "sliding_window_pattern": 2}),
    "ModernBERT decoder": (
        "ModernBertDecoderConfig",
        {"local_attention": 300, "global_attn_every_n_layers": 2},
    ),
    "Llama 4": (
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "attention_chunk_size": 150,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
        },
    ),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {
            **GEMMA_SHARED,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
        },
    ),
    "Gemma 4": ("Gemma4TextConfig", {**GEMMA_SHARED, "global_head_dim": 32}),
    "DeepSeek V2": ("DeepseekV2Config", MLA),
    "DeepSeek V3": ("DeepseekV3Config", MLA),
    "Qwen3-Next": ("Qwen3NextConfig", {**LINEAR, **MOE, "shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("Qwen3_5TextConfig", LINEAR),
    "Jamba": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "Granite hybrid": (
        "GraniteMoeHybridConfig",
        {
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 32,
        },
    ),
    "LFM 2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}
HYBRIDS = ("Qwen3-Next", "Qwen3.5", "Jamba", "Bamba", "Granite hybrid", "LFM 2")
FEATURES: dict[str, Callable[[Any, dict[str, Any]], list[torch.Tensor]]] = {
    "greedy": plain,
    "left padding": left_padded,
    "beams": beams,
    "sampling": sampled,
    "chunked prefill": chunked,
    "prompt lookup": prompt_lookup,
    "several turns": turns,
    "forward": forward,
    "beam samples": features.beam_samples,
    "assistant": features.assisted,
    "guidance": features.guided,
    "embeddings": features.embedded,
    "returned cache": features.returned,
    "own masks": features.masked,
}
SEALED = "sealed tokens"
BRANCHES = "copies"
FILES = "files"
COLUMNS = [*FEATURES, SEALED, BRANCHES, FILES]
VERSION = f"With transformers {transformers.__version__}"
_cells: dict[tuple[str, str], str] = {}
# Of the logits' length. The kernels' own error is 1e-2 of an output (docs/kernels.md); random
# weights of two layers carry it on undiminished.
KERNEL_ERROR = 0.05
# Gemma 4 does not scale its scores down: softmax is sharper, and carries more of an error on.
WIDER = {"Gemma 4": 0.1}


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Any:
    name, extra = FAMILIES[request.param]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)(**{**SMALL, **extra})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    if not other_layers.HYBRIDS and request.param in HYBRIDS:
        with pytest.raises(NotImplementedError, match="own kind.*from transformers 5.5 on"):
            tqai.patch(model)
        pytest.skip("no common cache for hybrid models before transformers 5.5: tqai.patch says so")
    model.family = request.param
    yield model
    if tqai.is_patched(model):
        tqai.unpatch(model)


each_family = pytest.mark.parametrize("family", FAMILIES, indirect=True)


@each_family
@pytest.mark.parametrize("feature", FEATURES)
def test_with_nothing_sealed_it_is_as_without_tqai(
    family: Any, feature: str, greedy: dict[str, Any]
) -> None:
    if tqai.is_patched(family):
        tqai.unpatch(family)
    try:
        expected = FEATURES[feature](family, greedy)
    except Exception as error:  # whatever the model's own code raises
        tqai.patch(family)
        with pytest.raises(type(error)):
            FEATURES[feature](family, greedy)
        _cells[family.family, feature] = "no"
        return
    tqai.patch(family)
    got = FEATURES[feature](family, greedy)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    _cells[family.family, feature] = "="


@each_family
def test_sealed_tokens_are_read_as_torch_reads_the_same_codes(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    kernel = attention._attend_packed
    monkeypatch.setattr(attention, "_attend_packed", lambda *a: packed.append(1) or kernel(*a))
    cache = tqai.patch(family, **SEALING)
    ids = make_ids(2, 230)
    with torch.no_grad():
        family(ids[:, :220], past_key_values=cache)
        slow = copy.deepcopy(cache)
        slow.use_exact_arithmetic()
        for at in range(220, 230):  # one token, then more at a time
            given = {"input_ids": ids[:, at : at + 1]}
            got = family(**given, past_key_values=cache).logits
            expected = family(**given, past_key_values=slow).logits
            error = (got - expected).norm() / expected.norm()
            assert error < WIDER.get(family.family, KERNEL_ERROR)
    assert cache.memory_report()["packed_tokens"] > 0
    _cells[family.family, SEALED] = "kernel" if packed else "dequantised"


@each_family
def test_a_copied_prefix_is_shared_and_branches_are_their_own(family: Any) -> None:
    cache = tqai.patch(family, **SEALING)
    ids = make_ids(1, 200)
    with torch.no_grad():
        family(ids, past_key_values=cache)
        branch = copy.deepcopy(cache)
        expected = family(ids[:, :3], past_key_values=cache).logits
        assert torch.equal(family(ids[:, :3], past_key_values=branch).logits, expected)
        if family.family in HYBRIDS:
            with pytest.raises(NotImplementedError, match="recurrent state.*deepcopy"):
                branch.crop(150)
            assert branch.get_seq_length() == 203
            _cells[family.family, BRANCHES] = "error"
            return
        branch.crop(150)
        family(ids[:, :40], past_key_values=branch)
    assert cache.get_seq_length() == 203
    assert branch.get_seq_length() == 190
    _cells[family.family, BRANCHES] = "shared"


@each_family
def test_a_file_gives_the_same_cache(family: Any, tmp_path: Path) -> None:
    cache = tqai.patch(family, **SEALING)
    ids = make_ids(2, 200)
    with torch.no_grad():
        family(ids, past_key_values=cache)
        if family.family in HYBRIDS:
            with pytest.raises(NotImplementedError, match="layer 0 is a LinearAttentionLayer"):
                tqai.save_cache(cache, tmp_path / "f")
            _cells[family.family, FILES] = "error"
            return
        tqai.save_cache(cache, tmp_path / "f")
        loaded = tqai.load_cache(tmp_path / "f", family)
        assert_equal(loaded, cache)
        expected = family(ids[:, :3], past_key_values=cache).logits
        assert torch.equal(family(ids[:, :3], past_key_values=loaded).logits, expected)
    _cells[family.family, FILES] = "same"


def test_the_page_of_the_documentation_has_this_matrix() -> None:
    if len(_cells) < len(FAMILIES) * len(COLUMNS) or not page.is_to_say("matrix", VERSION):
        pytest.skip("needs the whole matrix, with the version that the page is made with")
    rows = [[name, *(_cells[name, column] for column in COLUMNS)] for name in FAMILIES]
    text = (
        f"{VERSION}, by tests/python/transformers/test_matrix.py: each cell was run on a small\n"
        "random model of the family.\n\n"
    )
    page.check("matrix", text + page.table(["family", *COLUMNS], rows))

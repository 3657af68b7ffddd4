"""examples/ggml_runtime, where it has been built, against transformers with the same weights."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

program = os.environ.get("TQAI_GGML_RUNTIME")
pytestmark = pytest.mark.skipif(
    program is None, reason="scripts/test --runtime builds it and sets TQAI_GGML_RUNTIME"
)

SIZES = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _model(kind, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Attention that looks somewhere, biases and norms that matter.
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif "embed" not in name:
                weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.5)
            else:
                weight.copy_(torch.randn_like(weight))
    return model


def _interleaved(weight, heads):
    """A llama's rows of queries or keys in the order of GGUF files: pairs side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _write(path, kind, model, *, spoil=None):
    writer = gguf.GGUFWriter(path, kind)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_rope_freq_base(SIZES["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, weight in model.state_dict().items():
        weight = weight.numpy()
        part, _, kind_of = name.removeprefix("model.").rpartition(".")
        if part == "embed_tokens":
            name = "token_embd"
        elif part == "norm":
            name = "output_norm"
        elif part == "lm_head":
            if config.tie_word_embeddings:
                continue
            name = "output"
        else:
            _, layer, part = part.split(".", 2)
            if kind == "llama" and part == "self_attn.q_proj":
                weight = _interleaved(weight, config.num_attention_heads)
            if kind == "llama" and part == "self_attn.k_proj":
                weight = _interleaved(weight, config.num_key_value_heads)
            name = f"blk.{layer}.{TENSORS[part]}"
        writer.add_tensor(f"{name}.{kind_of}", np.ascontiguousarray(weight))
    if spoil:
        writer.add_tensor(spoil, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _run(*arguments):
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def _logits(path, tokens, *arguments):
    out = path.with_suffix(".logits")
    numbers = " ".join(map(str, tokens))
    done = _run("--model", path, "--tokens", numbers, "--logits", out, *arguments)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.fromfile(out, np.float32).reshape(len(tokens), -1))


def _tokens(count):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(9)).tolist()


def _divergence(exact, other):
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("cache", ["tqai", "f16"])
@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False), ("llama", True)]
)
def test_logits_are_those_of_transformers(tmp_path: Path, kind, tied, cache):
    model = _model(kind, tied)
    path = tmp_path / "model.gguf"
    _write(path, kind, model)
    tokens = _tokens(120)  # all in the exact window
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    # In batches that do not divide the prompt, by more threads than there are heads.
    got = _logits(path, tokens, "--cache", cache, "--batch", 50, "--threads", 4)
    # Both caches round keys and values to fp16, and ggml's products with those in fp16.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)
    assert _divergence(expected, got) < 1e-5


def test_more_bits_are_nearer(tmp_path: Path):
    model = _model("qwen2", False)
    path = tmp_path / "model.gguf"
    _write(path, "qwen2", model)
    tokens = _tokens(600)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    errors = [
        _divergence(expected[300:], _logits(path, tokens, "--bits-k", bits, "--bits-v", bits)[300:])
        for bits in (2, 4, 8)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[1] < 0.05


def test_generates_what_transformers_does(tmp_path: Path):
    model = _model("qwen3", True)
    path = tmp_path / "model.gguf"
    _write(path, "qwen3", model)
    tokens = _tokens(40)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([tokens]),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, 40:].tolist()
    done = _run("--model", path, "--tokens", " ".join(map(str, tokens)), "--predict", 32)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == expected
    assert re.search(r"prompt: 40 tokens, .* generated: 32 tokens, .* cache: .* MB", done.stderr)


def test_what_it_does_not_compute_is_refused(tmp_path: Path):
    model = _model("llama", False)
    path = tmp_path / "model.gguf"
    _write(path, "llama", model, spoil="blk.0.ffn_gate_inp.weight")
    done = _run("--model", path, "--tokens", "1 2 3")
    assert done.returncode == 2
    assert "blk.0.ffn_gate_inp.weight, which this program does not compute" in done.stderr
    _write(path, "llama", model)
    done = _run("--model", path, "--tokens", "1 2 256")
    assert done.returncode == 2
    assert "token 256 is not one of 0 … 255" in done.stderr
    done = _run("--model", path, "--tokens", "1 2 3", "--ctx", 2)
    assert done.returncode == 2
    assert "no room for 3 more" in done.stderr
    done = _run("--model", tmp_path / "none.gguf", "--tokens", "1")
    assert done.returncode == 2
    assert "none.gguf is no GGUF file" in done.stderr

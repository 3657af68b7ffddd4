"""Trellis codes and learnt bases in the device store, beside the C++ cache."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from tqai import _core
from tqai.stores import for_torch as stores
from tqai.stores.device import Options
from tqai.stores.for_torch.tensor_refs import ref
from tqai.stores.for_torch.torch_store import TorchStore

CPU = torch.device("cpu")
HEADS, TOKENS = 2, 700


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def learnt(dim: int, bits: int, rope: Any) -> _core.KeyBasis:
    """Of keys whose coordinates have a structure."""
    mix = random(dim, dim, seed=1) * torch.logspace(0, -2, dim, device="cpu")[:, None]
    moments = _core.KeyMoments(HEADS, dim, rope=rope)
    for head in range(HEADS):
        moments.add_keys(head, (random(900, dim, seed=2 + head) @ mix).numpy())
        moments.add_queries(head, random(900, dim, seed=4 + head).numpy())
    return _core.KeyBasis.learn(moments, bits)


def rope_of(dim: int) -> Any:
    return tuple(10000.0 ** (-i / dim) for i in range(0, dim, 2)), "half_split", dim


class Both:
    """The same tokens in either store."""

    def __init__(
        self,
        bits: tuple[int, int],
        dims: tuple[int, int],
        codes: str,
        in_basis: bool,
        centering: str = "auto",
        key_codes: str = "scalar",
    ) -> None:
        rope = rope_of(dims[0])
        self.basis = learnt(dims[0], bits[0], rope) if in_basis else None
        options: dict[str, Any] = {
            "kv_heads": HEADS,
            "head_dim": dims[0],
            "value_head_dim": dims[1],
            "bits_k": bits[0],
            "bits_v": bits[1],
            "sink_tokens": 4,
            "residual_window": 16,
            "rotation": "auto",
            "centering": centering,
            "rope": rope,
            "value_codes": codes,
            "key_basis": self.basis,
            "key_codes": key_codes,
        }
        self.native = _core.KvCache(batch=2, **options)
        self.device = TorchStore(Options(dtype="float32", **options), 2, CPU)
        keys = random(2, HEADS, TOKENS, dims[0], seed=6) + 1
        values = random(2, HEADS, TOKENS, dims[1], seed=7)
        self.native.append(ref(keys), ref(values))
        self.native.seal()
        self.device.append(keys, values)
        self.device.seal()
        self.dim = dims[0]


CASES = [
    ((4, 2), (64, 64), "trellis", False),
    ((4, 3), (64, 80), "trellis", False),
    ((2, 1), (32, 32), "trellis", True),
    ((4, 4), (64, 64), "scalar", True),
    ((3, 4), (80, 80), "trellis", True),
    ((2, 2), (64, 64), "trellis", True, "trellis"),
    ((3, 2), (72, 64), "scalar", True, "trellis"),
    ((4, 8), (80, 32), "scalar", True, "trellis"),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request: pytest.FixtureRequest) -> Both:
    return made(request.param, "auto")


def made(case: Any, centering: str) -> Both:
    return Both(*case[:4], centering, *case[4:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_the_same_to_the_bit(case: Any) -> None:
    """Without centres, in whose sums the stores round differently."""
    both = made(case, "none")
    tiles = both.native.memory()["packed_bytes"]  # which come last
    assert both.device.packed_tokens(0) == 640 and tiles == both.device.memory()["packed_bytes"]
    assert both.device.serialize(True)[-tiles:] == both.native.serialize(True)[-tiles:]


def test_they_say_what_they_are_in(both: Both) -> None:
    assert both.device.key_basis is both.basis
    assert both.device.value_codes == both.native.value_codes
    assert both.device.key_codes == both.native.key_codes
    ours, theirs = both.device.memory(), both.native.memory()
    for name in ("packed_tokens", "packed_bytes", "basis_bytes"):
        assert ours[name] == theirs[name]


def test_each_reads_the_others_bytes(both: Both) -> None:
    bases = [] if both.basis is None else [both.basis]
    ours = TorchStore.deserialize(both.native.serialize(), CPU, bases)
    assert ours.serialize(True) == both.native.serialize(True)
    theirs = _core.KvCache.deserialize(both.device.serialize(), key_bases=bases)
    assert theirs.serialize(True) == both.device.serialize(True)
    again = pickle.loads(pickle.dumps(both.device))  # with its basis
    assert again.serialize(True) == both.device.serialize(True)
    if both.basis is not None:
        with pytest.raises(ValueError, match="basis"):
            TorchStore.deserialize(both.native.serialize(), CPU)


def test_they_decode_to_the_same(both: Both) -> None:
    dtypes = torch.float32, torch.float32
    given = stores.gather(both.device, 0, TOKENS, dtypes)
    for ours, theirs in zip(given, stores.gather(both.native, 0, TOKENS, dtypes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("count", [1, 50])
def test_attention_reads_the_same_codes(count: int, both: Both) -> None:
    queries = random(2, 3 * HEADS, count, both.dim, seed=9)
    keys, values = stores.gather(both.native, 0, TOKENS, (torch.float32,) * 2)
    keys, values = (each.repeat_interleave(3, 1) for each in (keys, values))
    seen = torch.arange(TOKENS, device="cpu") <= torch.arange(TOKENS, device="cpu")[-count:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, seen)
    given = both.device.attend(queries)
    torch.testing.assert_close(given, expected.transpose(1, 2), rtol=1e-4, atol=2e-5)

from __future__ import annotations

import numpy as np
import pytest
from tqai import _core
from tqai.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("bits_k", 0, "1 to 8"),
        ("bits_k", 9, "1 to 8"),
        ("bits_k", 2.5, "1 to 8"),
        ("bits_k", True, "1 to 8"),
        ("bits_v", "4", "1 to 8"),
        ("bits_v", None, "1 to 8"),
        ("sink_tokens", -1, "0 to"),
        ("residual_window", -1, "0 to"),
        ("residual_window", 2**31, "0 to"),
        ("codec", "turbo", "'scalar', 'trellis', 'adaptive'"),
        ("rotation", "random", "'auto', 'hadamard', 'haar'"),
        ("rotation", None, "'auto', 'hadamard', 'haar'"),
        ("centering", "median", "'auto', 'none', 'mean'"),
        ("skip_layers", 3, "a sequence"),
        ("skip_layers", "0", "a sequence"),
        ("skip_layers", [0.5], "an integer"),
        ("seed", -1, "0 to"),
        ("seed", 2**64, "0 to"),
        ("level", "sse2", "'scalar', 'neon', 'avx2', 'avx_vnni', 'avx512_vnni', 'avx512'"),
    ],
)
def test_names_what_was_given_and_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings(**{name: value})
    message = str(caught.value)
    assert name in message and allowed in message
    assert str(value) in message or repr(value) in message or isinstance(value, list)


def test_takes_any_integer_type_and_any_sequence() -> None:
    settings = Settings(bits_k=np.int64(3), skip_layers=range(2), seed=2**64 - 1)
    assert settings.bits_k == 3 and type(settings.bits_k) is int
    assert settings.skip_layers == (0, 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_bits_make_a_cache(bits: int) -> None:
    options = Settings(bits_k=bits, bits_v=9 - bits).core_options()
    assert _core.KvCache(batch=1, kv_heads=1, head_dim=16, **options).tokens == 0


def test_skipped_layers_count_from_either_end() -> None:
    assert Settings(skip_layers=(0, -1, -1)).skipped(4) == {0, 3}
    for layer in (4, -5):
        with pytest.raises(ValueError, match=rf"skip_layers={layer}.*4 layers.*-4…3"):
            Settings(skip_layers=(layer,)).skipped(4)


def test_a_level_that_the_machine_lacks_is_not_silently_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_core, "available_levels", lambda: ["scalar"])
    assert Settings(level="scalar").level == "scalar"
    for level in ("avx2", "avx_vnni", "avx512_vnni", "avx512"):
        with pytest.raises(NotImplementedError, match=f"{level}.*available: 'scalar'"):
            Settings(level=level)


@pytest.mark.parametrize("level", _core.available_levels())
def test_the_level_reaches_the_core(level: str) -> None:
    options = Settings(level=level).core_options()
    assert _core.KvCache(batch=1, kv_heads=1, head_dim=16, **options).level == level


def test_bits_by_layer() -> None:
    listed = Settings(bits_k=[4, 3, 2], bits_v={0: 8, -1: 6})
    assert [listed.of_layer(layer, 3).bits_k for layer in range(3)] == [4, 3, 2]
    assert [listed.of_layer(layer, 3).bits_v for layer in range(3)] == [8, 2, 6]
    same = Settings(bits_k=4, bits_v=2)
    assert same.of_layer(1, 3) is same


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([4, 4], "2 entries.*4 layers"),
        ({4: 8}, "layer 4.*4 layers.*-4…3"),
        ({-5: 8}, "layer -5"),
    ],
)
def test_bits_of_layers_that_do_not_exist(bits: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(bits_k=bits).of_layer(0, 4)


@pytest.mark.parametrize("bits", [[4, 9], {0: 0}, {"0": 4}, {0: "4"}, [None]])
def test_bits_by_layer_are_checked(bits: object) -> None:
    with pytest.raises(ValueError, match="expected an integer from"):
        Settings(bits_k=bits)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [((4, 2), (4, 8)), ((2, 2), (2, 4)), ((2, 6), (6, 4)), ((8, 8), (8, 8)), ((1, 1), (1, 2))],
)
def test_bits_of_latents(bits: tuple[int, int], expected: tuple[int, int]) -> None:
    settings = Settings(bits_k=bits[0], bits_v=bits[1], seed=3).of_latents()
    assert settings == Settings(bits_k=expected[0], bits_v=expected[1], seed=3)


def test_presets_and_what_is_given_beside_them() -> None:
    assert Settings.named(None) == Settings.named("balanced") == Settings()
    small = Settings.named("small", bits_k=3)
    assert (small.bits_k, small.bits_v, small.codec) == (3, 2, "auto")
    assert Settings.named("small", codec="scalar") == Settings(bits_k=2)
    with pytest.raises(ValueError, match="preset='tiny'.*'quality', 'balanced', 'small'"):
        Settings.named("tiny")

"""``tqai.Quantizer`` and ``tqai.ProdQuantizer`` over numpy's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tqai


@pytest.mark.parametrize("kind", [tqai.Quantizer, tqai.ProdQuantizer])
def test_rows_come_back_nearly_whatever_their_dtype_and_order(kind: Any) -> None:
    quantizer = kind(64, 8)
    vectors = np.random.default_rng(0).standard_normal((10, 64), np.float32)
    codes, norms = quantizer.encode(vectors)
    assert codes.dtype == np.uint8 and codes.shape == (10, quantizer.code_bytes)
    assert norms.dtype == np.float16 and norms.shape == (10, quantizer.norm_count)
    decoded = quantizer.decode(codes, norms)
    assert np.abs(decoded - vectors).max() < 0.1
    for same in (vectors.astype(np.float64), np.asfortranarray(vectors), vectors.tolist()):
        assert (quantizer.encode(same)[0] == codes).all()
    assert (quantizer.decode(codes[::-1], norms[::-1]) == decoded[::-1]).all()
    assert (quantizer.decode(codes, norms.astype(np.float32)) == decoded).all()
    products = quantizer.inner_products(vectors[:3], codes, norms)
    assert np.abs(products - vectors[:3] @ decoded.T).max() < 0.7
    assert quantizer.decode(codes[:0], norms[:0]).shape == (0, 64)


def test_codes_and_norms_that_encode_does_not_give_are_refused() -> None:
    quantizer = tqai.Quantizer(64, 4)
    codes, norms = quantizer.encode(np.ones((4, 64), np.float32))
    for wrong in (np.int64, np.int8, np.uint16, np.float32):
        with pytest.raises(ValueError, match="codes are of .*; needed: uint8, as encode gives"):
            quantizer.decode(codes.astype(wrong), norms)
        with pytest.raises(ValueError, match="codes are of"):
            quantizer.inner_products(np.ones((1, 64)), codes.astype(wrong), norms)
    for bits in (norms.view(np.uint16), norms.astype(np.int32)):
        with pytest.raises(ValueError, match="norms are of .*; needed: float16"):
            quantizer.decode(codes, bits)
    with pytest.raises(ValueError, match="norms has 3 rows; codes has 4"):
        quantizer.decode(codes, norms[:3])
    with pytest.raises(ValueError, match=r"codes has shape \(4, 5\)"):
        quantizer.decode(codes[:, :5], norms)

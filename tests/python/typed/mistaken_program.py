"""What users get wrong: pyright must report each line that says so, and no other."""

from __future__ import annotations

import tqai
from transformers import PreTrainedModel


def mistakes(model: PreTrainedModel) -> None:
    tqai.patch(model, bit_k=4)  # wrong: bits_k
    tqai.patch(model, bits_k="4")  # wrong: a number
    tqai.patch(model, bits_k=4.5)  # wrong: a whole number
    tqai.patch(model, bits_v=["2"])  # wrong: numbers
    tqai.patch(model, rotation="random")  # wrong: auto, hadamard or haar
    tqai.patch(model, centering="median")  # wrong: auto, none, mean or rope
    tqai.patch(model, backend="torch_ops")  # wrong: torch-ops
    tqai.patch(model, level="sse2")  # wrong: no such level
    tqai.patch(model, preset="fast")  # wrong: no such preset
    tqai.patch(model, skip_layers=3)  # wrong: a sequence
    tqai.patch(model, residual_window=None)  # wrong: a number
    tqai.patch(model, 4)  # wrong: bits are given by name
    tqai.patch("Qwen/Qwen2.5-0.5B")  # wrong: a name is no model
    tqai.patch()  # wrong: no model
    tqai.patched(model, window=32)  # wrong: residual_window
    tqai.TqaiCache(model, bit_k=4)  # wrong: bits_k
    tqai.TqaiCache()  # wrong: no model
    tqai.TqaiCache("Qwen/Qwen2.5-0.5B")  # wrong: a name is no model
    tqai.Settings(bits_k=4, rotation="random")  # wrong: auto, hadamard or haar
    tqai.Settings.named("smal")  # wrong: small
    tqai.patch(model).memory_repport()  # wrong: memory_report
    tqai.unpach(model)  # wrong: unpatch
    print(tqai.PRESETS["best"])  # wrong: no such preset
    tqai.load_cache(model, "file")  # wrong: the other way round
    tqai.save_cache("file", tqai.patch(model))  # wrong: the other way round
    tqai.evaluate(model, None, prefil=3)  # wrong: prefill

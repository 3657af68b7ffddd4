"""Settings by name, such as ``k4v2,residual_window=32``, as measurements take them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from tqai import api
from tqai.settings import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.transformers.cache.cache import TqaiCache

ARITHMETICS = ("kernel", "exact")

# What a setting's name may say after its bits.
SETTING_KEYS: dict[str, Callable[[str], Any]] = {
    "sink_tokens": int,
    "residual_window": int,
    "codec": str,
    "rotation": str,
    "centering": str,
    "seed": int,
    "backend": str,
    "level": str,
    "skip_layers": lambda layers: tuple(int(layer) for layer in layers.split("+")),
    "arithmetic": str,
}
_SHORT = {"sinks": "sink_tokens", "window": "residual_window", "skip": "skip_layers"}


def parse_setting(name: str) -> dict[str, Any]:
    """Options from a name such as ``k4v2``, ``k4v4,residual_window=32,sink_tokens=0`` or
    ``small,skip_layers=0+1``.

    The keys are arguments of ``tqai.patch``, layers being joined by plus signs, and arithmetic; see
    ``NamedSetting``. For short, window, sinks and skip are understood too.

    Raises:
        ValueError: for a name of another form.
    """
    first, *rest = name.split(",")
    options: dict[str, Any]
    if first in PRESETS:
        options = {"preset": first}
    else:
        match = re.fullmatch(r"k(\d+)v(\d+)", first)
        if match is None:
            raise ValueError(
                f"setting {name!r}: expected the bits of keys and values first, as k4v2, or one of "
                f"{', '.join(PRESETS)}"
            )
        options = {"bits_k": int(match[1]), "bits_v": int(match[2])}
    for item in rest:
        key, _, value = item.partition("=")
        key = _SHORT.get(key, key)
        if key not in SETTING_KEYS:
            allowed = ", ".join(f"{key}=" for key in SETTING_KEYS)
            raise ValueError(f"setting {name!r}: {item!r} starts with none of {allowed}")
        try:
            options[key] = SETTING_KEYS[key](value)
        except ValueError:
            raise ValueError(f"setting {name!r}: {key}={value!r} is not a number") from None
    return options


class Candidate(Protocol):
    """A way of holding keys and values that a model's own is compared with: a setting of tqai's, or
    any other that can say the same of itself."""

    @property
    def name(self) -> str: ...

    @property
    def window(self) -> int:
        """Last tokens that stay exact."""
        ...

    @property
    def seed(self) -> int | None:
        """Of what is random in it; None: its own."""
        ...

    def patched(self) -> AbstractContextManager[Any]:
        """A fresh cache, which the model takes in this context; its ``memory_report()`` has what
        ``TqaiCache``'s has of tokens and bytes, in all and by layer."""
        ...

    def again(self, **changes: Any) -> Candidate:
        """The same with another `seed` or `residual_window`, and under the same name but for the
        latter."""
        ...


class NamedSetting:
    """Arguments of ``tqai.patch`` for one model, and how attention reads the codes.

    With ``arithmetic="exact"`` it dequantises them and leaves the rest to torch, in the cache's
    dtype, so that what the kernels' integer arithmetic adds can be told from what the codes cost;
    by default, "kernel", it reads them as decoding does.
    """

    def __init__(self, model: PreTrainedModel, setting: str | Mapping[str, Any]) -> None:
        """Tries the setting, so that errors come before anything takes long.

        Args:
            model: not patched.
            setting: a name as for ``parse_setting``, or the options that one stands for.

        Raises:
            ValueError: for a name of another form, an arithmetic that does not exist, or what
                ``tqai.patch`` refuses.
            NotImplementedError: as ``tqai.patch``.
        """
        if isinstance(setting, str):
            self.name, self._options = setting, parse_setting(setting)
        else:
            self.name = ",".join(f"{key}={value}" for key, value in setting.items())
            self._options = dict(setting)
        arithmetic = self._options.pop("arithmetic", "kernel")
        if arithmetic not in ARITHMETICS:
            raise ValueError(
                f"setting {self.name!r}: arithmetic={arithmetic!r}; expected one of "
                f"{', '.join(ARITHMETICS)}"
            )
        self._model = model
        self._exact = arithmetic == "exact"
        with self.patched() as cache:
            self.settings = cache.settings

    @property
    def window(self) -> int:
        return self.settings.residual_window

    @property
    def seed(self) -> int | None:
        return self.settings.seed

    def again(self, **changes: Any) -> NamedSetting:
        """See ``Candidate``."""
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        other._options = {**self._options, **changes}
        if "residual_window" in changes:
            kept = [
                part
                for part in self.name.split(",")
                if part.partition("=")[0] not in ("window", "residual_window")
            ]
            other.name = ",".join([*kept, f"residual_window={changes['residual_window']}"])
        return other

    @contextmanager
    def patched(self) -> Iterator[TqaiCache]:
        """A fresh cache of the model, which is patched as long as it is in use."""
        cache = api.patch(self._model, **self._options)
        try:
            if self._exact:
                if not hasattr(cache, "use_exact_arithmetic"):
                    raise NotImplementedError(
                        f"setting {self.name!r}: arithmetic='exact' is for transformers models"
                    )
                cache.use_exact_arithmetic()
            yield cache
        finally:
            api.unpatch(self._model)


def named_settings(
    model: PreTrainedModel, settings: Iterable[str | Mapping[str, Any] | Candidate]
) -> list[Candidate]:
    """The settings, for `model`; what is no setting of tqai's stays what it is.

    Raises:
        ValueError: for no settings, a patched model, or as ``NamedSetting``.
        NotImplementedError: for an encoder-decoder model, or as ``tqai.patch``.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder model; texts are read by decoder-only "
            "models here: compare its outputs with and without tqai.patch(model)"
        )
    try:
        api.new_cache(model)
    except ValueError:
        pass
    else:
        raise ValueError("the model is patched; call tqai.unpatch(model) first")
    named: list[Candidate] = [
        NamedSetting(model, setting) if isinstance(setting, (str, Mapping)) else setting
        for setting in settings
    ]
    if not named:
        raise ValueError("settings: expected at least one")
    return named

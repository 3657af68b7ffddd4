"""mlx-lm's server over compressed caches: a process of its own, asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_mlx import make_model, mx
from toy import tokenizer

# isort: split
from mlx.utils import tree_flatten

PROGRAM = """
import sys
import tqai
from mlx_lm import server

load = server.load

def load_patched(*args, **kwargs):
    model, *rest = load(*args, **kwargs)
    tqai.patch(model)
    return model, *rest

server.load = load_patched
server.main()
"""
PREFIX = "".join(chr(97 + (7 * at) % 26) for at in range(600))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    model = make_model("llama", max_position_embeddings=4096)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {name: value for name, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log.txt").open("w")
    arguments = ["--model", str(folder), "--port", str(port), "--prefill-step-size", "256"]
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n{PROGRAM}"
    server = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=log, stdout=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        log.close()


def ask(address: str, prompt: str) -> tuple[str, int]:
    """What the server answers, and how many of the prompt's tokens it had in its cache."""
    body = {"model": "default_model", "prompt": prompt, "max_tokens": 12, "temperature": 0.0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    details = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["text"], details.get("cached_tokens", 0)


def test_a_prefix_is_read_once(address: str, tmp_path: Path) -> None:
    first, cached = ask(address, PREFIX)
    assert cached == 0 and len(first) > 0
    again, cached = ask(address, PREFIX)
    assert cached >= len(PREFIX) - 1 and again == first
    other, cached = ask(address, PREFIX + first + "and more")
    assert cached >= len(PREFIX) and other
    branched, cached = ask(address, PREFIX[:500] + "another end")
    assert 400 < cached <= 500 and branched

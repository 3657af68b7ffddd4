"""All model types that a generic small config can build; see sweep.py.

A sample of them here, all with ``TQAI_SWEEP=all``, a line for each (``scripts/test --full``).
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

import page
import pytest
import sweep
import tiny
import transformers
from conftest import TRANSFORMERS_4

ALL = os.environ.get("TQAI_SWEEP") == "all"
# What the matrix of families has nothing like.
SAMPLE = (
    "aya_vision",
    "deepseek_v3",
    "florence2",
    "gemma4_text",
    "git",
    "mamba",
    "mllama",
    "mpt",
    "nemotron_h_omni",
    "qwen2_5_vl",
    "t5",
    "whisper",
)
TYPES = [entry for entry in tiny.types() if ALL or entry[0] in SAMPLE]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[tuple[str, str], Future[sweep.Outcome]]:
    """Of the types that this run of pytest tests, several at a time."""
    selected = {item.callspec.params["entry"]: None for item in request.session.items
                if item.path == Path(__file__) and hasattr(item, "callspec")}  # fmt: skip
    return sweep.start(selected)


@pytest.mark.parametrize("entry", TYPES, ids=lambda entry: f"{entry[0]}-{entry[1]}")
def test_a_type_works_or_is_refused(
    entry: tuple[str, str],
    outcomes: dict[tuple[str, str], Future[sweep.Outcome]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = outcomes[entry].result()
    if ALL:
        with capsys.disabled():
            print(f"\n{outcome.line()}", end="", flush=True)
    assert outcome.status != "failed", outcome.why
    if TRANSFORMERS_4 and outcome.status == "unbuildable":
        pytest.skip(f"the recipe is for transformers 5: {outcome.why}")
    assert ALL or outcome.status != "unbuildable", outcome.why


def test_the_page_of_the_documentation_has_these_types(
    outcomes: dict[tuple[str, str], Future[sweep.Outcome]], capsys: pytest.CaptureFixture[str]
) -> None:
    done = [outcome.result() for outcome in outcomes.values()]
    text = f"With transformers {transformers.__version__}, {sweep.summary(done)}"
    if ALL:
        with capsys.disabled():
            print(f"\n{text}")
    if not page.is_to_say("types", f"With transformers {transformers.__version__},"):
        pytest.skip("needs the version that the page is made with")
    if ALL and len(done) == len(TYPES):
        text += ", by tests/python/transformers/test_sweep.py.\n\n"
        page.check("types", text + sweep.tables(done))
        return
    for outcome in done:
        assert page.table([], [sweep.row(outcome)]).splitlines()[-1] in page.made("types")

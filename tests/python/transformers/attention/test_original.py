from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from conftest import Models
from tqai.transformers.attention import functions as registered
from tqai.transformers.attention.original import (
    PATCHED_NAMES,
    Formula,
    PatchedName,
    formula_of,
    original_attention,
    original_name,
    patched_name,
    takes_unknown,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CPU = torch.device("cpu")
SHAPE = (4, 2, 16, 16)  # query heads, key/value heads, head_dim, value_head_dim


def attention_of(model: Any) -> torch.nn.Module:
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_name_is_the_originals_but_where_functions_are_looked_up(name: str) -> None:
    patched = patched_name(name)
    own = PATCHED_NAMES[name]
    assert patched == name and name == patched and patched in ("sdpa", "eager")
    assert patched != "flash_attention_2" and patched not in ("flash_attention_2", None)
    assert f"{patched}" == name and json.dumps({"name": patched}) == json.dumps({"name": name})
    # As models ask in tables and sets of their own.
    assert {name: 1, own: 2}[patched] == 1 and {own: 2, name: 1}[patched] == 1
    assert patched in {"sdpa", "eager"} and name in {patched} and patched not in {own}
    registered.register()
    functions = type(ALL_ATTENTION_FUNCTIONS)()
    functions[own], functions[name] = "tqai's", "the original's"
    assert functions[patched] == functions.get(patched) == "tqai's"
    assert functions[name] == "the original's" and patched in functions
    assert ALL_ATTENTION_FUNCTIONS[patched] is ALL_ATTENTION_FUNCTIONS[own]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_names_go_there_and_back(name: str) -> None:
    patched = patched_name(name)
    for given in (patched, PATCHED_NAMES[name]):
        assert type(patched_name(given)) is PatchedName and patched_name(given) == name
        assert type(original_name(given)) is str and original_name(given) == name
    for copied in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(copied) is str and copied == name


def test_the_eager_function_is_that_of_the_models_own_file(models: Models) -> None:
    for family in ("llama", "gemma2", "gpt_oss"):
        module = attention_of(models(family))
        function = original_attention("eager", module)
        assert function.__module__ == type(module).__module__
        # A subclass elsewhere has the function of the forward that it inherits.
        heir_class = type("Heir", (type(module),), {"__module__": __name__})
        heir = heir_class.__new__(heir_class)
        assert original_attention("eager", heir) is function
    with pytest.raises(NotImplementedError, match="Linear.*'sdpa'"):
        original_attention("eager", torch.nn.Linear(1, 1))


def refuses(function: Any, module: Any, soft_cap: float | None) -> bool:
    """Whether an attention function raises an error for a cap."""
    if soft_cap is None:
        return False
    query, key = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    try:
        function(module, query, key, key, None, scaling=1.0, softcap=soft_cap)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("family", "implementation", "soft_cap", "expected"),
    [
        ("llama", "sdpa", None, Formula(False, False)),
        ("llama", "eager", None, Formula(False, False)),
        ("gemma2", "eager", 1.0, Formula(True, False)),
        ("gemma2", "sdpa", 1.0, Formula(False, False)),  # which ignores it
        ("gpt_oss", "eager", None, Formula(False, True)),
        ("gpt_oss", "sdpa", None, Formula(False, False)),  # which ignores the sinks
    ],
)
def test_formulas_are_found_by_trying(
    family: str, implementation: str, soft_cap: float | None, expected: Formula, models: Models
) -> None:
    module = attention_of(models(family))
    function = original_attention(implementation, module)
    sinks = getattr(module, "sinks", None)
    found = formula_of(function, module, SHAPE, soft_cap, sinks, CPU)
    if refuses(function, module, soft_cap):  # "sdpa" a cap, in newer versions
        assert found is None and implementation == "sdpa"
    else:
        assert found == expected


def test_probing_leaves_the_random_numbers_alone(models: Models) -> None:
    module = attention_of(models())

    def fails(*_: Any, **__: Any) -> Any:
        torch.zeros(1) @ torch.zeros(2)

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert formula_of(fails, module, SHAPE, None, None, CPU) is None
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_a_probe_that_was_interrupted_is_tried_again(error: BaseException, models: Models) -> None:
    module = attention_of(models())
    function = original_attention("sdpa", module)
    errors = [error]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*arguments, **options)

    try:
        assert formula_of(interrupted, module, SHAPE, None, None, CPU) is None
    except KeyboardInterrupt:
        pass
    assert formula_of(interrupted, module, SHAPE, None, None, CPU) == Formula(False, False)


def test_only_named_arguments_with_a_value_are_unknown() -> None:
    def function(module: Any, query: Any, softcap: Any, position_bias: Any, **_: Any) -> None: ...

    assert takes_unknown(function, {"position_bias": 1})
    assert not takes_unknown(function, {"position_bias": None, "softcap": 2, "anything": 3})

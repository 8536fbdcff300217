"""The words of recipes are written down apart from the classes, to be checked without torch: both agree."""

from __future__ import annotations

import collections.abc
import dataclasses
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tinycompress
from tinycompress.distillation.teacher_cache import TeacherCache
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import Grid
from tinycompress.recipe.checking import check_names
from tinycompress.recipe.classes import CLASSES
from tinycompress.recipe.document import parse_document
from tinycompress.recipe.fields import (
    FIELDS,
    GRID,
    MODEL,
    ONLY_IN_PYTHON,
    PASSES,
    QUANTIZER,
    REQUIRED,
    WINDOWS,
    Fixed,
    Kinds,
    Listed,
    Mapped,
    Table,
)
from tinycompress.recipe.mistakes import RecipeError
from tinycompress.recipe.recipe import Recipe
from tinycompress.recipe.values import describe

ROOT = Path(__file__).parents[2]
AS_WRITTEN: dict[str, Kinds] = {"held_out": (Listed((str,)),), "tokens": (WINDOWS,), "quantizer": (QUANTIZER,)}


def kinds_of(hint: Any) -> Kinds:
    """What a type of a field is in a recipe."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    arms = typing.get_args(hint) if union else (hint,)
    written = [arm for arm in arms if arm is not type(None) and typing.get_origin(arm) is not collections.abc.Callable]
    return tuple(dict.fromkeys(kind_of(arm) for arm in written))


def kind_of(arm: Any) -> Any:
    if arm in (Graph, TeacherCache):
        return MODEL
    origin, inner = typing.get_origin(arm), typing.get_args(arm)
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return Mapped(kinds_of(inner[1]))
    if origin is tuple and Ellipsis not in inner:
        return Fixed(tuple(kinds_of(item) for item in inner))
    if origin is not None:
        return Listed(kinds_of(inner[0]))
    if issubclass(arm, Grid):
        return GRID
    return Table(arm.__name__) if dataclasses.is_dataclass(arm) else arm


@pytest.mark.parametrize("name", CLASSES)
def test_the_words_of_a_table_are_the_fields_of_its_class(name: str) -> None:
    kind = CLASSES[name]
    hints = typing.get_type_hints(kind, localns={"TeacherCache": TeacherCache, "Tensor": Tensor})
    of_a_pass = name in PASSES
    fields = [f for f in dataclasses.fields(kind) if f.init and not (of_a_pass and f.name in ONLY_IN_PYTHON)]
    expected = {
        f.name: AS_WRITTEN[f.name] if of_a_pass and f.name in AS_WRITTEN else kinds_of(hints[f.name]) for f in fields
    }
    assert list(FIELDS[name].items()) == list(expected.items())
    missing = dataclasses.MISSING
    needed = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    assert list(REQUIRED.get(name, ())) == [field for field in needed if field not in ("tokens", "teacher")]


def test_every_pass_is_there_and_every_word_is_described() -> None:
    exported = [name for name in tinycompress.__all__ if hasattr(getattr(tinycompress, name), "__dataclass_fields__")]
    passes = {name for name in exported if "__call__" in vars(getattr(tinycompress, name))} - {"Inputs"}
    assert passes == set(PASSES) and set(CLASSES) == set(FIELDS)
    assert all(describe(kinds) for known in FIELDS.values() for kinds in known.values())


MISTAKES = '[[pass]]\nname = "GPTQ"\nspce = "w4g64"\nrefine = "2"\n[[pass]]\nname = "Drop"\n[[pass]]\nname = "Slise"\n'


def test_names_are_told_as_the_whole_check_tells_them() -> None:
    told = []
    for check in (check_names, Recipe.of):
        with pytest.raises(RecipeError) as raised:
            check(*parse_document(MISTAKES, "r.toml"))
        told.append(raised.value.mistakes)
    assert told[0] == told[1] and len(told[0]) == 4


def test_sound_recipes_have_sound_names() -> None:
    for path in (ROOT / "docs" / "recipes").glob("*.toml"):
        check_names(*parse_document(path.read_text(), path.name))


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys\nfrom tinycompress.recipe.document import parse_document\n"
        "from tinycompress.recipe.checking import check_names\nfrom tinycompress.errors import InputError\n"
        f"try: check_names(*parse_document({MISTAKES!r}, 'r.toml'))\n"
        "except InputError as error: print(len(error.mistakes), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 False\n"

"""From the values of a document to those of passes: by the types of the fields, with every mistake collected."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..distillation.teacher_cache import TeacherCache
from ..errors import InputError
from ..graph.graph import Graph, Pass
from ..graph.quant_tensor import Grid, QuantSpec
from .losses import parse_hidden, parse_losses
from .mistakes import Mistake, Place, nearest, shown
from .vocabulary import ONLY_IN_PYTHON, PASSES, STRETCHES, Data, required, words

ACCEPTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


class Sources(Protocol):
    """What stands behind the names in a recipe."""

    def tokens(self, data: Data) -> Tensor:
        """Windows [samples, seq_len] of a text."""

    def graph(self, name: str) -> Graph:
        """A model; "model" is the one that the recipe starts from."""

    def teacher(self, name: str, of: str | None) -> Graph | TeacherCache:
        """A model, or a folder of a teacher's cached answers, checked to be those of the model `of`."""

    def texts(self, names: Sequence[str], seq_len: int) -> Mapping[str, Tensor]:
        """Windows of held-out texts by name."""


@dataclass(frozen=True)
class Quantizer:
    """A pass that rounds, but for its grids: what `MixedBits.quantizer` is in a recipe.

    Fields:
        name: of the pass.
        fields: all others of its fields.
    """

    name: str
    fields: Mapping[str, Any] = field(repr=False)

    def __call__(self, specs: Mapping[str, QuantSpec]) -> Pass:
        made: Pass = PASSES[self.name](spec=specs, **self.fields)
        return made


@dataclass
class Reader:
    """Reads tables of a document; mistakes are collected in `mistakes`.

    Fields:
        sources: what stands behind names.
        data: the windows of passes that name none.
        mistakes: those found so far.
    """

    sources: Sources
    data: Data
    mistakes: list[Mistake] = field(default_factory=list)

    def wrong(self, place: Place, found: str, accepted: str) -> None:
        self.mistakes.append(Mistake(place, found, accepted))

    def step(self, table: object, place: Place, without: Sequence[str] = ()) -> Pass | None:
        """The pass of a `[[pass]]` table; None if something is wrong with it."""
        before = len(self.mistakes)
        found = self.named(table, place)
        if found is None:
            return None
        name, rest = found
        kind = PASSES[name]
        fields = self.fields(rest, place, name, words(kind))
        if "tokens" in words(kind) and "tokens" not in fields:
            fields["tokens"] = self.sources.tokens(self.data)
        if name == "Distill":
            self.finish_training(fields, rest, place)
        if name in STRETCHES and not self.says_length(rest):
            example = "tokens = { samples = 1, seq_len = 16384 }, windows as long as the new context"
            self.wrong(place, f"{name} without tokens of a length", example)
        for key in required(kind):
            if key not in fields and key not in without:
                self.wrong(place, f"{name} without {key}", f"{key} = … ({self.describe(words(kind)[key])})")
        if len(self.mistakes) > before:
            wrong = {mistake.place[len(place)] for mistake in self.mistakes[before:] if len(mistake.place) > len(place)}
            sound = {key: value for key, value in fields.items() if key not in wrong}
            if "tokens" in wrong:
                sound["tokens"] = self.sources.tokens(self.data)
            if not without and all(key in sound for key in required(kind)):
                self.more_mistakes(kind, sound, rest, place)
            return None
        if without:
            return Quantizer(name, fields)  # type: ignore[return-value]
        made = self.made(kind, fields, rest, place)
        return None if made is None else typing.cast(Pass, made)

    def named(self, table: object, place: Place) -> tuple[str, dict[str, Any]] | None:
        """The name of a pass, and the other keys of its table."""
        if not isinstance(table, Mapping):
            self.wrong(place, shown(table), 'a table with a name, such as { name = "RTN" }')
            return None
        name = table.get("name")
        if name is None:
            self.wrong(place, "a pass without a name", f'name = "…": {" | ".join(PASSES)}')
        elif not isinstance(name, str) or name not in PASSES:
            self.wrong((*place, "name"), f"{shown(name)}, no pass", nearest(str(name), PASSES))
        else:
            return name, {key: value for key, value in table.items() if key != "name"}
        return None

    @staticmethod
    def says_length(table: Mapping[str, Any]) -> bool:
        tokens = table.get("tokens")
        return isinstance(tokens, Mapping) and "seq_len" in tokens

    def finish_training(self, fields: dict[str, Any], table: Mapping[str, Any], place: Place) -> None:
        """Held-out texts are as long as the windows that train; without a teacher there is none."""
        fields.setdefault("teacher", None)
        names = fields.pop("held_out", None)
        tokens = fields.get("tokens")
        if names and isinstance(tokens, Tensor):
            fields["held_out"] = self.sources.texts(names, tokens.shape[1])

    def fields(self, table: Mapping[str, Any], place: Place, owner: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a table whose keys are those of `known`."""
        out: dict[str, Any] = {}
        for key, value in table.items():
            inner = (*place, key)
            if key in known:
                out[key] = self.field(owner, key, value, known[key], inner)
            elif owner in PASSES and key in ONLY_IN_PYTHON:
                self.wrong(inner, f"{key}, which belongs to a run and not to its recipe", " | ".join(known))
            else:
                meant = nearest(key, known)
                self.wrong(inner, f"{key!r}, which {owner} does not have", meant)
                if meant in known and meant not in table:  # so that what depends on it can be checked too
                    out[meant] = self.field(owner, meant, value, known[meant], inner)
        return out

    def field(self, owner: str, key: str, value: Any, hint: Any, place: Place) -> Any:
        """One value. What has the same name in every pass means the same in every pass."""
        if owner in PASSES and key == "tokens":
            return self.windows(value, place)
        if key in ("reference", "teacher"):
            return self.model(key, value, place)
        if key == "held_out":
            return self.converted(value, tuple[str, ...], place)
        if key == "quantizer":
            table = {"name": value} if isinstance(value, str) else value
            return self.step(table, place, without=("spec",))
        if key in ("losses", "hidden") and isinstance(value, str):
            try:
                return parse_losses(value) if key == "losses" else parse_hidden(value)
            except InputError as error:
                self.mistakes.append(Mistake(place, f"{error.field} {error.found}", error.accepted, error))
                return None
        return self.converted(value, hint, place)

    def windows(self, value: Any, place: Place) -> Tensor | None:
        table = {"text": value} if isinstance(value, str) else value
        before = len(self.mistakes)
        if not isinstance(table, Mapping):
            self.wrong(place, shown(value), "a text, or a table such as { samples = 8, seq_len = 512 }")
            return None
        fields = self.fields(table, place, "tokens", words(Data))
        if len(self.mistakes) > before:
            return None
        data = self.made(Data, dataclasses.asdict(self.data) | fields, table, place)
        return None if data is None else self.sources.tokens(data)

    def model(self, key: str, value: Any, place: Place) -> Any:
        """A graph, or for a teacher a cache of one."""
        if key == "teacher" and isinstance(value, Mapping):
            table = self.fields(value, place, "teacher", {"cache": str, "of": str})
            if "cache" in table:
                return self.sources.teacher(table["cache"], table.get("of"))
            self.wrong(place, shown(value), '{ cache = "FOLDER" }')
        elif not isinstance(value, str):
            self.wrong(place, shown(value), '"model" (the one that the recipe starts from), or the name of another')
        elif key == "teacher":
            return self.sources.teacher(value, None)
        else:
            return self.sources.graph(value)
        return None

    # by type

    def converted(self, value: Any, hint: Any, place: Place) -> Any:
        """A plain value as the type of a field wants it."""
        arms = _arms(hint)
        fitting = [arm for arm in arms if _fits(value, arm)]
        if not fitting:
            self.wrong(place, shown(value), self.describe(hint))
            return None
        arm = fitting[0]
        if isinstance(arm, type) and issubclass(arm, Grid):
            return self.grid(value, place)
        if dataclasses.is_dataclass(arm) and isinstance(arm, type):
            before = len(self.mistakes)
            fields = self.fields(value, place, arm.__name__, words(arm))
            return None if len(self.mistakes) > before else self.made(arm, fields, value, place)
        if isinstance(value, list):
            inner = typing.get_args(arm)
            kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis or len(inner) == 1 else inner
            if len(kinds) != len(value):
                self.wrong(place, f"{len(value)} values", f"{len(kinds)}")
                return None
            return tuple(self.converted(item, kind, (*place, i)) for i, (item, kind) in enumerate(zip(value, kinds)))
        if isinstance(value, Mapping):
            kind = typing.get_args(arm)[1]
            out = {key: self.converted(item, kind, (*place, key)) for key, item in value.items()}
            return out | {key: item for key, item in value.items() if kind is float and isinstance(item, int)}  # counts
        return float(value) if arm is float else value

    def grid(self, value: str | Mapping[str, Any], place: Place) -> QuantSpec | None:
        """ "w4g64", or { grid = "w4g64", search = "mse" }: what text alone does not say."""
        table = {"grid": value} if isinstance(value, str) else value
        before = len(self.mistakes)
        fields = self.fields(table, place, "a grid", {"grid": str, "search": str})
        if len(self.mistakes) > before:
            return None
        try:
            spec = QuantSpec.parse(fields.pop("grid"))
            return dataclasses.replace(spec, **fields)
        except InputError as error:
            self.mistakes.append(Mistake(place, f"{error.field} {error.found}", error.accepted, error))
            return None

    def made(self, kind: type[Any], fields: Mapping[str, Any], table: Mapping[str, Any], place: Place) -> Any:
        """An instance, or None with its errors as mistakes at the keys that they speak of."""
        try:
            return kind(**fields)
        except InputError as error:
            key = _key_of(error, table)
            at = place if key is None else (*place, key)
            self.mistakes.append(Mistake(at, f"{error.field} {error.found}", error.accepted, error))
            if key in fields and key not in required(kind):
                self.more_mistakes(kind, {name: value for name, value in fields.items() if name != key}, table, place)
            return None

    def more_mistakes(self, kind: type[Any], fields: Mapping[str, Any], table: Mapping[str, Any], place: Place) -> None:
        """What is wrong with the other values of a table that has a mistake: only errors that speak of one of them,
        for others may come from what is left out."""
        inner = Reader(self.sources, self.data)
        inner.made(kind, fields, table, place)
        at = {(*place, key) for key in fields}
        self.mistakes += [mistake for mistake in inner.mistakes if mistake.place in at]

    @staticmethod
    def describe(hint: Any) -> str:
        """What a field takes, in the words of a recipe."""
        return " or ".join(dict.fromkeys(_described(arm) for arm in _arms(hint)))


def _arms(hint: Any) -> list[Any]:
    """The types that a field may have; functions and objects of Python are none of a recipe."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    arms = typing.get_args(hint) if union else (hint,)
    return [arm for arm in arms if arm is not type(None) and not _is_callable(arm)]


def _is_callable(arm: Any) -> bool:
    return typing.get_origin(arm) is collections.abc.Callable


def _fits(value: Any, arm: Any) -> bool:
    if arm is bool:
        return isinstance(value, bool)
    if arm is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if arm is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if arm is str:
        return isinstance(value, str)
    if isinstance(arm, type) and issubclass(arm, Grid):
        return isinstance(value, str) or (isinstance(value, Mapping) and "grid" in value)
    if dataclasses.is_dataclass(arm):
        return isinstance(value, Mapping)
    origin = typing.get_origin(arm)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return origin is not None and issubclass(origin, Iterable) and isinstance(value, list | tuple)


def _described(arm: Any) -> str:
    if arm in ACCEPTED:
        return ACCEPTED[arm]
    if arm in (Graph, TeacherCache):
        return '"model", or the name of another'
    if isinstance(arm, type) and dataclasses.is_dataclass(arm):
        return 'a grid such as "w4g64"' if issubclass(arm, Grid) else f"a table of {' | '.join(words(arm))}"
    origin = typing.get_origin(arm)
    if origin is not None and issubclass(origin, Mapping):
        return "a table"
    if origin is None:
        return getattr(arm, "__name__", str(arm))
    return "a list"


def _key_of(error: InputError, table: Mapping[str, Any]) -> str | None:
    """The key that an error speaks of: by the name of its field, or else by the value that it quotes."""
    named = error.field.rpartition(".")[2].split(" ")[0]
    if named in table:
        return named
    quoted = [key for key, value in table.items() if error.found in (repr(value), str(value))]
    return quoted[0] if quoted else None

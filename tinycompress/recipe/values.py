"""From the values of a document to those of passes: by the types of the fields, with every mistake collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import InputError
from .fields import FIELDS, GRID, MODEL, ONLY_IN_PYTHON, PASSES, REQUIRED, Fixed, Kind, Kinds, Listed, Mapped, Table
from .mistakes import Mistake, Place, nearest, shown
from .vocabulary import STRETCHES, TABLES, Data

if TYPE_CHECKING:
    from torch import Tensor

    from ..distillation.teacher_cache import TeacherCache
    from ..graph.graph import Graph, Pass
    from ..graph.quant_tensor import QuantSpec

ACCEPTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
WITHOUT_TORCH = {kind.__name__: kind for kind in TABLES.values()}  # classes that any import can afford


class Sources(Protocol):
    """What stands behind the names in a recipe."""

    def tokens(self, data: Data) -> Tensor:
        """Windows [samples, seq_len] of a text."""

    def answers(self, windows: Tensor) -> Tensor | None:
        """How much each token of such windows counts in training; None where all count the same."""

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
        return cast("Pass", class_of(self.name)(spec=specs, **self.fields))


@dataclass
class Reader:
    """Reads tables of a document; mistakes are collected in `mistakes`.

    Fields:
        sources: what stands behind names. None: only names and kinds of values are read, which takes no torch; passes
            and their parts are not made, and their own checks wait.
        data: the windows of passes that name none.
        mistakes: those found so far.
    """

    sources: Sources | None
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
        known = PASSES[name]
        fields = self.fields(rest, place, name, known)
        if "tokens" in known and "tokens" not in fields:
            fields["tokens"] = self.sources and self.sources.tokens(self.data)
        if name == "Distill":
            self.finish_training(fields, rest, place)
        if name in STRETCHES and not self.says_length(rest):
            example = "tokens = { samples = 1, seq_len = 16384 }, windows as long as the new context"
            self.wrong(place, f"{name} without tokens of a length", example)
        needed = REQUIRED.get(name, ())
        for key in needed:
            if key not in fields and key not in without:
                self.wrong(place, f"{name} without {key}", f"{key} = … ({describe(known[key])})")
        if self.sources is None:
            return None
        if len(self.mistakes) > before:
            wrong = {mistake.place[len(place)] for mistake in self.mistakes[before:] if len(mistake.place) > len(place)}
            sound = {key: value for key, value in fields.items() if key not in wrong}
            if "tokens" in wrong:
                sound["tokens"] = self.sources.tokens(self.data)
            if not without and all(key in sound for key in needed):
                self.more_mistakes(name, sound, rest, place)
            return None
        if without:
            return Quantizer(name, fields)  # type: ignore[return-value]
        return cast("Pass | None", self.made(name, fields, rest, place))

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
        """Held-out texts are as long as the windows that train; without a teacher there is none. Of conversations only
        the assistant's tokens are learned."""
        fields.setdefault("teacher", None)
        names = fields.pop("held_out", None)
        tokens = fields.get("tokens")
        if tokens is None or self.sources is None:
            return
        if names:
            fields["held_out"] = self.sources.texts(names, tokens.shape[1])
        counted = self.sources.answers(tokens)
        if counted is not None:
            fields["token_weights"] = counted

    def fields(self, table: Mapping[str, Any], place: Place, owner: str, known: Mapping[str, Kinds]) -> dict[str, Any]:
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

    def field(self, owner: str, key: str, value: Any, kinds: Kinds, place: Place) -> Any:
        """One value. What has the same name in every pass means the same in every pass."""
        if owner in PASSES and key == "tokens":
            return self.windows(value, place)
        if key in ("reference", "teacher"):
            return self.model(key, value, place)
        if key == "quantizer":
            table = {"name": value} if isinstance(value, str) else value
            return self.step(table, place, without=("spec",))
        if key in ("losses", "hidden") and isinstance(value, str):
            return self.losses(key, value, place)
        return self.converted(value, kinds, place)

    def losses(self, key: str, text: str, place: Place) -> Any:
        """Losses written as text."""
        if self.sources is None:
            return None
        from .losses import parse_hidden, parse_losses

        try:
            return parse_losses(text) if key == "losses" else parse_hidden(text)
        except InputError as error:
            return self.refused(error, place)

    def windows(self, value: Any, place: Place) -> Tensor | None:
        table = {"text": value} if isinstance(value, str) else value
        before = len(self.mistakes)
        if not isinstance(table, Mapping):
            self.wrong(place, shown(value), "a text, or a table such as { samples = 8, seq_len = 512 }")
            return None
        fields = self.fields(table, place, "tokens", FIELDS["Data"])
        if len(self.mistakes) > before:
            return None
        data = self.made("Data", dataclasses.asdict(self.data) | fields, table, place)
        return None if data is None or self.sources is None else self.sources.tokens(data)

    def model(self, key: str, value: Any, place: Place) -> Any:
        """A graph, or for a teacher a cache of one."""
        if key == "teacher" and isinstance(value, Mapping):
            table = self.fields(value, place, "teacher", {"cache": (str,), "of": (str,)})
            if "cache" in table:
                return self.sources and self.sources.teacher(table["cache"], table.get("of"))
            self.wrong(place, shown(value), '{ cache = "FOLDER" }')
        elif not isinstance(value, str):
            self.wrong(place, shown(value), MODEL.accepted)
        elif self.sources is None:
            return None
        elif key == "teacher":
            return self.sources.teacher(value, None)
        else:
            return self.sources.graph(value)
        return None

    # by type

    def converted(self, value: Any, kinds: Kinds, place: Place) -> Any:
        """A plain value as one of the kinds wants it."""
        fitting = [kind for kind in kinds if _fits(value, kind)]
        if not fitting:
            self.wrong(place, shown(value), describe(kinds))
            return None
        kind = fitting[0]
        if isinstance(kind, Kind):
            return self.grid(value, place)
        if isinstance(kind, Table):
            before = len(self.mistakes)
            fields = self.fields(value, place, kind.name, FIELDS[kind.name])
            return None if len(self.mistakes) > before else self.made(kind.name, fields, value, place)
        if isinstance(kind, Listed):
            return tuple(self.converted(item, kind.item, (*place, i)) for i, item in enumerate(value))
        if isinstance(kind, Fixed):
            if len(kind.items) != len(value):
                self.wrong(place, f"{len(value)} values", f"{len(kind.items)}")
                return None
            pairs = enumerate(zip(value, kind.items))
            return tuple(self.converted(item, inner, (*place, i)) for i, (item, inner) in pairs)
        if isinstance(kind, Mapped):
            out = {key: self.converted(item, kind.item, (*place, key)) for key, item in value.items()}
            counts = {key: item for key, item in value.items() if kind.item == (float,) and isinstance(item, int)}
            return out | counts
        return float(value) if kind is float else value

    def grid(self, value: str | Mapping[str, Any], place: Place) -> QuantSpec | None:
        """ "w4g64", or { grid = "w4g64", search = "mse" }: what text alone does not say."""
        table = {"grid": value} if isinstance(value, str) else value
        before = len(self.mistakes)
        fields = self.fields(table, place, "a grid", {"grid": (str,), "search": (str,)})
        if len(self.mistakes) > before or self.sources is None:
            return None
        from ..graph.quant_tensor import QuantSpec

        try:
            spec = QuantSpec.parse(fields.pop("grid"))
            return dataclasses.replace(spec, **fields)
        except InputError as error:
            self.refused(error, place)
            return None

    def refused(self, error: InputError, place: Place) -> None:
        """An error of the library as a mistake at a place."""
        self.mistakes.append(Mistake(place, f"{error.field} {error.found}", error.accepted, error))

    def made(self, name: str, fields: Mapping[str, Any], table: Mapping[str, Any], place: Place) -> Any:
        """An instance of a class, or None with its errors as mistakes at the keys that they speak of."""
        if self.sources is None and name not in WITHOUT_TORCH:
            return None
        if not _required(class_of(name)) <= set(fields):  # one of them had a mistake, which is told already
            return None
        try:
            return class_of(name)(**fields)
        except InputError as error:
            key = _key_of(error, table)
            self.refused(error, place if key is None else (*place, key))
            if key in fields and key not in REQUIRED.get(name, ()):
                self.more_mistakes(
                    name, {field: value for field, value in fields.items() if field != key}, table, place
                )
            return None

    def more_mistakes(self, name: str, fields: Mapping[str, Any], table: Mapping[str, Any], place: Place) -> None:
        """What is wrong with the other values of a table that has a mistake: only errors that speak of one of them,
        for others may come from what is left out."""
        inner = Reader(self.sources, self.data)
        inner.made(name, fields, table, place)
        at = {(*place, key) for key in fields}
        self.mistakes += [mistake for mistake in inner.mistakes if mistake.place in at]


def class_of(name: str) -> Any:
    """The class of a table by its name."""
    if name in WITHOUT_TORCH:
        return WITHOUT_TORCH[name]
    from .classes import CLASSES

    return CLASSES[name]


def describe(kinds: Kinds) -> str:
    """What a field takes, in the words of a recipe."""
    return " or ".join(dict.fromkeys(_described(kind) for kind in kinds))


def _described(kind: Any) -> str:
    if kind in ACCEPTED:
        return ACCEPTED[kind]
    if isinstance(kind, Kind):
        return kind.accepted
    if isinstance(kind, Table):
        return f"a table of {' | '.join(FIELDS[kind.name])}"
    return "a table" if isinstance(kind, Mapped) else "a list"


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == GRID:
        return isinstance(value, str) or (isinstance(value, Mapping) and "grid" in value)
    if isinstance(kind, Table | Mapped):
        return isinstance(value, Mapping)
    return isinstance(kind, Listed | Fixed) and isinstance(value, list | tuple)


def _required(made: type) -> set[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {field.name for field in dataclasses.fields(made) if field.default is field.default_factory is missing}


def _key_of(error: InputError, table: Mapping[str, Any]) -> str | None:
    """The key that an error speaks of: by the name of its field, or else by the value that it quotes."""
    named = error.field.rpartition(".")[2].split(" ")[0]
    if named in table:
        return named
    quoted = [key for key, value in table.items() if error.found in (repr(value), str(value))]
    return quoted[0] if quoted else None

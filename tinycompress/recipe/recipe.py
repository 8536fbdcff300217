"""A recipe: the model, its passes in order with the text they calibrate on, and how the result is written.

    model = "smollm2-135m"

    [data]
    text = "pydoc"
    samples = 32

    [[pass]]
    name = "Prune"
    target = "params=0.8"

    [[pass]]
    name = "GPTQ"
    spec = "w4g64"
    propagate = 0.5

The keys of a pass are the fields of the class of that name. Its windows are those of [data], unless it has `tokens` of
its own; the graph that the recipe starts from is called "model", as a teacher or a reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import load
from ..errors import InputError
from ..graph.graph import Graph, Pass
from .checking import read_tables, steps_of
from .document import Source, override, read_document, to_toml
from .fields import PASSES
from .foretell import Foretold, behind
from .mistakes import Mistake
from .sources import Loaded, StandIns
from .values import Reader
from .vocabulary import MEASURED, Data, Export


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Make one with `Recipe.of` or `read_recipe`.

    Fields:
        document: the recipe as TOML has it.
        model: the name of the model, or None where it is given otherwise.
        format: how a checkpoint is written, one of FORMATS. Default "native".
        data: the windows of passes that name none.
        measure: what the quality is measured on; None: it is not.
        export: how the result is exported; None: it is saved as a checkpoint.
        source: where the document comes from.
    """

    document: Mapping[str, Any]
    model: str | None
    format: str
    data: Data
    measure: Data | None
    export: Export | None
    source: Source = field(default_factory=Source)

    @staticmethod
    def of(document: Mapping[str, Any], source: Source | None = None) -> Recipe:
        """The recipe in a document; a `RecipeError` with all its mistakes. Nothing is loaded."""
        source = source or Source()
        reader = Reader(StandIns(), Data())
        tables = read_tables(document, source, reader)
        measure = document.get("measure", _calibrates(document))
        measured = tables.get("measure", MEASURED if measure else None)
        name = document.get("model")
        layout = document.get("format", "native")
        export = tables.get("export")
        return Recipe(document, name, layout, reader.data, measured, export, source)

    def toml(self) -> str:
        """The recipe as text, which reads back as the same recipe."""
        return to_toml(self.document)

    def sources(
        self, graph: Graph, open: Callable[[str], Graph] = load, device: torch.device | str | None = None
    ) -> Loaded:
        """The texts and models behind the names of the recipe, for `graph`; they are read when they are asked for.

        open: opens a model by name. device: where windows lie, so that the work is done there.
        """
        longest = max(step.graph.config.max_position for step in [Foretold("", graph), *self.foretell(graph)])
        return Loaded(graph, longest, open, device)

    def passes(self, graph: Graph, sources: Loaded | None = None, tokens: Tensor | None = None) -> list[Pass]:
        """The passes for `graph`, with texts read and models opened.

        sources: where they come from. Default: `sources(graph)`. tokens: windows [N, T] that stand for those of every
        text. An `InputError` for texts and models that cannot be had.
        """
        sources = sources or self.sources(graph)
        if tokens is not None:
            sources = dataclasses.replace(sources, instead=tokens)
        return self._made(Reader(sources, self.data))

    def foretell(self, graph: Graph) -> list[Foretold]:
        """What every pass will make of the shapes and grids of `graph`; an `InputError` for what cannot work. Reads no
        weight and no text."""
        out: list[Foretold] = []
        for i, step in enumerate(self.stand_ins(graph)):
            try:
                out.append(behind(step, out[-1].graph if out else graph))
            except InputError as error:
                found = f"{error.field} {error.found}"
                self.source.refuse([Mistake(("pass", i), found, error.accepted, error)])
        return out

    def stand_ins(self, graph: Graph) -> list[Pass]:
        """The passes on tokens and models that only have their form: to ask what they will do, not to run."""
        return self._made(Reader(StandIns(graph.config.max_position), self.data))

    def _made(self, reader: Reader) -> list[Pass]:
        made = [reader.step(step, ("pass", i)) for i, step in enumerate(steps_of(self.document))]
        self.source.refuse(reader.mistakes)
        return [step for step in made if step is not None]


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `settings` such as "GPTQ.damping=0.05" put into it; an `InputError` with all
    mistakes, their lines and the nearest right names. Nothing is loaded."""
    document, source = read_document(path)
    return Recipe.of(*override(document, settings, source))


def _calibrates(document: Mapping[str, Any]) -> bool:
    """Whether a pass reads text."""
    return any("tokens" in PASSES[step["name"]] for step in steps_of(document))

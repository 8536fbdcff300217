"""Writing an export, for `export` and for recipes that end in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .arguments import read_tokens

if TYPE_CHECKING:
    from ..files import Claim
    from ..graph.graph import Graph
    from ..recipe.vocabulary import Export


def write_export(graph: Graph, output: Claim, choices: Export, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Exports a graph as `choices` say, and returns the manifest."""
    from tinycompress.export import StaticChoices
    from tinycompress.export import export as write

    text = read_tokens(graph, choices.calibration, 8, None, 512, "train") if choices.calibration else None
    static = StaticChoices(None, text, choices.ranges, choices.epcontext, choices.attention_bits, choices.rotate)
    return write(
        graph,
        output,
        profile=choices.profile,
        dtype=choices.dtype,
        scales=choices.scales,
        accuracy_level=choices.accuracy_level,
        kv=choices.kv,
        calibration=text,
        check=choices.check,
        context=choices.context,
        static=static,
        mobile=choices.mobile,
        provenance=provenance,
    )


def gate_lines(manifest: Mapping[str, Any]) -> list[str]:
    """What the gate of an export measured, in lines; that it did not run, where it did not."""
    from tinycompress.export import summary

    if manifest["checks"]:
        return summary(manifest["checks"])
    return ["not checked: no gate was run (tinycompress verify OUT runs it)"]

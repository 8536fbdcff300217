"""The model card of an export: how it was made, and what the gate measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinycompress.files import write_text
from tinycompress.graph.graph import Graph
from tinycompress.provenance import CARD, card


def write_card(work: Path, manifest: Mapping[str, Any], graph: Graph) -> None:
    """Writes the card into the folder of an export, if its manifest says how the model was made. The manifest does not
    list it: it is for its owner to edit."""
    if manifest["provenance"]:
        write_text(work / CARD, card(manifest["provenance"], graph, _figures(manifest["checks"])))


def _figures(report: Mapping[str, Any] | None) -> dict[str, str]:
    """What each check of the gate found, by its name."""
    checks = report["checks"] if report else []
    return {f"{check['check']}, {check['about']}": f"{check['figure']:.4g}" for check in checks}

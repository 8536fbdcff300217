"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TEXTS = (
    "pydoc (Python's own documentation, no download), wikitext2, a .txt, .json, .jsonl or .parquet file, or a hub name"
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder (checkpoint or export), a .gguf file, a hub name, or smollm2-135m."),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="The folder to write. It appears when all is done, or not at all."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="A folder, a .gguf file, a hub name, or smollm2-135m.")]
TrainingText = Annotated[str, typer.Option(metavar="PATH-OR-NAME", help=f"Training text: {TEXTS}.")]

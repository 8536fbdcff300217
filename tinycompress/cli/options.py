"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

TEXTS = (
    "pydoc (Python's own documentation, no download), wikitext2, a .txt, .json, .jsonl or .parquet file, or a hub name"
)


def text_option(use: str, default: str = "") -> Any:
    """An option for a text, by what it is used for; `default` is shown where the option's own default is None."""
    shown = f"  [default: {default}]" if default else ""
    return typer.Option(metavar="PATH-OR-NAME", help=f"{use}: {TEXTS}.{shown}")


def window_option(default: int) -> Any:
    """An option for the tokens of a window."""
    return typer.Option(
        metavar="TOKENS", help=f"Tokens per window.  [default: {default}, or the model's context if that is shorter]"
    )


def count_option(help: str, at_least: int = 1) -> Any:
    """An option for a whole number of things."""
    return typer.Option(min=at_least, help=help)


def folder_option(help: str) -> Any:
    """An option for a folder."""
    return typer.Option(metavar="FOLDER", help=help)


def grid_option(help: str, example: str = "w4g64") -> Any:
    """An option for the bits and the group size of quantized weights."""
    return typer.Option(metavar=example, help=help)


A_MODEL: Any = typer.Argument(
    metavar="MODEL", help="A folder (checkpoint or export), a .gguf file, a hub name, or smollm2-135m."
)
AN_OUTPUT: Any = typer.Option(
    "-o", "--output", metavar="OUT", help="The folder to write. It appears when all is done, or not at all."
)
Model = Annotated[str, A_MODEL]
OptionalModel = Annotated[str | None, A_MODEL]  # a recipe may name it
Out = Annotated[Path, AN_OUTPUT]
OptionalOut = Annotated[Path | None, AN_OUTPUT]  # a dry run writes nothing
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="A folder, a .gguf file, a hub name, or smollm2-135m.")]
TrainingText = Annotated[str, text_option("Training text")]

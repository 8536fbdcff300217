"""`tinycompress verify`: the gate of an export, run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .terminal import print_json


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `tinycompress export` wrote.")],
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Check in this runtime instead, in an environment of its own (export/runtimes/NAME; "
            "`make runtime NAME=...` makes it).",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the parity gate on an exported folder again: its runtime against the torch graph. Exit code 1 if it fails.

    \b
    Examples:
      tinycompress verify small-onnx
      tinycompress verify small-onnx --json
      tinycompress verify small-onnx --runtime onnxruntime-genai
    """
    from tinycompress.export import GateError, summary
    from tinycompress.export import verify as check

    if runtime:
        return _verify_in(folder, runtime, as_json)
    result = check(folder)
    if as_json:
        print_json(result)
    else:
        print("\n".join(summary(result)))
    if not result["passed"]:
        raise GateError(result)


def _verify_in(folder: Path, name: str, as_json: bool) -> None:
    """The check of another runtime, in its own environment; exit code 1 if it fails."""
    from tinycompress.export import read, run_check
    from tinycompress.export.read import read_manifest

    result = run_check(name, folder, read(folder), read_manifest(folder)["profile"])
    if as_json:
        print_json(result)
    else:
        print(f"{name} {result.get('versions', {})}")
        for key, value in result["figures"].items():
            print(f"  {key:24} {value if isinstance(value, str) else format(value, '.3g')}")
        print("passed" if result["passed"] else "failed: " + "; ".join(result["failures"]))
    if not result["passed"]:
        raise typer.Exit(1)

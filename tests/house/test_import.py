"""Importing the package costs what importing torch costs: nothing heavy comes along."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torchao",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "datasets",
    "transformers",
    "matplotlib",
    "gguf",
    "typer",
    "rich",
    "huggingface_hub",
)


def imported(statement: str, names: tuple[str, ...]) -> list[str]:
    code = f"import sys; {statement}; print(*(name for name in {names!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    ["import tinycompress", "import tinycompress.graph.graph, tinycompress.model.transformer, tinycompress.pipeline"],
)
def test_the_library_imports_nothing_heavy(statement: str) -> None:
    assert imported(statement, HEAVY) == []


def test_the_command_line_imports_no_runtime() -> None:
    assert (
        imported("import tinycompress.cli.main", tuple(name for name in HEAVY if name not in ("typer", "rich"))) == []
    )


def test_the_library_does_not_import_its_own_export() -> None:
    assert imported("import tinycompress, tinycompress.pipeline, tinycompress.cli.main", ("tinycompress.export",)) == []

"""Importing the package costs what importing torch costs: nothing heavy comes along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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
    [
        "from tinycompress import *",
        "import tinycompress.graph.graph, tinycompress.model.transformer, tinycompress.pipeline",
    ],
)
def test_the_library_imports_nothing_heavy(statement: str) -> None:
    assert imported(statement, HEAVY) == []


def test_the_command_line_imports_no_runtime_and_not_even_torch() -> None:
    names = ("torch", "numpy", *(name for name in HEAVY if name not in ("typer", "rich")))
    assert imported("import tinycompress, tinycompress.cli.main", names) == []


def test_every_public_name_is_found_in_the_module_that_the_package_says() -> None:
    import tinycompress

    assert set(tinycompress.HOMES) == set(tinycompress.__all__)
    assert all(getattr(tinycompress, name) is not None for name in tinycompress.__all__)
    source = Path(tinycompress.__file__).read_text(encoding="utf-8")
    (checked,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    for line in checked.body:
        assert isinstance(line, ast.ImportFrom)
        assert tinycompress.MODULES[line.module or ""].split() == sorted(name.name for name in line.names)


def test_the_library_does_not_import_its_own_export() -> None:
    assert imported("import tinycompress, tinycompress.pipeline, tinycompress.cli.main", ("tinycompress.export",)) == []

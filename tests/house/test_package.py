"""What an installed package holds, and what it says where an optional package is not installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tinycompress.errors import MissingExtra, need

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
CHECKS = "export/runtimes"


def folders(name: str) -> list[Path]:
    """The folders below `name` that are packages, without the environments that `make runtime` installs."""
    paths = [path.parent.relative_to(ROOT) for path in sorted((ROOT / name).rglob("__init__.py"))]
    return [path for path in paths if not path.as_posix().startswith(CHECKS)]


def test_every_package_is_listed_and_mapped() -> None:
    library = {".".join(folder.parts) for folder in folders("tinycompress")}
    export = {".".join(("tinycompress", *folder.parts)): folder.as_posix() for folder in folders("export")}
    assert set(SETUPTOOLS["packages"]) == library | set(export)
    assert SETUPTOOLS["package-dir"] == export


def test_every_module_lies_in_a_package() -> None:
    packages = {*folders("tinycompress"), *folders("export")}
    modules = [path.relative_to(ROOT) for name in ("tinycompress", "export") for path in (ROOT / name).rglob("*.py")]
    assert [str(m) for m in modules if m.parent not in packages and not m.as_posix().startswith(CHECKS)] == []


def test_every_file_of_the_runtimes_is_package_data() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", CHECKS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    patterns = SETUPTOOLS["package-data"]["tinycompress.export"]
    names = [name.removeprefix("export/") for name in listed.stdout.split()]
    assert names
    missing = [name for name in names if not any(_matches(name, pattern) for pattern in patterns)]
    assert missing == []


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob of package data takes a file: a * stays within one folder."""
    parts, globs = name.split("/"), pattern.split("/")
    return len(parts) == len(globs) and all(map(fnmatch, parts, globs))


def test_the_package_is_typed() -> None:
    assert (ROOT / "tinycompress" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["tinycompress"]


def test_need_gives_the_module() -> None:
    assert need("json", "export") is importlib.import_module("json")


@pytest.mark.parametrize(
    ("package", "extra", "source"),
    [("nowhere", "export", "tinycompress[export]"), ("nowhere.inside", None, "nowhere.inside")],
)
def test_a_missing_package_is_one_line_that_says_how_to_install_it(
    package: str, extra: str | None, source: str
) -> None:
    with pytest.raises(MissingExtra) as raised:
        need(package, extra)
    assert str(raised.value) == f"{package} is not installed; install it with: pip install '{source}'"
    assert isinstance(raised.value, ImportError)


def test_a_package_that_fails_inside_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nowhere") as raised:
        need("broken_package", "export")
    assert not isinstance(raised.value, MissingExtra)


def test_every_extra_that_is_named_exists() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"export", "hf", "plot", "quantize", "train"} <= set(extras)


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx_ir", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_onnx")
def test_the_command_line_names_the_extra(tmp_path: Path) -> None:
    import torch

    from tinycompress import Config, Graph, Layer, save, shapes
    from tinycompress.cli.main import app
    from tinycompress.graph.graph import Weights

    config = Config(vocab_size=32, hidden_size=32, head_dim=16, layers=(Layer(2, 1, 32),), max_position=32)
    save(Graph(config, Weights({name: torch.ones(shape) for name, shape in shapes(config).items()})), tmp_path / "tiny")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "tiny"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert line == "error: onnx_ir is not installed; install it with: pip install 'tinycompress[export]'"


def draw_widths(path: Path) -> None:
    from tinycompress.graph.presets import SMOLLM2_135M
    from tinycompress.pruning.plot import draw_widths

    draw_widths(path, SMOLLM2_135M, SMOLLM2_135M, {})


def heat_map(path: Path) -> None:
    from tinycompress.evaluation.passkey import heat_map

    heat_map({}, path)


def from_torchao(path: Path) -> None:
    from tinycompress.quantization.torchao import from_torchao

    from_torchao(None)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("matplotlib", "plot", draw_widths),
        ("matplotlib", "plot", heat_map),
        ("torchao", "quantize", from_torchao),
    ],
)
def test_the_library_names_the_extra(
    package: str, extra: str, use: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed; .*'tinycompress\[{extra}\]'"):
        use(tmp_path / "figure.png")


def test_everything_imports_without_the_module_resource() -> None:
    """Windows has neither `resource` nor `fcntl`."""
    names = [name for name in SETUPTOOLS["packages"] if name != "tinycompress.cli"]
    code = f"""
import sys
sys.modules["resource"] = sys.modules["fcntl"] = None
import importlib, pathlib, pkgutil
for package in {names!r}:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from tinycompress.distillation.training_log import peak_memory_mb
import torch
assert peak_memory_mb(torch.device("cpu")) >= 0
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment() -> None:
    """Builds and uses the wheel, with the packages of this environment in place of a download."""
    import torch

    packages = str(Path(torch.__file__).parents[1])
    environment = {**os.environ, "PYTHON": sys.executable, "TINYCOMPRESS_WHEEL_PACKAGES": packages}
    run = subprocess.run([ROOT / ".ci" / "wheel"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]

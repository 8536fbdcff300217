"""The `.ort` file of ONNX Runtime's reduced mobile builds, and the list of operators such a build must hold.

A build made with `--include_ops_by_config model.required_operators.config --minimal_build` opens model.ort and little
else: the package shrinks to the kernels that this model runs. The file holds its weights, so it ends at 2 GB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinycompress.errors import InputError

from .quiet import quiet_environment

LARGEST = (1 << 31) - 1  # bytes of a flatbuffer
FILES = ("model.ort", "model.required_operators.config")


def write_ort(model: str | Path, folder: str | Path) -> list[Path]:
    """Converts an ONNX file into `folder`: model.ort and model.required_operators.config, both or neither."""
    model = Path(model)
    folder = Path(folder)
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    if size > LARGEST:
        raise InputError("model for mobile", f"{size:,} bytes", f"at most {LARGEST:,}: an .ort file holds its weights")
    with tempfile.TemporaryDirectory(prefix="tinycompress-", dir=folder) as work:
        command = [
            sys.executable,
            "-m",
            "onnxruntime.tools.convert_onnx_models_to_ort",
            str(model),
            "--output_dir",
            work,
        ]
        command += ["--optimization_style", "Fixed"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet_environment())
        made = [
            Path(work) / model.with_suffix(Path(name).suffix).name if name.endswith(".ort") else _config(Path(work))
            for name in FILES
        ]
        if done.returncode or not all(path is not None and path.is_file() for path in made):
            words = (done.stderr or done.stdout).strip().splitlines() or ["no words"]
            raise InputError("conversion to .ort", words[-1], "a model that onnxruntime's converter takes")
        return [Path(shutil.move(str(path), folder / name)) for path, name in zip(made, FILES)]


def _config(work: Path) -> Path | None:
    return next(work.glob("*required_operators*.config"), None)

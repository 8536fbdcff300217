"""An exported folder as `.ort`: converted, then run from the one file that a reduced mobile build opens.

    python check.py FOLDER … [--json FILE]

The conversion is that of tinycompress.export.mobile; the operator list it makes must name every operator of the graph.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Reference, figures, is_exact, judge, main  # noqa: E402


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(folder / manifest["model"])]
        subprocess.run([*tool, "--output_dir", work, "--optimization_style", "Fixed"], capture_output=True, check=True)
        made = next(Path(work).glob("*.ort"))
        operators = next(Path(work).glob("*.config")).read_text()
        session = stepper(made)
        found: dict[str, Any] = figures(reference, session.logits(reference))
        listed = sum(
            line.count(",") + 1 for line in operators.splitlines() if line and not line.startswith("#") and ";" in line
        )
        return found | {"ort_mb": made.stat().st_size / 1e6, "operators": str(listed)}, judge(
            reference, found, is_exact(folder)
        )


def stepper(path: Path) -> Any:
    """The plain loop of the onnxruntime check; it reads names and shapes from the model, whatever its format."""
    spec = importlib.util.spec_from_file_location("onnxruntime_check", HERE.parent / "onnxruntime" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Stepper(path)


if __name__ == "__main__":
    main("ort-mobile", lambda: {"onnxruntime": ort.__version__}, check)

"""prefill.onnx and decode.onnx compiled for Qualcomm's HTP: one EPContext model each, with no compiler on the device.

Standalone on purpose: the compiler comes with onnxruntime-qnn, whose onnxruntime need not be this environment's. So
`compile_graphs` starts one process a graph, with the Python that TINYCOMPRESS_QNN_PYTHON names, or runtimes/qnn's, or
this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SOCS = {"73": "0", "75": "57", "79": "69", "81": "0"}  # HTP architecture: a chip that has it (0: the compiler's choice)
GRAPHS = ("prefill", "decode")
PYTHON = "TINYCOMPRESS_QNN_PYTHON"
OURS = Path(__file__).parents[1] / "runtimes" / "qnn" / ".venv" / "bin" / "python"
NEEDED = "onnxruntime-qnn >= 2.7: `make runtime NAME=qnn`, or TINYCOMPRESS_QNN_PYTHON naming a Python that has it"


def check(arch: str, profile: str) -> None:
    """An `InputError` for an architecture, profile or environment that cannot compile: before any work."""
    from tinycompress.errors import InputError

    if profile != "qnn":
        raise InputError("epcontext", f"with the {profile} profile", "the qnn profile")
    if arch not in SOCS:
        raise InputError("epcontext", repr(arch), f"an HTP architecture: {' | '.join(SOCS)}")
    found = _python("-c", "import onnxruntime_qnn")
    if found.returncode:
        raise InputError("epcontext", f"no onnxruntime_qnn for {python()}", NEEDED)


def compile_graphs(folder: Path, arch: str) -> dict[str, Any]:
    """Writes {graph}.htp{arch}.onnx, its context binary inside, for both graphs. An `InputError` with the compiler's
    words."""
    from tinycompress.errors import InputError

    out: dict[str, Any] = {"htp_arch": arch, "graphs": {}}
    for graph in GRAPHS:
        target = f"{graph}.htp{arch}.onnx"
        done = _python(__file__, str(folder / f"{graph}.onnx"), str(folder / target), arch)
        if done.returncode:
            raise InputError(
                f"compiling {graph}.onnx for HTP {arch}",
                done.stderr.strip()[-500:],
                "a graph that the HTP compiler takes",
            )
        out["graphs"][graph] = {"file": target} | json.loads(done.stdout.strip().splitlines()[-1])
    return out


def python() -> str:
    return os.environ.get(PYTHON) or str(OURS if OURS.is_file() else sys.executable)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}  # as quiet.py, which is not imported: standalone
        return subprocess.run([python(), *arguments], capture_output=True, text=True, check=False, env=environment)
    except OSError as error:  # no such interpreter
        return subprocess.CompletedProcess(arguments, 127, "", str(error))


def session(source: Path, arch: str = "75", target: Path | None = None) -> Any:
    """A graph on HTP (its emulator on x86), the CPU fallback off; with `target` its compiled form is written there."""
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    name = qnn.get_ep_name()
    if not any(d.ep_name == name for d in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if target is not None:
        for key, value in (("enable", "1"), ("file_path", str(target)), ("embed_mode", "1")):
            options.add_session_config_entry(f"ep.context_{key}", value)
    library = Path(qnn.get_library_path()).with_name("libQnnHtp.so")
    provider = {
        "backend_path": str(library),
        "htp_arch": arch,
        "soc_model": SOCS[arch],
        "enable_block_quant_weight_optimization": "1",
    }
    options.add_provider_for_devices(devices[:1], provider)
    return ort.InferenceSession(str(source), sess_options=options)


def main(source: str, target: str, arch: str) -> None:
    session(Path(source), arch, Path(target))
    print(json.dumps({"bytes": Path(target).stat().st_size}))


if __name__ == "__main__":
    main(*sys.argv[1:])

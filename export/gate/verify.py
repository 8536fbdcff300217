"""The gate: does the exported model still say what the graph says?

  files            every file is byte for byte what was exported
  fingerprint      the folder read back is the graph that was exported, bit for bit
  tables           the rotary tables in the file are the config's, at every position
  prefill          level 0: logits of one window                                     max |torch - exported|
  decode           level 0: token by token behind a prompt, every step, against torch with and without a cache
  turns            level 0: a conversation, prompts and steps in turn behind the cache that is kept
  padding          level 0: two prompts of different lengths in one batch, the shorter padded on the right, and steps
  left_padding     level 0: the same, padded on the left, as transformers does
  beyond_context   level 0: steps across the original context, where RoPE scaling must have arrived in the file
  end_of_context   level 0: the last positions the file's tables hold
  kv_cache         as shipped, an int8 cache only: mean KL(torch ‖ exported) of steps behind a prompt; limit as kl's
  kl, flips        as shipped: mean KL(torch ‖ exported) a token in nats; share of positions with another top token
  perplexity       as shipped: |perplexity of exported / perplexity of torch - 1|
  openvino         where the profile is for it: what its check of export/runtimes found, in an environment of its own

Level 0 is the runtime's float arithmetic and a float cache: it isolates mistakes of the export from what int8
activations and an int8 cache cost, which the shipped form shows; checks.py has how each figure is measured. Every check
is "at most its limit"; NaN fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycompress import files
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.graph.config import Config
from tinycompress.graph.graph import Graph
from tinycompress.model.generation import check_ids
from tinycompress.progress import tqdm

from ..dynamic.emit import attention_layers, prepare, shortened
from ..dynamic.session import OrtModel
from ..profiles import profile_of
from ..read import MANIFEST, read, read_manifest
from ..static.forms import make_ready
from ..static.model import StaticModel
from .checks import Shipped, cached, exact_checks, far, shipped, tables
from .reference import POSITIONS, WINDOWS, fitting
from .runtime import installed, run_check, text_of

LARGEST_DENSE = 1 << 33  # bytes up to which torch runs packed weights unpacked: the same numbers, many times as fast
AS_SHIPPED = {"kl", "flips", "perplexity"}  # checks of the arithmetic that the runtime uses by itself
PEAK = 10.0  # logits up to which limits of level 0 hold as they are; beyond, float32 rounding grows with the logits
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime")


class GateError(RuntimeError):
    """An export that disagrees with its graph; `report` is what was measured."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        failed = [check for check in report["checks"] if not check["passed"]]
        said = "the exported model failed: " + "; ".join(map(_failure, failed))
        if report.get("accuracy_level") and failed and {check["check"] for check in failed} <= AS_SHIPPED:
            cache = " or the int8 cache" if any(check["check"] == "kv_cache" for check in report["checks"]) else ""
            said += f". Int8 activations{cache} cost this: accuracy level 0 computes in float (slower); "
            said += "narrower groups lose less"
        super().__init__(said)


def _failure(check: Mapping[str, Any]) -> str:
    """A count (changed files, what a runtime found wrong) says little without what was counted."""
    about = f" ({check['about']})" if isinstance(check["figure"], int) else ""
    return f"{check['check']} {_show(check['figure'])}, limit {_show(check['limit'])}{about}"


def verify(
    folder: str | Path,
    graph: Graph | None = None,
    *,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    windows: int = WINDOWS,
    seq_len: int = POSITIONS,
    progress: bool = True,
    hashes: bool = True,
) -> dict[str, Any]:
    """Checks an exported folder against `graph`, or (None) against the graph that the folder itself holds.

    `tokens` [windows, seq_len] is the text; by default it is the "pydoc" test split, or, without a tokenizer, random
    ids (the report says which). `limits` override the profile's. The report holds only checks that ran; when files were
    changed no other does. Without `hashes` files are not read for theirs: `export` has just written them.
    """
    report = _report(folder, limits)
    if hashes and not _same_files(report, folder, progress):
        return _finish(report)
    manifest = read_manifest(folder)
    stored = read(folder)
    limit = report["limits"]
    same = stored.fingerprint() == manifest["fingerprint"]
    _record(report, "fingerprint", 0 if same else 1, 0, "the folder read back against the graph as exported")
    if any(stored.config.layers[i].rope for i in attention_layers(stored.config)):
        _record(
            report,
            "tables",
            tables(folder, stored.config),
            limit["tables"],
            f"cos and sin of {stored.config.max_position} positions",
        )
    expected = _prepared(graph, manifest) if graph else stored
    fits = 4 * expected.config.n_params <= LARGEST_DENSE
    torch_model = (expected.dense(torch.float32) if fits else expected).module()
    ids, report["text"] = _text(stored.config, stored.tokenizer, tokens, windows, seq_len)

    bar = tqdm(total=5 + len(far(stored.config)) + len(ids), desc="verify", unit="step", delay=2, disable=not progress)
    with torch.inference_mode(), bar:
        exact = _open(folder, manifest, exact=True)
        for check, compare in exact_checks(exact, torch_model, ids[:1]).items():
            figure, peak, about = compare()
            _record(report, check, figure, limit[check] * max(1.0, peak / PEAK), f"{about}, logits up to {peak:.3g}")
            bar.update()
        del exact
        exported = _open(folder, manifest, exact=False)
        if manifest.get("kv"):
            _record(report, "kv_cache", *cached(exported, torch_model, ids[:1], limit["kl"]))
        _as_shipped(report, shipped(exported, torch_model, ids, bar))
        del exported
    profile = profile_of(manifest["profile"])
    runtime = profile.runtime
    optional = profile.form == "static"
    if optional and not installed(runtime):
        report["not_run"] = [f"{runtime}: not installed (make runtime NAME={runtime})"]
    elif runtime != "onnxruntime":
        _in_runtime(report, runtime, folder, expected, ids, progress)
    return _finish(report)


def pass_gate(work: Path, manifest: dict[str, Any], **options: Any) -> None:
    """Verifies files just written and puts the report into their manifest; a `GateError` if a check fails."""
    report = verify(work, hashes=False, **options)
    manifest["checks"] = report
    if not report["passed"]:
        raise GateError(report)
    files.write_json(work / MANIFEST, manifest)


def _in_runtime(
    report: dict[str, Any], runtime: str, folder: str | Path, graph: Graph, ids: Tensor, progress: bool
) -> None:
    """The check of the runtime that the profile is for: what it wrote, as one check."""
    windows, positions = text_of(runtime)
    ids = ids[:windows, :positions]
    ids = ids[: fitting(len(ids), ids.shape[1], graph.config.vocab_size)]
    result = run_check(runtime, folder, graph, report["profile"], ids, progress=progress)
    report["versions"] |= result.get("versions", {})
    report[runtime] = result["figures"]
    figures = ", ".join(f"{name} {_show(value)}" for name, value in result["figures"].items())
    _record(report, runtime, len(result["failures"]), 0, "; ".join(result["failures"]) or figures)


def _prepared(graph: Graph, manifest: Mapping[str, Any]) -> Graph:
    """The graph as it was exported."""
    profile = profile_of(manifest["profile"])
    dtype = manifest.get("dtype", "auto")
    if profile.form == "static":
        return make_ready(graph, profile, dtype, manifest["config"]["max_position"])
    held = shortened(graph, manifest["config"]["max_position"])
    return prepare(held, dtype, manifest.get("scales", "float32"))


def _open(folder: str | Path, manifest: Mapping[str, Any], exact: bool) -> Any:
    """The exported model as shipped, or `exact`, with float arithmetic."""
    if profile_of(manifest["profile"]).form == "static":
        return StaticModel(folder, exact=exact, spin=False)
    return OrtModel(folder, accuracy_level=0 if exact else None, spin=False, float_cache=exact)


def _same_files(report: dict[str, Any], folder: str | Path, progress: bool) -> bool:
    """Whether every file is the one that was exported, recorded as a check."""
    wrong = changed_files(folder, progress)
    about = f"changed or missing: {', '.join(wrong)}" if wrong else "SHA-256 of every file"
    _record(report, "files", len(wrong), 0, about)
    return not wrong


def changed_files(folder: str | Path, progress: bool = True) -> list[str]:
    """Files of the manifest that are missing or have other bytes."""
    entries = read_manifest(folder)["files"]
    bar = tqdm(entries.items(), desc="hashing", unit="file", delay=2, disable=not progress)
    return files.changed_files(Path(folder), bar)


def summary(report: Mapping[str, Any]) -> list[str]:
    """The report in lines of plain text."""
    out = [
        f"profile {report['profile']}, accuracy level {report['accuracy_level']}"
        + (f", on {report['text']}" if "text" in report else "")
    ]
    for c in report["checks"]:
        verdict = "ok" if c["passed"] else "FAILED"
        figure = f"{_show(c['figure']):>9}  limit {_show(c['limit']):>7}"
        out.append(f"{verdict:6} {c['check']:15} {figure}  {c['about']}")
    not_run = report.get("not_run", ())
    out += [f"not run {words}" for words in not_run]
    passed = f"passed, apart from {len(not_run)} not run" if not_run else "passed"
    out.append(passed if report["passed"] else "failed")
    return out


def _text(
    config: Config, tokenizer: Tokenizer | None, tokens: Tensor | None, windows: int, seq_len: int
) -> tuple[Tensor, str]:
    """Windows of ids and what they are."""
    if tokens is not None:
        if tokens.dim() != 2 or min(tokens.shape[0], tokens.shape[1] - 1) < 1:
            raise InputError("verification tokens", tuple(tokens.shape), "[windows, seq_len], windows of at least 2")
        ids = tokens.long()
        source = "the given tokens"
    else:
        seq_len = min(seq_len, config.max_position)
        if tokenizer is not None:
            from tinycompress.calibration.data import tokens as read_tokens

            ids = read_tokens("pydoc", tokenizer, windows, seq_len, split="test")
            source = "pydoc (test)"
        else:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(config.vocab_size, (windows, seq_len), generator=generator)
            source = "random ids: no tokenizer"
    check_ids(ids, config.vocab_size)
    return ids, f"{len(ids)} × {ids.shape[1]} tokens, {source}"


# The report ---------------------------------------------------------------------------------------------------------


def _report(folder: str | Path, limits: Mapping[str, float] | None) -> dict[str, Any]:
    manifest = read_manifest(folder)
    known = profile_of(manifest["profile"]).limits
    if unknown := set(limits or {}) - set(known):
        raise InputError("limits", sorted(unknown), " | ".join(known))
    return {
        "passed": False,
        "profile": manifest["profile"],
        "accuracy_level": manifest.get("accuracy_level"),
        "limits": {**known, **(limits or {})},
        "checks": [],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _record(report: dict[str, Any], check: str, figure: float, limit: float, about: str) -> None:
    report["checks"].append(
        {"check": check, "figure": figure, "limit": limit, "passed": figure <= limit, "about": about}
    )


def _as_shipped(report: dict[str, Any], measured: Shipped) -> None:
    in_torch, as_exported = measured.perplexity
    report["perplexity"] = {"torch": in_torch, "exported": as_exported}
    limit = report["limits"]
    _record(report, "kl", measured.kl, limit["kl"], f"nats a token over {measured.count} tokens")
    _record(
        report,
        "flips",
        measured.flips / measured.count,
        limit["flips"],
        f"{measured.flips} of {measured.count} top tokens differ",
    )
    _record(
        report,
        "perplexity",
        abs(as_exported / in_torch - 1),
        limit["perplexity"],
        f"{in_torch:.4g} in torch, {as_exported:.4g} exported",
    )


def _finish(report: dict[str, Any]) -> dict[str, Any]:
    report.pop("limits")
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def _show(figure: float | str) -> str:
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)

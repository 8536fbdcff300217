"""The gate: does the exported model still say what the graph says?

  files            every file is byte for byte what was exported
  fingerprint      the folder read back is the graph that was exported, bit for bit
  tables           the rotary tables in the file are the config's, at every position
  prefill          level 0: logits of one window                                     max |torch - exported|
  decode           level 0: token by token behind a prompt, every step, against torch with and without a cache
  padding          level 0: two prompts of different lengths in one batch, the shorter padded on the right, and steps
  beyond_context   level 0: steps across the original context, where RoPE scaling must have arrived in the file
  end_of_context   level 0: the last positions the file's tables hold
  kv_cache         as shipped, an int8 cache only: mean KL(torch ‖ exported) of steps behind a prompt; the limit is that of kl
  kl, flips        as shipped: mean KL(torch ‖ exported) a token in nats; share of positions with another top token
  perplexity       as shipped: |perplexity of exported / perplexity of torch - 1|
  openvino         where the profile is for it: what its check of export/runtimes found, in an environment of its own

Level 0 is the runtime's float arithmetic and a float cache: it isolates mistakes of the export from what int8
activations and an int8 cache cost, which the shipped form shows. Far positions are reached without computing everything
before them: both runtimes get the same past in their caches and decode from there. That past is real text, its keys
turned to where they now stand: a random one drives a model where float32 itself is off by 1e-2 (SmolLM2 in torch,
against float64). Every check is "at most its limit"; NaN fails.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tinycompress.config import Config
from tinycompress.decode import check_ids
from tinycompress.elementwise import rotate
from tinycompress.errors import InputError
from tinycompress.files import inside
from tinycompress.graph import Graph
from tinycompress.model import Transformer
from tinycompress.tokenizer import Tokenizer

from .attention import frequencies, unrotated_keys
from .emit import attention_layers, prepare
from .profiles import profile_of
from .read import initializers, read, read_manifest
from .runtime import installed, run_check
from .session import OrtModel
from .static_forms import make_ready
from .static_model import StaticModel

PROMPT, STEPS = 8, 16  # of the decode check
FAR_STEPS, TILE = 8, 64  # decoded behind a past of repeated text, and that text's length
LARGEST_PAST = 1 << 27  # bytes a runtime: a longer cache is not worth the last positions, whose tables are compared anyway
LARGEST_DENSE = 1 << 33  # bytes up to which torch runs packed weights unpacked: the same numbers, many times as fast
PEAK = 10.0  # logits up to which limits of level 0 hold as they are; beyond, float32 rounding grows with the logits
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime")


class GateError(RuntimeError):
    """An export that disagrees with its graph; `report` is what was measured."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        failed = [check for check in report["checks"] if not check["passed"]]
        super().__init__("the exported model failed: " + "; ".join(f"{c['check']} {_show(c['figure'])}, limit {_show(c['limit'])}" for c in failed))


def verify(
    folder: str | Path,
    graph: Graph | None = None,
    *,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    windows: int = 8,
    seq_len: int = 512,
    progress: bool = True,
) -> dict[str, Any]:
    """Checks an exported folder against `graph`, or (None) against the graph that the folder itself holds.

    `tokens` [windows, seq_len] is the text; by default it is the "pydoc" test split, or, without a tokenizer, random ids
    (the report says which). `limits` override the profile's. The report holds only checks that ran; when files were
    changed no other does.
    """
    wrong = changed_files(folder, progress)
    report = _report(folder, limits)
    _record(report, "files", len(wrong), 0, f"changed or missing: {', '.join(wrong)}" if wrong else "SHA-256 of every file")
    if wrong:
        return _finish(report)
    return gate(folder, graph, tokens=tokens, limits=limits, windows=windows, seq_len=seq_len, progress=progress, report=report)


def gate(
    folder: str | Path,
    graph: Graph | None = None,
    *,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    windows: int = 8,
    seq_len: int = 512,
    progress: bool = True,
    report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`verify` without reading every file for its hash: what `export` runs on files it has just written."""
    manifest = read_manifest(folder)
    report = report or _report(folder, limits)
    stored, limit = read(folder), report["limits"]
    same = stored.fingerprint() == manifest["fingerprint"]
    _record(report, "fingerprint", 0 if same else 1, 0, "the folder read back against the graph as exported")
    if attention_layers(stored.config):
        _record(report, "tables", _tables(folder, stored.config), limit["tables"], f"cos and sin of {stored.config.max_position} positions")
    expected = _prepared(graph, manifest) if graph else stored
    torch_model = (expected.dense(torch.float32) if 4 * expected.config.n_params <= LARGEST_DENSE else expected).module()
    ids, report["text"] = _text(stored.config, stored.tokenizer, tokens, windows, seq_len)

    bar = tqdm(total=3 + len(_far(stored.config)) + len(ids), desc="verify", unit="step", delay=2, disable=not progress)
    with torch.inference_mode(), bar:
        exact = _open(folder, manifest, exact=True)
        for check, compare in _exact_checks(exact, torch_model, ids[:1]).items():
            figure, peak, about = compare()
            _record(report, check, figure, limit[check] * max(1.0, peak / PEAK), f"{about}, logits up to {peak:.3g}")
            bar.update()
        del exact
        shipped = _open(folder, manifest, exact=False)
        if manifest.get("kv"):
            _record(report, "kv_cache", *_cached(shipped, torch_model, ids[:1], limit["kl"]))
        _shipped(report, shipped, torch_model, ids, bar)
        del shipped
    runtime, optional = profile_of(manifest["profile"]).runtime, profile_of(manifest["profile"]).form == "static"
    if optional and not installed(runtime):
        report["not_run"] = [f"{runtime}: not installed (make runtime NAME={runtime})"]
    elif runtime != "onnxruntime":
        _in_runtime(report, runtime, folder, expected, ids[0])
    return _finish(report)


def _in_runtime(report: dict[str, Any], runtime: str, folder: str | Path, graph: Graph, ids: Tensor) -> None:
    """The check of the runtime that the profile is for: what it wrote, as one check."""
    result = run_check(runtime, folder, graph, report["profile"], ids[:TILE])
    report["versions"] |= result.get("versions", {})
    report[runtime] = result["figures"]
    figures = ", ".join(f"{name} {_show(value)}" for name, value in result["figures"].items())
    _record(report, runtime, len(result["failures"]), 0, "; ".join(result["failures"]) or figures)


def _prepared(graph: Graph, manifest: Mapping[str, Any]) -> Graph:
    """The graph as it was exported."""
    profile, dtype = profile_of(manifest["profile"]), manifest.get("dtype", "auto")
    if profile.form == "static":
        return make_ready(graph, profile, dtype, manifest["config"]["max_position"])
    return prepare(graph, dtype, manifest.get("scales", "float32"))


def _open(folder: str | Path, manifest: Mapping[str, Any], exact: bool) -> Any:
    """The exported model as shipped, or `exact`, with float arithmetic."""
    if profile_of(manifest["profile"]).form == "static":
        return StaticModel(folder, exact=exact, spin=False)
    return OrtModel(folder, accuracy_level=0 if exact else None, spin=False, float_cache=exact)


def changed_files(folder: str | Path, progress: bool = True) -> list[str]:
    """Files of the manifest that are missing or have other bytes."""
    entries = read_manifest(folder)["files"]
    bar = tqdm(entries.items(), desc="hashing", unit="file", delay=2, disable=not progress)
    wrong = []
    for name, known in bar:
        path = inside(folder, name)
        if not path.is_file() or not isinstance(known, dict) or sha256(path) != known.get("sha256"):
            wrong.append(name)
    return wrong


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(report: Mapping[str, Any]) -> list[str]:
    """The report in lines of plain text."""
    out = [f"profile {report['profile']}, accuracy level {report['accuracy_level']}" + (f", on {report['text']}" if "text" in report else "")]
    for c in report["checks"]:
        out.append(f"{'ok' if c['passed'] else 'FAILED':6} {c['check']:15} {_show(c['figure']):>9}  limit {_show(c['limit']):>7}  {c['about']}")
    out += [f"not run {words}" for words in report.get("not_run", ())]
    out.append("passed" if report["passed"] else "failed")
    return out


# The checks ---------------------------------------------------------------------------------------------------------


def _exact_checks(exported: OrtModel, model: Transformer, ids: Tensor) -> Mapping[str, Callable[[], tuple[float, float, str]]]:
    """The checks of level 0 on one window [1, T], each giving its figure, the largest logit and a description."""
    out = {"prefill": partial(_prefill, exported, model, ids), "decode": partial(_decode, exported, model, ids)}
    if isinstance(exported, OrtModel) and ids.shape[1] > 3:
        out["padding"] = partial(_padding, exported, model, ids)
    return out | {check: partial(_far_steps, exported, model, ids, start) for check, start in _far(model.config).items()}


def _tables(folder: str | Path, config: Config) -> float:
    stored = initializers(folder)
    if unrotated_keys(config):
        expected = {"rope.frequencies": frequencies(config)}
    else:
        expected = dict(zip(("rope.cos", "rope.sin"), config.rope.tables(config.head_dim, config.max_position)))
    pairs = [(stored.get(name), table) for name, table in expected.items()]
    same = all(found is not None and found.shape == table.shape for found, table in pairs)
    return max(_compare([pair])[0] for pair in pairs) if same else math.inf  # type: ignore[list-item]


def _prefill(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    expected = model(ids)
    return *_compare([(exported(ids), expected)]), f"{ids.shape[1]} positions"


def _decode(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    """Every step behind a prompt, against torch's cached path and against its prefill."""
    prompt = min(PROMPT, ids.shape[1] // 2)
    T = min(prompt + STEPS, ids.shape[1])
    ours, theirs, whole = exported.new_cache(1, T), model.new_cache(1, T), model(ids[:, :T])
    pairs = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
        got = exported.step(ids[:, start:stop], ours)
        pairs.append((got, model(ids[:, start:stop], theirs)))
        if not unrotated_keys(model.config) or model.config.rope.trained >= T:  # else the past was computed at other frequencies
            pairs.append((got, whole[:, start:stop]))
    return *_compare(pairs), f"{T - prompt} steps behind {prompt} tokens"


def _cached(exported: OrtModel, model: Transformer, ids: Tensor, limit: float) -> tuple[float, float, str]:
    """Mean KL of the steps behind a prompt, its limit, and a description: what a rounded cache costs those who read it."""
    prompt = min(PROMPT, ids.shape[1] // 2)
    T = min(prompt + TILE, ids.shape[1])
    cache, rows = exported.new_cache(1, T), []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
        rows.append(exported.step(ids[:, start:stop], cache)[0, -1])
    expected, got = model(ids[:, :T])[0, prompt - 1 :].log_softmax(-1), torch.stack(rows).log_softmax(-1)
    kl = F.kl_div(got, expected, log_target=True, reduction="batchmean").item()
    return kl, limit, f"nats a token over {T - prompt} steps behind {prompt} tokens, {cache.nbytes // T:,} bytes a position"


def _padding(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    """Two prompts of different lengths in one batch, the shorter padded on the right, and two steps behind them."""
    long = min(PROMPT, ids.shape[1] - 2)
    short = max(1, long // 2)
    mask = torch.ones(2, long + 2, dtype=torch.long)
    mask[1, short:long] = 0
    prompts, cache = ids[:, :long].repeat(2, 1), exported.new_cache(2, long + 2)
    got = exported.step(prompts, cache, mask[:, :long])
    expected = model(ids[:, : long + 2])[0], model(torch.cat([ids[:, :short], ids[:, long : long + 2]], 1))[0]
    pairs = [(got[0], expected[0][:long]), (got[1, :short], expected[1][:short])]
    for i in range(2):
        step = exported.step(ids[:, long + i : long + i + 1].repeat(2, 1), cache, mask[:, : long + i + 1])
        pairs += [(step[0, 0], expected[0][long + i]), (step[1, 0], expected[1][short + i])]
    return *_compare(pairs), f"prompts of {long} and {short} in one batch, two steps"


def _far_steps(exported: OrtModel, model: Transformer, ids: Tensor, start: int) -> tuple[float, float, str]:
    """Steps from position `start` on, behind a past that repeats the start of the window up to there."""
    config = model.config
    tile = max(1, min(TILE, ids.shape[1] - FAR_STEPS))
    stop = min(start + FAR_STEPS, config.max_position, start + ids.shape[1] - tile)
    near, theirs, ours = model.new_cache(1, tile), model.new_cache(1, stop), exported.new_cache(1, stop)
    model(ids[:, :tile], near)
    index = (torch.arange(start) - start) % tile  # ends with the end of the tile, so that the text goes on
    (cos, sin), (far_cos, far_sin) = (config.rope.tables(config.head_dim, n) for n in (tile, start))
    for pair, i in zip(ours.layers, attention_layers(config)):
        keys, values = near.layers[i]
        varies = config.rope.varies_with_length  # then torch caches keys as they are; the file only if its context reaches that far
        plain = keys if varies else rotate(keys, cos, -sin) / config.rope.attention_scale() ** 2
        far_keys = rotate(plain[:, :, index], far_cos, far_sin)
        key_buffers = ((pair[0], unrotated_keys(config)), (theirs.layers[i][0], varies))
        for buffer, as_they_are in key_buffers:
            buffer[:, :, :start] = plain[:, :, index] if as_they_are else far_keys
        for buffer in (pair[1], theirs.layers[i][1]):
            buffer[:, :, :start] = values[:, :, index]
    ours.length = theirs.length = start
    steps = ids[:, tile : tile + stop - start].split(1, 1)
    pairs = [(exported.step(step, ours), model(step, theirs)) for step in steps]
    return *_compare(pairs), f"positions {start} … {stop - 1} behind repeated text"


def _compare(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest difference (NaN if there is any) and the largest expected logit."""
    differences = torch.stack([(got - expected).abs().max() for got, expected in pairs])
    return differences.max().item(), max(expected.abs().max().item() for _, expected in pairs)


def _far(config: Config) -> dict[str, int]:
    """Where the far checks start: none without attention."""
    if not attention_layers(config):
        return {}
    out, original, end = {}, config.rope.original_max_position, config.max_position
    if original and original < end:
        out["beyond_context"] = max(0, original - FAR_STEPS // 2)
    width = sum(layer.n_kv_heads for layer in config.layers) * config.head_dim * 2 * 4
    if width * end <= LARGEST_PAST:
        out["end_of_context"] = max(0, end - FAR_STEPS)
    return out


def _shipped(report: dict[str, Any], exported: OrtModel, model: Transformer, ids: Tensor, bar: Any) -> None:
    """KL, flips and perplexity at the level in the file."""
    kl, flips, nll, count = 0.0, 0, torch.zeros(2, dtype=torch.float64), 0
    for window in ids.split(1):
        p, q = model(window)[0], exported(window)[0]  # (T, V)
        kl += sum(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum").item() for a, b in zip(p.split(64), q.split(64)))
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        nll += torch.stack([F.cross_entropy(logits[:-1], window[0, 1:]).double() for logits in (p, q)])
        count += len(p)
        bar.update()
    torch_perplexity, exported_perplexity = (nll / len(ids)).exp().tolist()
    report["perplexity"] = {"torch": torch_perplexity, "exported": exported_perplexity}
    limit = report["limits"]
    _record(report, "kl", kl / count, limit["kl"], f"nats a token over {count} tokens")
    _record(report, "flips", flips / count, limit["flips"], f"{flips} of {count} top tokens differ")
    about = f"{torch_perplexity:.4g} in torch, {exported_perplexity:.4g} exported"
    _record(report, "perplexity", abs(exported_perplexity / torch_perplexity - 1), limit["perplexity"], about)


def _text(config: Config, tokenizer: Tokenizer | None, tokens: Tensor | None, windows: int, seq_len: int) -> tuple[Tensor, str]:
    """Windows of ids and what they are."""
    if tokens is not None:
        if tokens.dim() != 2 or min(tokens.shape[0], tokens.shape[1] - 1) < 1:
            raise InputError("verification tokens", tuple(tokens.shape), "[windows, seq_len], windows of at least 2")
        ids, what = tokens.long(), "the given tokens"
    else:
        seq_len = min(seq_len, config.max_position)
        if tokenizer is not None:
            from tinycompress.data import tokens as read_tokens

            ids, what = read_tokens("pydoc", tokenizer, windows, seq_len, split="test"), "pydoc (test)"
        else:
            generator = torch.Generator().manual_seed(0)
            ids, what = torch.randint(config.vocab_size, (windows, seq_len), generator=generator), "random ids: no tokenizer"
    check_ids(ids, config.vocab_size)
    return ids, f"{len(ids)} × {ids.shape[1]} tokens, {what}"


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
    report["checks"].append({"check": check, "figure": figure, "limit": limit, "passed": figure <= limit, "about": about})


def _finish(report: dict[str, Any]) -> dict[str, Any]:
    report.pop("limits")
    report["passed"] = all(check["passed"] for check in report["checks"])
    return report


def _show(figure: float) -> str:
    return str(figure) if isinstance(figure, int) else f"{figure:.3g}"

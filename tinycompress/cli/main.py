"""The `tinycompress` command: options in, one call of the library, tables out. Heavy imports wait for their command."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import InputError, MissingExtra
from . import distill as cli_distill
from .arguments import check_export, need_tokenizer, open_model, read_tokens, runnable


class Commands(TyperGroup):
    """Turns the errors that are not bugs into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except (InputError, MissingExtra) as error:
            _fail(error, 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except OSError as error:  # a full disk, a folder that may not be written
            _fail(error, 1)
        except RuntimeError as error:
            from tinycompress.export import GateError

            if not isinstance(error, GateError):
                raise
            _fail(error, 1)


def _fail(error: object, code: int) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


class Format(StrEnum):
    native = "native"
    dense = "dense"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder (checkpoint or export), a .gguf file, a hub name, or smollm2-135m."),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="The folder to write; it appears when all is done, or not at all."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Prune, quantize, stretch, export and verify Llama-family models on one shared graph."""
    if version:
        from importlib.metadata import version as installed

        print(f"tinycompress {installed('tinycompress')}")
        raise typer.Exit()


@app.command()
def inspect(
    model: Model,
    all_feeds: Annotated[bool, typer.Option("--feeds", help="Every feed, none folded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the graph: layers, parameters, bytes, feeds, history. Runs of equal layers are folded.

    \b
    Examples:
      tinycompress inspect smollm2-135m
      tinycompress inspect small --feeds
      tinycompress inspect model.gguf --json
    """
    from ..evaluation import report

    graph = open_model(model)
    if as_json:
        print(json.dumps({"model": model} | report.summary(graph), indent=2))
    else:
        report.print_graph(graph, model, all_feeds)


@app.command()
def compress(
    model: Model,
    output: Out,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="params=SHARE",
            help="What to keep: params=0.8, bytes=300MB, flops=0.8, params=0.4,ffn,heads, layers=20.",
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Stretch the context to this many positions.")] = None,
    rope_method: Annotated[
        str | None,
        typer.Option(
            help="How to stretch it: auto (by what a window of that length speaks for), ntk, yarn, ntk-by-parts, linear, dynamic, llama3.  "
            "[default: as the model already is, else auto]"
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="w4g64", help="Bits, group size: w4g64, w3g64, w8, w4g32-asym, w4g64-lpbq (qnn)."),
    ] = None,
    quantize_method: Annotated[str, typer.Option(help="gptq, or rtn: nearest, without calibration.")] = "gptq",
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Rotate before quantizing; it unties a tied head.  [default: where there is none]",
        ),
    ] = None,
    quantize_embedding: Annotated[
        str | None,
        typer.Option(metavar="w8g64", help="Bits and group size of the embedding and the head (tied: one table)."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Let the scales learn from MODEL at the end: some forwards and backwards more."),
    ] = False,
    calibration: Annotated[
        str, typer.Option(metavar="PATH-OR-NAME", help="Calibration text: pydoc, wikitext2, a hub name or a file.")
    ] = "pydoc",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window.  [default: 1024, or the context if that is shorter]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows.")] = 0,
    export: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Write an exported, verified model instead of a checkpoint: ort."),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="native; dense: quantized weights are saved dequantized; gptq, awq, compressed-tensors: as those tools; gguf: a file."
        ),
    ] = Format.native,
    overwrite: Overwrite = False,
    work: Annotated[
        Path | None, typer.Option(help="Keep every step here; a rerun takes up where the last one ended.")
    ] = None,
) -> None:
    """Prune, stretch the context, quantize, in this order, then save. Without a flag: a copy in Hugging Face form.

    \b
    Examples:
      tinycompress compress smollm2-135m --prune params=0.8 --quantize w4g64 -o small
      tinycompress compress smollm2-135m --quantize w4g64 --rotate --quantize-embedding w8g64 -o small
      tinycompress compress smollm2-135m --context 16384 --rope-method yarn -o long
      tinycompress compress smollm2-135m --quantize w3g64 --tune --export ort -o small-onnx
      tinycompress compress small --format dense -o small-dense
      tinycompress compress smollm2-135m --quantize w4g32 --quantize-embedding w8g32 --format gguf -o small.gguf
    """
    from ..files import check_free
    from ..graph.quant_tensor import QuantSpec
    from ..recipe import Recipe

    if export and format is not Format.native:
        raise InputError(
            "--format", f"{format} together with --export", "one of the two (an export has a format of its own)"
        )
    if format is Format.gguf:
        from ..checkpoints.gguf_writer import check_file

        check_file(output, overwrite)
    else:
        check_free(output, overwrite)
    spec = QuantSpec.parse(quantize) if quantize else None
    tables = QuantSpec.parse(quantize_embedding) if quantize_embedding else None
    recipe = Recipe(prune, context, rope_method, spec, quantize_method, tables, rotate, tune)
    before = open_model(model)
    config = recipe.check(before)
    if export:
        check_export(config, spec, export)
    if format not in (Format.native, Format.dense):
        from ..checkpoints.format_check import check_plan

        check_plan(format.value, before, config, spec, tables)

    from .. import pipeline
    from ..checkpoints.checkpoint import save
    from ..evaluation import report

    tokens = read_tokens(before, calibration, samples, seq_len, 1024, "train", seed) if recipe.calibrates else None
    long_tokens = None
    if context is not None and recipe.measures_context(before):
        from ..calibration.data import tokens as read

        try:
            long_tokens = read(calibration, need_tokenizer(before), 1, context, seed=seed, split="train")
        except InputError as error:
            raise InputError(
                error.field, error.found, f"{error.accepted}; or name a --rope-method, which needs no text"
            ) from None
    after = pipeline.run(before, recipe.passes(before, tokens, long_tokens), work)
    if export:
        from tinycompress.export import export as write

        write(after, output, profile=export, overwrite=overwrite)
    else:
        layout = "native" if format is Format.dense else format.value
        save(after, output, dense=format is Format.dense, overwrite=overwrite, format=layout)
    report.print_comparison(before, after, report.folder_bytes(output))


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        str, typer.Option(metavar="PATH-OR-NAME", help="Evaluation text: pydoc, wikitext2, a hub name or a file.")
    ] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 8,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window.  [default: 2048, or the context if that is shorter]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity over the first windows of a text, of a checkpoint in torch or of an export in its runtime.

    \b
    Examples:
      tinycompress eval smollm2-135m
      tinycompress eval small --data wikitext2 --windows 16 --seq-len 2048
      tinycompress eval small-onnx --data notes.txt --json
    """
    from ..evaluation.perplexity import perplexity

    graph = open_model(model)
    tokens = read_tokens(graph, data, windows, seq_len, 2048, "test")
    result = perplexity(runnable(model, graph), tokens)
    if as_json:
        print(
            json.dumps(
                {
                    "model": model,
                    "data": data,
                    "perplexity": result.value,
                    "tokens": result.tokens,
                    "protocol": result.protocol,
                },
                indent=2,
            )
        )
    else:
        print(f"perplexity {result.value:.4f} on {data} ({result.tokens:,} tokens: {result.protocol})")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the likeliest K.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample among the likeliest that make up this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Go on from a prompt: the text to standard output as it comes, the speed to standard error.

    \b
    Examples:
      tinycompress generate smollm2-135m "The capital of France is"
      tinycompress generate small-onnx "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    """
    import torch

    graph = open_model(model)
    tokenizer = need_tokenizer(graph)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=True)], dtype=torch.long)
    room = graph.config.max_position - ids.shape[1]
    if room < 1:
        raise InputError(
            "prompt", f"{ids.shape[1]} tokens", f"fewer than the model's context, {graph.config.max_position}"
        )
    text, times = tokenizer.decode_stream(), [time.perf_counter()]

    def show(token: int) -> None:
        times.append(time.perf_counter())
        print(text(token), end="", flush=True)

    machine = runnable(model, graph)
    machine.generate(
        ids, min(max_new_tokens, room), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, on_token=show
    )
    print()
    made, decode = len(times) - 1, times[-1] - times[min(1, len(times) - 1)]  # the first token's time is the prompt's
    speed = f", {(made - 1) / decode:.1f} tokens/s after the first" if made > 1 and decode > 0 else ""
    print(f"{made} tokens{speed}", file=sys.stderr)


@app.command("export")
def export_command(
    model: Model,
    output: Out,
    profile: Annotated[str, typer.Option(help="What to write for: ort, web, std, openvino-npu, qnn, static.")] = "ort",
    dtype: Annotated[str, typer.Option(help="auto, or float32: no quantized weights.")] = "auto",
    scales: Annotated[
        str, typer.Option(help="Scales of quantized weights: float32, or float16 (rounded, half the bytes).")
    ] = "float32",
    accuracy_level: Annotated[
        int, typer.Option(help="Of quantized matrix products: 0 computes in float32, 4 in int8.")
    ] = 4,
    overwrite: Overwrite = False,
    kv: Annotated[
        str,
        typer.Option(help="ort: the cache of keys and values: float32, or int8 on scales from the calibration text."),
    ] = "float32",
    mobile: Annotated[
        bool, typer.Option("--mobile", help="ort, web: add model.ort and the operator list of a reduced mobile build.")
    ] = False,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Run the parity gate, or skip it.")] = True,
    context: Annotated[
        int | None, typer.Option(min=2, help="qnn, static: slots of the cache.  [default: the model's, at most 2048]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="PATH-OR-NAME", help="qnn, int8 cache: text for ranges.  [default: pydoc]")
    ] = None,
    ranges: Annotated[str, typer.Option(help="qnn: minmax, percentile or mse.")] = "minmax",
    attention_bits: Annotated[
        int, typer.Option(help="qnn: of keys and values in attention: 16, or 8 for less work.")
    ] = 16,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="qnn: rotate dense weights first.  [default: yes]")
    ] = None,
    epcontext: Annotated[
        str | None, typer.Option(metavar="ARCH", help="qnn: compile for HTP 73, 75, 79 or 81 too.")
    ] = None,
) -> None:
    """Write a model for a runtime. It must pass the parity gate against torch, or OUT does not appear.

    \b
    Examples:
      tinycompress export small --profile ort -o small-onnx
      tinycompress export small --kv int8 --calibration wikitext2 -o small-onnx
      tinycompress export smollm2-135m --dtype float32 -o reference-onnx
      tinycompress export small --profile openvino-npu --verify -o small-npu
      tinycompress export smollm2-135m --profile qnn --context 1024 --calibration wikitext2 -o small-qnn
    """
    from tinycompress.export import StaticChoices, export, summary

    from ..evaluation import report
    from ..files import check_free

    check_free(output, overwrite)
    graph = open_model(model)
    text = read_tokens(graph, calibration, 8, None, 512, "train") if calibration else None
    static = StaticChoices(context, text, ranges, epcontext, attention_bits, rotate)
    options: dict[str, Any] = {
        "dtype": dtype,
        "scales": scales,
        "accuracy_level": accuracy_level,
        "check": check,
        "static": static,
        "mobile": mobile,
    }
    options |= {"kv": kv, "calibration": text}
    manifest = export(graph, output, profile=profile, overwrite=overwrite, **options)
    if manifest["checks"]:
        print("\n".join(summary(manifest["checks"])))
    print(
        f"{output}: {report.human(report.folder_bytes(output))}, for onnxruntime >= {manifest['minimum_onnxruntime']}"
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="An exported folder.")],
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="A runtime of export/runtimes (make runtime NAME=...) instead.")
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
        return verify_in(folder, runtime, as_json)
    result = check(folder)
    print(json.dumps(result, indent=2) if as_json else "\n".join(summary(result)))
    if not result["passed"]:
        raise GateError(result)


def verify_in(folder: Path, name: str, as_json: bool) -> None:
    """The check of another runtime, in its own environment; exit code 1 if it fails."""
    from tinycompress.export import read, run_check
    from tinycompress.export.read import read_manifest

    result = run_check(name, folder, read(folder), read_manifest(folder)["profile"])
    figures = "\n".join(
        f"  {key:24} {value if isinstance(value, str) else format(value, '.3g')}"
        for key, value in result["figures"].items()
    )
    words = "passed" if result["passed"] else "failed: " + "; ".join(result["failures"])
    print(json.dumps(result, indent=2) if as_json else f"{name} {result.get('versions', {})}\n{figures}\n{words}")
    if not result["passed"]:
        raise typer.Exit(1)


cli_distill.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()

"""`tinycompress compress`: prune, stretch the context, quantize, and save or export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .arguments import check_export, need_tokenizer, open_model, read_tokens
from .options import Model, Out, Overwrite, count_option, folder_option, grid_option, text_option, window_option

if TYPE_CHECKING:
    from torch import Tensor

    from ..files import Claim
    from ..graph.graph import Graph


class Format(StrEnum):
    native = "native"
    dense = "dense"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


def compress(
    model: Model,
    output: Out,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="params=SHARE",
            help="Cut the model to a budget: params=0.8 (a share of the non-embedding parameters), bytes=300MB, "
            "flops=0.8, params=0.4,ffn,heads (taken from FFN channels and heads), layers=20, ffn=0.75.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Stretch the context to this many positions, such as 8192.")
    ] = None,
    rope_method: Annotated[
        str | None,
        typer.Option(
            help="How to stretch it: ntk, yarn, ntk-by-parts, linear, dynamic, llama3; or auto, which measures ntk, "
            "ntk-by-parts and yarn on one long window and takes the best.  [default: the model's own method, else auto]"
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        grid_option(
            "Quantize the linears: bits and group size, such as w4g64, w3g64, w8 (one group per row), w4g32-asym "
            "(zero points), w2g64-floatzero, w4g64-lpbq (for profile qnn)."
        ),
    ] = None,
    quantize_method: Annotated[
        str, typer.Option(help="gptq (calibrates), or rtn (rounds to the nearest, no text needed).")
    ] = "gptq",
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Rotate the weights before quantizing, which unties a tied head.  [default: if the head is not tied]",
        ),
    ] = None,
    quantize_embedding: Annotated[
        str | None, grid_option("Quantize the embedding and the head too: bits and group size.", example="w8g64")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="At the end let the scales learn from MODEL's outputs: better, minutes longer."),
    ] = False,
    calibration: Annotated[str, text_option("Calibration text")] = "pydoc",
    samples: Annotated[int, count_option("How many windows of the calibration text are used.")] = 32,
    seq_len: Annotated[int | None, window_option(1024)] = None,
    seed: Annotated[int, typer.Option(help="Draws which windows of the calibration text are used.")] = 0,
    export: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Write an exported, verified model instead of a checkpoint, such as ort."),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="How the checkpoint is written: native; dense (quantized weights are dequantized); gptq, awq or "
            "compressed-tensors (as those tools write it); gguf (one file)."
        ),
    ] = Format.native,
    overwrite: Overwrite = False,
    work: Annotated[
        Path | None, folder_option("Keep the result of every step here; a rerun goes on behind the last one.")
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
    from ..files import claim
    from ..graph.quant_tensor import QuantSpec
    from ..recipe import Recipe

    if export and format is not Format.native:
        accepted = "one of the two (an export has a format of its own)"
        raise InputError("--format", f"{format} together with --export", accepted)
    apart_from = {"MODEL": model, "the calibration text": calibration, "the work folder": work}
    if format is Format.gguf:
        from ..checkpoints.gguf_writer import claim_gguf

        claimed = claim_gguf(output, overwrite, apart_from)
    else:
        claimed = claim(output, overwrite, apart_from)
    spec = QuantSpec.parse(quantize) if quantize else None
    tables = QuantSpec.parse(quantize_embedding) if quantize_embedding else None
    recipe = Recipe(prune, context, rope_method, spec, quantize_method, tables, rotate, tune)
    before = open_model(model)
    config = recipe.check(before)
    if export or format is Format.gguf:
        from ..checkpoints.vocabulary import check_vocabulary

        check_vocabulary(before)
    if export:
        check_export(config, spec, export)
    if format not in (Format.native, Format.dense):
        from ..checkpoints.format_check import check_plan

        check_plan(format.value, before, config, spec, tables)

    from .. import pipeline
    from ..evaluation import report
    from ..model.cpu_memory import keep_memory

    tokens = read_tokens(before, calibration, samples, seq_len, 1024, "train", seed) if recipe.calibrates else None
    long_tokens = None
    if context is not None and recipe.measures_context(before):
        long_tokens = _long_window(before, calibration, context, seed)
    with keep_memory():
        after = pipeline.run(before, recipe.passes(before, tokens, long_tokens), work)
        _write(after, claimed, export, format)
    report.print_comparison(before, after, report.folder_bytes(output))


def _long_window(graph: Graph, calibration: str, context: int, seed: int) -> Tensor:
    """One window of the new length, which the context scaling is chosen on."""
    from ..calibration.data import tokens

    try:
        return tokens(calibration, need_tokenizer(graph), 1, context, seed=seed, split="train")
    except InputError as error:
        accepted = f"{error.accepted}; or name a --rope-method, which needs no text"
        raise InputError(error.field, error.found, accepted) from None


def _write(graph: Graph, output: Claim, export: str | None, format: Format) -> None:
    if export:
        from tinycompress.export import export as write

        write(graph, output, profile=export)
        return
    from ..checkpoints.checkpoint import save

    layout = "native" if format is Format.dense else format.value
    save(graph, output, dense=format is Format.dense, format=layout)

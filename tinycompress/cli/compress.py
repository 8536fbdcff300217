"""`tinycompress compress`: prune, stretch the context, quantize, and save or export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .arguments import open_model
from .dry_run import print_plan
from .options import (
    AsJson,
    OptionalModel,
    OptionalOut,
    Overwrite,
    count_option,
    folder_option,
    grid_option,
    text_option,
    window_option,
)
from .recipes import (
    DryRun,
    Fresh,
    Measure,
    RecipeFile,
    Settings,
    check,
    check_fresh,
    claim_output,
    file_recipe,
    option_recipe,
    places_in,
    run,
    typed,
    write,
)
from .spellings import budget_of, grid_of, positions_of, profile_of, refuse_alone, word_of

METHODS = ("gptq", "rtn", "hqq", "awq", "autoround", "smoothquant", "mixed")
ROPE_METHODS = ("auto", "ntk", "yarn", "ntk-by-parts", "linear", "dynamic", "llama3", "longrope")


class Format(StrEnum):
    native = "native"
    dense = "dense"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


def compress(
    invocation: typer.Context,
    model: OptionalModel = None,
    output: OptionalOut = None,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="params=SHARE",
            help="Cut the model to a budget: params=0.8 (a share of the non-embedding parameters), bytes=300MB, "
            "flops=0.8, params=0.4,ffn,heads (taken from FFN channels and heads), params=0.8,layout=uniform (layers "
            "all alike; deci: as llama.cpp reads uneven ones), layers=20, ffn=0.75, "
            "slice=512, drop=4.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="POSITIONS", help="Stretch the context to this many positions, such as 8192 or 8k."),
    ] = None,
    rope_method: Annotated[
        str | None,
        typer.Option(
            help="How to stretch it: ntk, yarn, ntk-by-parts, linear, dynamic, llama3, longrope; or auto, which "
            "measures ntk, ntk-by-parts and yarn on one long window and takes the best.  "
            "[default: the model's own method, else auto]"
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
        str,
        typer.Option(
            help="gptq, awq, mixed (bits by linear, of the same bytes), autoround or smoothquant (all calibrate); "
            "rtn or hqq, which need no text."
        ),
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
    seq_len: Annotated[str | None, window_option(1024)] = None,
    seed: Annotated[int, typer.Option(help="Draws which windows of the calibration text are used.")] = 0,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Write an exported, verified model instead of a checkpoint, for this profile of "
            "tinycompress export, such as ort.",
        ),
    ] = None,
    export: Annotated[str | None, typer.Option(hidden=True, help="The first name of --profile.")] = None,
    format: Annotated[
        Format,
        typer.Option(
            case_sensitive=False,
            help="How the checkpoint is written: native; dense (quantized weights are dequantized); gptq, awq or "
            "compressed-tensors (as those tools write it); gguf (one file).",
        ),
    ] = Format.native,
    overwrite: Overwrite = False,
    work: Annotated[
        Path | None,
        folder_option("Keep every step here, and what a killed one had done: a rerun goes on from there."),
    ] = None,
    fresh: Fresh = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
    measure: Measure = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Prune, stretch the context, quantize, in this order, then save. Without a flag: a copy in Hugging Face form.

    \b
    Examples:
      tinycompress compress smollm2-135m --prune params=0.8 --quantize w4g64 -o small
      tinycompress compress smollm2-135m --quantize w4g64 --rotate --quantize-embedding w8g64 -o small
      tinycompress compress smollm2-135m --context 16384 --rope-method yarn -o long
      tinycompress compress smollm2-135m --quantize w3g64 --tune --profile ort -o small-onnx
      tinycompress compress small --format dense -o small-dense
      tinycompress compress smollm2-135m --quantize w4g32 --quantize-embedding w8g32 --format gguf -o small.gguf
      tinycompress compress --recipe small.toml --set GPTQ.damping=0.05 -o small
      tinycompress compress smollm2-135m --quantize w4g64 --dry-run
    """
    changes = list(settings or ())
    check_fresh(fresh, work)
    if recipe is not None:
        chosen = file_recipe(invocation, recipe, changes, model)
        apart_from = {"the work folder": work, "the recipe": recipe} | places_in(chosen)
        claimed = claim_output(output, overwrite, chosen.format, dry_run, apart_from)
        before = open_model(str(chosen.model))
    else:
        if model is None:
            raise InputError("MODEL", "none", "a model, or --recipe FILE")
        prune = budget_of("--prune", prune)
        positions = positions_of("--context", context)
        length = positions_of("--seq-len", seq_len)
        quantize = grid_of("--quantize", quantize)
        quantize_embedding = grid_of("--quantize-embedding", quantize_embedding)
        quantize_method = word_of("--quantize-method", quantize_method, METHODS)
        profile = profile_of("--profile", profile or export)
        refuse_alone("--rope-method", rope_method, "--context", context)
        if invocation.get_parameter_source("quantize_method").name == "COMMANDLINE":  # type: ignore[union-attr]
            refuse_alone("--quantize-method", quantize_method, "--quantize", quantize)
        if rope_method is not None:
            rope_method = word_of("--rope-method", rope_method, ROPE_METHODS)
        if profile and format is not Format.native:
            accepted = "one of the two (an export has a format of its own)"
            raise InputError("--format", f"{format} together with --profile", accepted)
        apart_from = {"MODEL": model, "the calibration text": calibration, "the work folder": work}
        claimed = claim_output(output, overwrite, format, dry_run, apart_from)
        from ..graph import LLAMA_2_7B
        from ..recipe.options import Options

        options = Options(prune, positions, rope_method, quantize, quantize_method, quantize_embedding, rotate, tune)
        data = {"text": calibration, "samples": samples} | ({"seq_len": length} if length else {}) | {"seed": seed}
        document: dict[str, Any] = {"model": model, "format": str(format), "data": data}
        document |= {} if measure is None else {"measure": measure}
        document |= {"export": {"profile": profile}} if profile else {}
        option_recipe(document | {"pass": options.steps(LLAMA_2_7B)}, changes)  # mistakes, before a model is fetched
        before = open_model(model)
        chosen = option_recipe(document | {"pass": options.steps(before.config)}, changes)
    foretold = check(chosen, before)
    if claimed is None:
        return print_plan(chosen, before, foretold, output, work)
    from ..model.cpu_memory import keep_memory

    with keep_memory():
        write(run(chosen, before, work, typed(invocation), fresh=fresh), chosen, claimed, as_json)

"""`tinycompress export`: a model for a runtime."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import open_model
from .options import AsJson, Model, Out, Overwrite, text_option
from .spellings import positions_of, profile_of
from .terminal import print_json
from .writing import gate_lines, write_export


def export(
    model: Model,
    output: Out,
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            help="What to write for: ort (ONNX Runtime, onnxruntime-genai, Optimum), web (transformers.js), std "
            "(standard ONNX operators only), openvino-npu, qnn (Qualcomm NPUs), static (RKNN and other NPUs).",
        ),
    ] = "ort",
    dtype: Annotated[
        str, typer.Option(help="auto keeps quantized weights quantized; float32 writes all weights in float32.")
    ] = "auto",
    scales: Annotated[
        str,
        typer.Option(help="How scales of quantized weights are stored: float32, or float16 (rounded, half the bytes)."),
    ] = "float32",
    accuracy_level: Annotated[
        int, typer.Option(help="What ONNX Runtime multiplies quantized weights in: 0 is float32, 4 is int8 (faster).")
    ] = 4,
    overwrite: Overwrite = False,
    kv: Annotated[
        str,
        typer.Option(
            help="Profile ort, the cache of keys and values: float32, or int8 (a quarter of the memory), with scales "
            "from the calibration text."
        ),
    ] = "float32",
    mobile: Annotated[
        bool,
        typer.Option(
            "--mobile", help="Profiles ort and web: add model.ort and the operator list of a reduced mobile build."
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the export with torch before it appears, or do not.")
    ] = True,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="POSITIONS",
            help="How many positions the export is good for, such as 4096 or 4k.  [default: the model's; profiles qnn "
            "and static: at most 2048]",
        ),
    ] = None,
    calibration: Annotated[
        str | None, text_option("Text that qnn and an int8 cache take their ranges from", default="pydoc")
    ] = None,
    ranges: Annotated[
        str, typer.Option(help="Profile qnn, how ranges of activations are chosen: minmax, percentile or mse.")
    ] = "minmax",
    attention_bits: Annotated[
        int, typer.Option(help="Profile qnn, bits of keys and values in attention: 16, or 8 (faster, less exact).")
    ] = 16,
    rotate: Annotated[
        bool | None,
        typer.Option("--rotate/--no-rotate", help="Profile qnn: rotate dense weights first.  [default: yes]"),
    ] = None,
    epcontext: Annotated[
        str | None,
        typer.Option(metavar="ARCH", help="Profile qnn: also compile for this HTP architecture: 73, 75, 79 or 81."),
    ] = None,
    as_json: AsJson = False,
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
    positions = positions_of("--context", context)
    profile = profile_of("--profile", profile) or profile
    from ..evaluation import report
    from ..files import claim
    from ..provenance import read_provenance
    from ..recipe.vocabulary import Export

    claimed = claim(output, overwrite, {"MODEL": model, "the calibration text": calibration})
    graph = open_model(model)
    choices = Export(
        profile=profile,
        dtype=dtype,
        scales=scales,
        accuracy_level=accuracy_level,
        kv=kv,
        mobile=mobile,
        check=check,
        context=positions,
        calibration=calibration,
        ranges=ranges,
        attention_bits=attention_bits,
        rotate=rotate,
        epcontext=epcontext,
    )
    manifest = write_export(graph, claimed, choices, read_provenance(model))
    written = report.folder_bytes(claimed.path)
    if as_json:
        about = {"output": str(claimed.path), "bytes": written, "profile": choices.profile}
        return print_json(about | {"checks": manifest["checks"]})
    print("\n".join(gate_lines(manifest)))
    print(f"{output}: {report.human(written)}, for onnxruntime >= {manifest['minimum_onnxruntime']}")

"""`tinycompress distill`: a student learns from a teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import open_model, training_windows
from .loss_options import parse_hidden, parse_losses
from .options import Out, Overwrite, TrainingText, count_option, folder_option, grid_option, window_option

if TYPE_CHECKING:
    from ..files import Claim
    from ..graph.graph import Graph


def distill(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT", help="The model that learns: a folder, a .gguf file, a hub name or smollm2-135m."
        ),
    ],
    output: Out,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="The model it learns from. With --cache: the model the cache must be of. Not needed for --loss ce.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        folder_option("Learn from answers that `tinycompress cache-teacher` wrote, instead of running TEACHER."),
    ] = None,
    data: TrainingText = "pydoc",
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH-OR-NAME",
            help="Text whose perplexity is measured during training; may be given several times.  [default: pydoc]",
        ),
    ] = None,
    steps: Annotated[int | None, count_option("How many updates of the weights.  [default: 1000]")] = None,
    budget: Annotated[
        int | None, typer.Option("--tokens", min=1, help="How many tokens to train on, instead of --steps.")
    ] = None,
    seq_len: Annotated[int | None, window_option(512)] = None,
    batch: Annotated[int, count_option("Windows per update, over all processes.")] = 8,
    micro_batch: Annotated[
        int | None,
        count_option("Windows that a process computes at a time: fewer take less memory.  [default: all of its share]"),
    ] = None,
    windows: Annotated[
        int | None,
        count_option("At most so many windows of the text.  [default: what the run reads, or the cache has]"),
    ] = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    warmup: Annotated[
        float, typer.Option(help="Updates over which the rate rises: a number, or a share of all below 1.")
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    loss: Annotated[
        str,
        typer.Option(
            help="What is minimised: kl, reverse_kl, jsd, skew_kl or ce; a sum such as kl+0.5*ce; 1:0*ce fades out."
        ),
    ] = "kl",
    temperature: Annotated[
        float, typer.Option(help="Divides the logits of teacher and student in kl, reverse_kl, jsd and skew_kl.")
    ] = 1.0,
    hidden: Annotated[
        str | None,
        typer.Option(
            help="Also match states inside the model: cosine or mse (last two layers), relation or attention (last), "
            "written as for --loss, such as 0.5*cosine."
        ),
    ] = None,
    relation_heads: Annotated[
        int | None,
        count_option(
            "With --hidden relation or attention: how many heads the states are cut into.  "
            "[default: the most that split no head]"
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", min=1, help="Learn low-rank updates (LoRA) of this rank only, and merge them at the end."
        ),
    ] = None,
    fake_quant: Annotated[
        str | None, grid_option("Quantization-aware training: learn on this grid, and save quantized.")
    ] = None,
    grid: Annotated[
        str,
        typer.Option(
            help="With --fake-quant: refind (search the scales anew in every step), or learn (scales are trained)."
        ),
    ] = "refind",
    scales: Annotated[
        bool,
        typer.Option(
            "--scales", help="STUDENT is quantized already: its scales, norms and biases learn, its integers stay."
        ),
    ] = False,
    stable_embedding: Annotated[
        bool,
        typer.Option("--stable-embedding", help="Train the embedding behind a norm, which is folded away at the end."),
    ] = False,
    on_policy: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps that train on text which the student writes itself.")
    ] = 0.0,
    teacher_context: Annotated[
        int | None,
        count_option("The teacher reads the windows in pieces of so many tokens, where its context is shorter."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the windows and of everything drawn.")] = 0,
    precision: Annotated[
        str, typer.Option(help="Of the computation: float32, bfloat16, or auto (bfloat16 on a GPU, float32 on a CPU).")
    ] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Keep fewer activations and compute them again: less memory, a third slower."
        ),
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option(min=0, help="Updates between measurements on the held-out text.  [default: a tenth of all]"),
    ] = None,
    patience: Annotated[int | None, count_option("Stop after so many measurements without a better one.")] = None,
    save_every: Annotated[int, typer.Option(min=0, help="With --work: updates between two saved states.")] = 100,
    work: Annotated[
        Path | None, folder_option("Save the state here: a killed run goes on from it, to the same bytes.")
    ] = None,
    log: Annotated[
        Path | None, folder_option("Where train.jsonl and TensorBoard files go.  [default: the folder of --work]")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train STUDENT to give every next token the probability that TEACHER gives it.

    \b
    Examples:
      tinycompress distill small --teacher smollm2-135m --data wikitext2 --steps 500 --work run -o healed
      tinycompress distill small --teacher smollm2-135m --data wikitext2 --fake-quant w3g64 --grid learn -o w3
      tinycompress distill w3 --teacher smollm2-135m --data wikitext2 --scales --lr 1e-3 --batch 2 --steps 32 -o tuned
      tinycompress distill small --teacher smollm2-135m --loss kl+1:0*ce --hidden 0.5*cosine --tokens 1000000 -o healed
      tinycompress cache-teacher meta-llama/Llama-2-7b-hf --data big.jsonl --windows 20000 --seq-len 2048 -o cache
      tinycompress distill tinyllama --cache cache --data big.jsonl --steps 5000 -o healed
      torchrun --nproc-per-node 8 -m tinycompress distill tinyllama --teacher llama-2-7b --data big.jsonl -o healed
    """
    from ..distillation.distill import Distill
    from ..distillation.distributed import process_group, rank
    from ..distillation.lora import LoRA
    from ..distillation.stopping import stop_on_sigterm
    from ..distillation.training import Training
    from ..files import claim
    from ..graph.quant_tensor import QuantSpec
    from ..model.cpu_memory import keep_memory

    held_out_texts = {f"the text {name}": name for name in held_out or []}
    apart_from = {"STUDENT": student, "TEACHER": teacher, "the cache": cache, "the text": data, "the work folder": work}
    claimed = claim(output, overwrite, apart_from | held_out_texts | {"the folder of the log": log})
    losses = parse_losses(loss, temperature)
    inner = parse_hidden(hidden, relation_heads)
    spec = QuantSpec.parse(fake_quant) if fake_quant else None
    if teacher is None and cache is None and {part.kind for part in losses} != {"ce"}:
        raise InputError(
            "--teacher and --cache", "neither", "one of the two (or both: a cache that must be this teacher's)"
        )
    known = read_cache(cache, teacher)
    length = seq_len or (known.seq_len if known else None)
    steps = 1000 if steps is None and budget is None else steps
    about = steps or math.ceil((budget or 0) / (batch * (length or 512)))
    training = Training(
        steps=steps,
        tokens=budget,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        batch=batch,
        micro_batch=micro_batch,
        seed=seed,
        precision=precision,
        checkpointing=checkpointing,
        eval_every=max(1, about // 10) if eval_every is None else eval_every,
        save_every=save_every,
        patience=patience,
    )
    with process_group() as device, keep_memory(), stop_on_sigterm() as stop:
        before = open_model(student)
        tokens = training_windows(before, data, length, windows or (known.windows if known else about * batch))
        measured = {
            Path(name).stem: training_windows(before, name, tokens.shape[1], 16, "test")
            for name in held_out or ["pydoc"]
        }
        distilling = Distill(
            tokens.to(device),
            known or (open_model(teacher) if teacher else None),
            training,
            losses,
            inner,
            measured,
            LoRA(lora, 2.0 * lora) if lora else None,
            spec,
            grid,
            scales,
            stable_embedding,
            on_policy,
            teacher_context,
            work=work,
            log=log or work,
            stop=stop,
        )
        after = distilling(before)
        if rank() == 0:
            finish(before, after, claimed, log or work, patience is not None)


def read_cache(folder: Path | None, teacher: str | None) -> Any:
    """The cache in a folder, checked to be of `teacher` if one is named; None without a folder."""
    if folder is None:
        return None
    from ..distillation.teacher_cache import open_cache

    return open_cache(folder, teacher=open_model(teacher) if teacher else None)


def finish(before: Graph, after: Graph, output: Claim, log: Path | None, best: bool) -> None:
    """Saves, and prints perplexities before and after: of the best measurement if that is the result, else the last."""
    from ..checkpoints.checkpoint import save
    from ..evaluation import report

    save(after, output)
    report.print_comparison(before, after, report.folder_bytes(output.path))
    if log:
        lines = [json.loads(line) for line in (log / "train.jsonl").read_text().splitlines()]
        measured = [_finite(line["perplexity"]) for line in lines if "perplexity" in line]
        result = min(measured, key=lambda values: sum(map(math.log, values.values()))) if best else measured[-1]
        for name in measured[0]:
            print(f"perplexity on {name}: {measured[0][name]:.3f} → {result[name]:.3f}")


def _finite(perplexities: dict[str, float | None]) -> dict[str, float]:
    """Perplexities of a log, which has null for one beyond all numbers."""
    return {name: math.inf if value is None else value for name, value in perplexities.items()}

"""`tinycompress distill` and `tinycompress cache-teacher`: options in, one call of the library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import need_tokenizer, open_model

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph.graph import Graph

Name = Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub name, or smollm2-135m.")]
Data = Annotated[
    str, typer.Option(metavar="PATH-OR-NAME", help="Training text: pydoc, wikitext2, a hub name or a file.")
]
Windows = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many windows of the text.  [default: what the run reads, or the cache has]"),
]


def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="What learns: a folder, a .gguf file, a hub name, or smollm2-135m.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write; it appears when all is done.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="What it learns from; with --cache, whose the cache must be. Not needed for --loss ce.",
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A teacher's answers, from `tinycompress cache-teacher`.")
    ] = None,
    data: Data = "pydoc",
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH-OR-NAME", help="Text to measure on, again and again. [default: pydoc]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates.  [default: 1000]")] = None,
    budget: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens to train on, instead of --steps.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window.  [default: 512, or the context if that is shorter]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows an update, over all processes.")] = 8,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows a process takes at a time.  [default: all of its share]")
    ] = None,
    windows: Windows = None,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Steps, or a share of all.")] = 0.03,
    weight_decay: float = 0.0,
    loss: Annotated[
        str,
        typer.Option(
            help="kl, reverse_kl, jsd, skew_kl or ce; several as kl+0.5*ce; 1:0*ce or 1:0:cosine*ce fades out."
        ),
    ] = "kl",
    temperature: Annotated[float, typer.Option(help="Of the divergences.")] = 1.0,
    hidden: Annotated[
        str | None,
        typer.Option(
            help="Also cosine or mse of the last two layers, relation or attention of the last, as --loss: 0.5*cosine."
        ),
    ] = None,
    relation_heads: Annotated[
        int | None, typer.Option(min=1, help="Of relation and attention.  [default: the most that cut no head]")
    ] = None,
    lora: Annotated[int | None, typer.Option(metavar="RANK", min=1, help="Learn low-rank updates only.")] = None,
    fake_quant: Annotated[
        str | None, typer.Option(metavar="w4g64", help="Quantization-aware: learn on this grid, and save packed.")
    ] = None,
    grid: Annotated[str, typer.Option(help="Of --fake-quant: refind, or learn.")] = "refind",
    scales: Annotated[
        bool, typer.Option("--scales", help="STUDENT is quantized: only its scales, norms and biases learn.")
    ] = False,
    stable_embedding: Annotated[
        bool, typer.Option("--stable-embedding", help="Train the embedding behind a norm (folded away).")
    ] = False,
    on_policy: Annotated[
        float, typer.Option(min=0, max=1, help="Share of steps on text that the student writes.")
    ] = 0.0,
    teacher_context: Annotated[
        int | None, typer.Option(min=1, help="The teacher reads windows in pieces of so many tokens.")
    ] = None,
    seed: int = 0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again: less memory, a third slower.")
    ] = False,
    eval_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between measurements.  [default: a tenth of all]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many measurements without a better one.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between states in --work.")] = 100,
    work: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep the state here: a killed run goes on, to the same bytes."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="train.jsonl and TensorBoard.  [default: --work]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Train STUDENT to give the next tokens the probabilities that TEACHER gives them.

    \b
    Examples:
      tinycompress distill small --teacher smollm2-135m --data wikitext2 --steps 500 --work run -o healed
      tinycompress distill small --teacher smollm2-135m --data wikitext2 --fake-quant w3g64 --grid learn -o w3
      tinycompress distill w3 --teacher smollm2-135m --data wikitext2 --scales --lr 1e-3 --batch 2 --steps 32 -o w3-tuned
      tinycompress distill small --teacher smollm2-135m --loss kl+1:0*ce --hidden 0.5*cosine+relation --tokens 1000000 -o healed
      tinycompress cache-teacher meta-llama/Llama-2-7b-hf --data big.jsonl --windows 20000 --seq-len 2048 -o cache
      tinycompress distill tinyllama --cache cache --data big.jsonl --steps 5000 -o healed
      torchrun --nproc-per-node 8 -m tinycompress.cli.main distill tinyllama --teacher llama-2-7b --data big.jsonl --seq-len 2048 -o healed
    """
    from ..distillation.distill import Distill
    from ..distillation.distributed import process_group, rank
    from ..distillation.lora import LoRA
    from ..distillation.training import Training
    from ..files import check_free
    from ..graph.quant_tensor import QuantSpec

    check_free(output, overwrite)
    losses, inner = parse_losses(loss, temperature), parse_hidden(hidden, relation_heads)
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
    with process_group() as device:
        before = open_model(student)
        tokens = windows_of(before, data, length, windows or (known.windows if known else about * batch))
        measured = {
            Path(name).stem: windows_of(before, name, tokens.shape[1], 16, "test") for name in held_out or ["pydoc"]
        }
        pass_ = Distill(
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
        )
        after = pass_(before)
        if rank() == 0:
            finish(before, after, output, overwrite, log or work, patience is not None)


def cache_teacher(
    teacher: Name,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="The cache; a stopped run goes on there.")
    ],
    data: Data = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of the text.")] = 2048,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window.  [default: 512, or the context if that is shorter]")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="sample: random draws, unbiased; topk: the largest probabilities.")
    ] = "sample",
    draws: Annotated[int, typer.Option(min=1, help="Draws a token, of sample.")] = 50,
    k: Annotated[int, typer.Option(min=1, help="Probabilities a token, of topk.")] = 50,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Layer by layer: for a teacher that does not fit in memory.")
    ] = False,
    seed: int = 0,
) -> None:
    """Write down what TEACHER says of a text, once, for `tinycompress distill --cache`.

    \b
    Examples:
      tinycompress cache-teacher smollm2-135m --data wikitext2 -o cache
      tinycompress cache-teacher meta-llama/Llama-2-7b-hf --data big.jsonl --seq-len 2048 --streamed -o cache
    """
    import torch

    from ..distillation.teacher_cache import write_cache
    from ..evaluation import report

    graph = open_model(teacher)
    tokens = windows_of(graph, data, seq_len, windows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = write_cache(graph, tokens, output, kind, draws=draws, k=k, seed=seed, streamed=streamed, device=device)
    share = cache.nbytes / tokens.numel()
    print(
        f"{output}: {report.human(cache.nbytes)} for {cache.windows} windows of {cache.seq_len} tokens, {share:.1f} bytes a token"
    )


def parse_losses(text: str, temperature: float = 1.0) -> tuple[Any, ...]:
    """`kl`, `kl+ce`, `0.8*kl+0.2*ce` or `kl+1:0*ce` as losses."""
    from ..distillation.fused_loss import Loss

    return tuple(Loss(kind, weight, 1.0 if kind == "ce" else temperature) for kind, weight in weighted("--loss", text))


def parse_hidden(text: str | None, heads: int | None = None) -> tuple[Any, ...]:
    """`cosine`, `0.5*mse+relation` or none as losses of inner states; `heads` is for relations."""
    from ..distillation.hidden_losses import OF_RELATIONS, HiddenLoss

    parts = weighted("--hidden", text) if text else []
    return tuple(HiddenLoss(kind, weight, heads=heads if kind in OF_RELATIONS else None) for kind, weight in parts)


def weighted(option: str, text: str) -> list[tuple[str, Any]]:
    """(kind, weight) of parts joined by +: the weight is a number before a *, or a ramp `start:end` or `start:end:shape`."""
    from ..distillation.schedule import Ramp

    out: list[tuple[str, Any]] = []
    for part in text.split("+"):
        before, _, kind = part.rpartition("*")
        start, *ends = before.split(":") if before else ["1"]
        try:
            if ends:
                end, shape = ends if len(ends) == 2 else (*ends, "linear")
                out.append((kind.strip(), Ramp(float(start), float(end), shape)))
            else:
                out.append((kind.strip(), float(start)))
        except InputError:  # which is a ValueError
            raise
        except ValueError:
            accepted = "kinds joined by +, each behind a weight and a * if that is not 1, such as kl+0.5*ce; 1:0*ce goes from 1 to 0"
            raise InputError(option, repr(text), accepted) from None
    return out


def windows_of(graph: Graph, source: str, seq_len: int | None, at_most: int, split: str = "train") -> Tensor:
    """The first windows [n, seq_len] of a text, as many as it has and at most so many."""
    import torch

    from ..calibration.data import text

    context = graph.config.max_position
    if seq_len and seq_len > context:
        raise InputError("--seq-len", seq_len, f"at most the model's context, {context}")
    length = seq_len or min(512, context)
    enough = 40 * at_most * length  # characters: some four make a token
    ids = need_tokenizer(graph).encode(text(source, split, max_chars=enough)[:enough])[: at_most * length]
    if len(ids) < length:
        raise InputError(f"tokens in {source}", len(ids), f"at least one window of {length}")
    n = len(ids) // length
    return torch.tensor(ids[: n * length]).view(n, length)


def read_cache(folder: Path | None, teacher: str | None) -> Any:
    """The cache in a folder, of this teacher if one is named, or None of None; whether it fits the tokens, the pass checks."""
    if folder is None:
        return None
    from ..distillation.teacher_cache import open_cache

    return open_cache(folder, teacher=open_model(teacher) if teacher else None)


def finish(before: Graph, after: Graph, output: Path, overwrite: bool, log: Path | None, best: bool) -> None:
    """Saves, and says what came of it: of the best measurement if that is the result, else of the last."""
    from ..checkpoints.checkpoint import save
    from ..evaluation import report

    save(after, output, overwrite=overwrite)
    report.print_comparison(before, after, report.folder_bytes(output))
    if log:
        lines = [json.loads(line) for line in (log / "train.jsonl").read_text().splitlines()]
        measured = [line["perplexity"] for line in lines if "perplexity" in line]
        result = min(measured, key=lambda m: sum(map(math.log, m.values()))) if best else measured[-1]
        for name in measured[0]:
            print(f"perplexity on {name}: {measured[0][name]:.3f} → {result[name]:.3f}")


def register(app: typer.Typer) -> None:
    """Adds the two commands."""
    app.command()(distill)
    app.command("cache-teacher")(cache_teacher)

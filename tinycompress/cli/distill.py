"""`tinycompress distill`: a student learns from a teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import open_model
from .dry_run import print_plan
from .options import (
    AsJson,
    OptionalOut,
    Overwrite,
    TrainingText,
    count_option,
    folder_option,
    grid_option,
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
from .spellings import COUNTS, grid_of, number_of, positions_of, share_of

if TYPE_CHECKING:
    from ..files import Target


def distill(
    invocation: typer.Context,
    student: Annotated[
        str | None,
        typer.Argument(
            metavar="STUDENT", help="The model that learns: a folder, a .gguf file, a hub name or smollm2-135m."
        ),
    ] = None,
    output: OptionalOut = None,
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
        str | None,
        typer.Option("--tokens", metavar="COUNT", help="How many tokens to train on, such as 10M, instead of --steps."),
    ] = None,
    seq_len: Annotated[str | None, window_option(512)] = None,
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
        str, typer.Option(help="Updates over which the rate rises: a number, or a share of all such as 0.03 or 3%.")
    ] = "0.03",
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
    fresh: Fresh = False,
    log: Annotated[
        Path | None, folder_option("Where train.jsonl and TensorBoard files go.  [default: the folder of --work]")
    ] = None,
    overwrite: Overwrite = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
    measure: Measure = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
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
    changes = list(settings or ())
    check_fresh(fresh, work)
    apart_from: dict[str, Target | None] = {"the work folder": work, "the folder of the log": log, "the recipe": recipe}
    if recipe is not None:
        chosen = file_recipe(invocation, recipe, changes, student)
        claimed = claim_output(output, overwrite, "native", dry_run, apart_from | places_in(chosen))
        if not any(step["name"] == "Distill" for step in chosen.document.get("pass", [])):
            raise InputError(str(recipe), "no pass Distill", "tinycompress compress --recipe, for any other recipe")
    else:
        if student is None:
            raise InputError("STUDENT", "none", "a model, or --recipe FILE")
        apart_from |= {"STUDENT": student, "TEACHER": teacher, "the cache": cache, "the text": data}
        apart_from |= {f"the text {name}": name for name in held_out or []}
        claimed = claim_output(output, overwrite, "native", dry_run, apart_from)
        own_length = positions_of("--seq-len", seq_len)
        fake_quant = grid_of("--fake-quant", fake_quant)
        tokens = number_of("--tokens", budget, COUNTS)
        from ..recipe.losses import parse_hidden, parse_losses

        if teacher is None and cache is None and {part.kind for part in parse_losses(loss)} != {"ce"}:
            accepted = "one of the two (or both: a cache that must be this teacher's)"
            raise InputError("--teacher and --cache", "neither", accepted)
        known = read_cache(cache)
        length = own_length or (known.seq_len if known else None)
        steps = 1000 if steps is None and tokens is None else steps
        about = steps or math.ceil((tokens or 0) / (batch * (length or 512)))
        plain = {
            "steps": steps,
            "tokens": tokens,
            "lr": lr,
            "warmup": share_of("--warmup", warmup),
            "weight_decay": weight_decay,
            "batch": batch,
            "micro_batch": micro_batch,
            "seed": seed,
            "precision": precision,
            "checkpointing": checkpointing,
            "eval_every": max(1, about // 10) if eval_every is None else eval_every,
            "save_every": save_every,
            "patience": patience,
        }
        samples = windows or (known.windows if known else about * batch)
        step = {
            "name": "Distill",
            "teacher": {"cache": str(cache), "of": teacher} if cache else teacher,
            "training": given(plain),
            "losses": [as_table(part) for part in parse_losses(loss, temperature)],
            "hidden": [as_table(part) for part in parse_hidden(hidden, relation_heads)],
            "held_out": held_out or ["pydoc"],
            "lora": {"rank": lora, "alpha": 2.0 * lora} if lora else None,
            "fake_quant": fake_quant,
            "grid": grid,
            "scales": scales,
            "stable_embedding": stable_embedding,
            "on_policy": on_policy,
            "teacher_context": teacher_context,
        }
        text = {"text": data, "samples": samples, "seq_len": length, "in_order": True}
        document = {"model": student, "data": given(text), "pass": [given(step)]}
        chosen = option_recipe(document | ({} if measure is None else {"measure": measure}), changes)
    from ..distillation.distributed import process_group, rank
    from ..distillation.stopping import stop_on_sigterm
    from ..distillation.training_state import forget_states
    from ..model.cpu_memory import keep_memory
    from ..recipe.run import keeping_state
    from ..work_folder import described

    with process_group() as device, keep_memory(), stop_on_sigterm() as stop:
        before = open_model(str(chosen.model))
        foretold = check(chosen, before)
        if claimed is None:
            return print_plan(chosen, before, foretold, output, work)
        single = len(foretold) == 1
        state = work if single or work is None else work / "training"
        if fresh and state is not None:
            forget_states(state)
        adapt = keeping_state(state, log or state, stop)
        made = run(chosen, before, None if single else work, typed(invocation), adapt=adapt, device=device, fresh=fresh)
        if rank() == 0:
            held_out_values = result_of(log or state, patience is not None)
            write(made, chosen, claimed, as_json, held_out=held_out_values)
            for name, (first, last) in {} if as_json else held_out_values.items():
                print(f"perplexity on {name}: {first:.3f} → {last:.3f}")
            if single and work is not None:
                typer.echo(described(work), err=True)


def given(table: dict[str, Any]) -> dict[str, Any]:
    """A table without the values that are None, which TOML does not know; nested tables likewise."""
    inner = {key: given(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in inner.items() if value is not None and value != []}


def as_table(loss: Any) -> dict[str, Any]:
    """A loss as a recipe has it: what is not the default."""
    whole = dataclasses.asdict(loss)
    default = dataclasses.asdict(type(loss)())
    return given({key: value for key, value in whole.items() if key == "kind" or value != default[key]})


def read_cache(folder: Path | None) -> Any:
    """The cache in a folder; None without one."""
    if folder is None:
        return None
    from ..distillation.teacher_cache import open_cache

    return open_cache(folder)


def result_of(log: Path | None, best: bool) -> dict[str, tuple[float, float]]:
    """Perplexities (before, after) by the name of the text: of the best measurement if that is the result, else of the
    last; none without a log."""
    if log is None:
        return {}
    lines = [json.loads(line) for line in (log / "train.jsonl").read_text().splitlines()]
    measured = [line["perplexity"] for line in lines if "perplexity" in line]
    result = min(measured, key=lambda values: sum(map(math.log, values.values()))) if best else measured[-1]
    return {name: (measured[0][name], result[name]) for name in measured[0]}

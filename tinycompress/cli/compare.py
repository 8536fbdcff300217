"""`tinycompress compare`: the answers of two models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .arguments import need_tokenizer, open_model, runnable
from .options import AsJson, Model
from .sampling_options import MaxNewTokens


def compare(
    a: Model,
    b: Annotated[str, typer.Argument(metavar="OTHER", help="The model to compare with, of any of these forms.")],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A prompt a line, or JSON lines with prompt, messages or another shape of conversations, "
            "whose last answer is left out.",
        ),
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Go on from prompts, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 64,
    as_json: AsJson = False,
) -> None:
    """Lay the answers of two models side by side, and mark how far they agree.

    Both answer greedily and without penalties, through their chat templates if they have one. Agreement is counted in
    tokens of MODEL from the first one on.

    \b
    Examples:
      tinycompress compare smollm2-135m small --prompts questions.txt
      tinycompress compare smollm2-135m small-onnx --prompts chat.jsonl --json
    """
    asked = read_prompts(prompts)
    first = open_model(a)
    tokenizer = need_tokenizer(first)
    texts = [answered(a, first, asked, raw, max_new_tokens)]
    del first
    texts.append(answered(b, open_model(b), asked, raw, max_new_tokens))
    rows = []
    for prompt, one, other in zip(asked, *texts):
        ids = [tokenizer.encode(text) for text in (one, other)]
        agree = next((i for i, (x, y) in enumerate(zip(*ids)) if x != y), min(map(len, ids)))
        rows.append(
            {
                "prompt": prompt,
                "answers": [one, other],
                "tokens": [len(found) for found in ids],
                "agree": agree,
                "same": ids[0] == ids[1],
                "parted": [tokenizer.decode(found[agree:]) for found in ids],
            }
        )
    if as_json:
        print(json.dumps({"models": [a, b], "same": sum(r["same"] for r in rows), "answers": rows}, indent=2))
    else:
        show(a, b, rows)


def read_prompts(path: Path) -> list[Any]:
    """Prompts, each a text or the messages that await an answer."""
    from ..calibration.rows import contents, read_json_rows

    if path.suffix not in (".json", ".jsonl"):
        try:
            found: list[Any] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("--prompts", f"{path}: {error}", "a file of text, or of JSON lines") from None
    else:
        found = []
        for place, row in read_json_rows(path):
            if isinstance(row, dict) and isinstance(row.get("prompt"), str | list) and "messages" not in row:
                row = {"text": row["prompt"]} if isinstance(row["prompt"], str) else {"messages": row["prompt"]}
            content = next(contents([(place, row)]))[1]
            if not isinstance(content, str) and content[-1]["role"] == "assistant":
                content = content[:-1]
            if not content:
                raise InputError(place, "no prompt", "a text, or messages before the answer")
            found.append(content)
    if not found:
        raise InputError("--prompts", f"nothing in {path}", "at least one prompt")
    return found


def answered(name: str, graph: Any, prompts: list[Any], raw: bool, max_new_tokens: int) -> list[str]:
    """The answers of one model, as text."""
    import torch

    from ..checkpoints.chat_rendering import ChatTemplate

    tokenizer = need_tokenizer(graph)
    template = None if raw or not tokenizer.config.get("chat_template") else ChatTemplate.of(tokenizer)
    engine = runnable(name, graph)
    out = []
    for prompt in prompts:
        if template is None:
            if not isinstance(prompt, str):
                found = "none in use" if raw else f"none in {name}"
                raise InputError("chat template", found, "prompts that are text, or models with a template")
            ids = tokenizer.encode(prompt, add_special_tokens=True)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = template.ids(messages, add_generation_prompt=True)
        new = engine.generate(torch.tensor([ids]), max_new_tokens, temperature=0.0, repetition_penalty=1.0)
        out.append(tokenizer.decode(new.tolist(), skip_special_tokens=True))
    return out


def show(a: str, b: str, rows: list[dict[str, Any]]) -> None:
    """A table: what both say once, then what each goes on with."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        table = Table(title=Text(prompt), title_justify="left", title_style="bold", expand=True, show_lines=False)
        table.add_column(Text(a), ratio=1)
        table.add_column(Text(b), ratio=1)
        cells = []
        for answer, parted in zip(row["answers"], row["parted"]):
            common = answer[: len(answer) - len(parted)] if answer.endswith(parted) else ""
            rest = answer[len(common) :]
            cells.append(Text.assemble((common, "green"), *([("▸" + rest, "bold red")] if not row["same"] else [])))
        table.add_row(*cells)
        console.print(table)
        agreed = "the same" if row["same"] else f"part at the ▸, after {row['agree']}"
        console.print(f"{agreed}: {row['tokens'][0]} and {row['tokens'][1]} tokens\n", highlight=False)
    console.print(f"{sum(row['same'] for row in rows)} of {len(rows)} answers are the same", highlight=False)

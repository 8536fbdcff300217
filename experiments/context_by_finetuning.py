"""A short fine-tune takes a model to 4·L: perplexity there as at L before, and passkeys read back from every depth.

Papers: position interpolation (arXiv:2306.15595) and YaRN (arXiv:2309.00071) reach their published perplexity at long
lengths after some hundred steps of fine-tuning (4k → 8k, Proof-pile at 8k: PI 3.34, YaRN 3.35); passkey retrieval as in
Landmark Attention (arXiv:2305.16300).

Protocol: the model is stretched to 4·L without training, then learns on windows of 4·L with the true next token as target
(CE), in rounds; after each round come windows of L, on which it follows the model that it was (forward KL): the
short-context teacher keeps what was there. A share of the long windows are passkey prompts, of lengths from L/4 to 4·L
packed to 4·L: a model this small does not know the task, so it must be part of what it learns, and retrieval says that
positions far apart are told from one another, not that the model was taught to follow instructions. Keys of the test are
drawn by another seed. Evaluation text is held out: of its own kind (`self`, see context_form.py), and a real one.

Claims, on the same tokens, paired by window of 4·L (for the model before: the mean of its four windows of L):
perplexity at 4·L is no worse than the model's before, at L; perplexity at L is kept; passkeys are read back at every depth.
With `self` the model before is the very distribution of the text, so nothing can be better: there "no worse" allows 1%.

    python experiments/context_by_finetuning.py --model stories260K --text self wikitext2 --training wikitext2

The training state is kept in --work, so a run that was killed takes up where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from context_form import HERE, Rows, named, nll_of, stream
from form import Finding
from torch import Tensor

from tinycompress.checkpoint import load
from tinycompress.evaluate import Interval, paired_difference
from tinycompress.graph import Graph
from tinycompress.long_context import full_windows, perplexity_interval
from tinycompress.losses import Loss
from tinycompress.passes.distill import Distill
from tinycompress.passes.rope import ScaleRope
from tinycompress.passkey import Passkey, heat_map, passkey
from tinycompress.training import Training

TIMES = 4
TASK = Passkey(intro="Find the pass key.", digits=5)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MARGIN = 0.01  # nats a token, see above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, a GGUF file, a hub name, or smollm2-135m (default)")
    parser.add_argument("--text", nargs="+", default=["wikitext2"], help="evaluation: self, or a text's path or name (default: wikitext2)")
    parser.add_argument("--training", nargs="+", default=["wikitext2"], help="training texts beside `self`, their train split (default: wikitext2)")
    parser.add_argument("--method", default="ntk", help="how the context is stretched before training (default: ntk)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="steps a round on long windows (default: 100)")
    parser.add_argument("--short-steps", type=int, default=25, help="steps a round on short windows, after them (default: 25)")
    parser.add_argument("--batch", type=int, default=4, help="long windows a step (default: 4)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=53248, help="evaluation tokens a text (default: 53,248)")
    parser.add_argument("--trials", type=int, default=10, help="keys a depth and length (default: 10)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tinycompress-context", help="training states")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a few steps, nothing written")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.short_steps, args.batch, args.tokens, args.trials = 1, 2, 1, 2, 0, 1
    before = load(args.model, dtype=torch.float32)
    protocol: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("work", "quick")}
    protocol |= {"model": named(args.model), "text": [named(t) for t in args.text], "training": [named(t) for t in args.training]}
    rows = Rows(f"context_by_finetuning_{protocol['model']}", (__doc__ or "").splitlines()[0], protocol, how(protocol, before), not args.quick)
    after = fine_tuned(before, args)
    findings = [finding for text in args.text for finding in compare(before, after, text, args, rows)]
    rows.finish(findings + retrieval(before, after, args, rows))


def how(p: dict[str, Any], graph: Graph) -> str:
    L, steps = graph.config.max_position, p["rounds"] * p["steps"]
    return (
        f"- `context_by_finetuning`: {p['model']} from {L} to {TIMES * L} by {p['method']}, {steps} steps of {p['batch']} × {TIMES * L} tokens "
        f"of {', '.join(['self', *p['training']])} and passkeys; `python experiments/context_by_finetuning.py --model {p['model']} "
        f"--text {' '.join(p['text'])} --training {' '.join(p['training'])}`."
    )


def fine_tuned(before: Graph, args: argparse.Namespace) -> Graph:
    """The rounds: long windows with CE, then short ones behind the model as it was."""
    L = before.config.max_position
    graph = ScaleRope(TIMES * L, args.method)(before)
    for r in range(args.rounds):
        long = long_windows(before, args, seed=10 + r)
        training = Training(steps=args.steps, batch=args.batch, micro_batch=1, lr=args.lr * (1 - r / args.rounds), seed=r, checkpointing=True)
        work = None if args.quick else args.work / f"{named(args.model)}-{r}"
        graph = Distill(long, None, training, losses=(Loss("ce"),), work=work and work / "long")(graph)
        if args.short_steps:
            short = stream(before, "self", 4 * args.batch * args.short_steps * L, seed=100 + r).view(-1, L)
            quieter = dataclasses.replace(training, steps=args.short_steps, batch=4 * args.batch, micro_batch=4, lr=training.lr / 4)
            graph = Distill(short, before, quieter, work=work and work / "short")(graph)
    return graph


def long_windows(graph: Graph, args: argparse.Namespace, seed: int) -> Tensor:
    """Windows [steps · batch, 4·L]: a third each of the model's own text, real text, and passkey prompts, mixed by the seed."""
    T, n = TIMES * graph.config.max_position, args.steps * args.batch
    third = -(-n // 3)
    own = stream(graph, "self", third * T, seed=seed)[: third * T].view(-1, T)
    real = [stream(graph, text, 2 * T, seed=0, split="train") for text in args.training] if args.quick else [whole(graph, t) for t in args.training]
    pool = torch.cat(real)
    rng = random.Random(seed)
    starts = [rng.randrange(max(1, len(pool) - T)) for _ in range(third)]
    keys = [passkey_window(graph, T, rng) for _ in range(third)]
    mixed = torch.cat((own, torch.stack([pool[i : i + T] for i in starts]), torch.stack(keys)))
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))[:n]]


def whole(graph: Graph, text: str) -> Tensor:
    """All of a real training text (of a hub data set, its first million characters)."""
    from tinycompress import data

    assert graph.tokenizer
    return torch.tensor(graph.tokenizer.encode(data.text(text, "train", max_chars=1_000_000)))


def passkey_window(graph: Graph, T: int, rng: random.Random) -> Tensor:
    """Prompts with their answers, one of T, or several that together are T."""
    assert graph.tokenizer
    n, parts = rng.choice((1, 2, 4, 16)), []
    for _ in range(n):
        parts += TASK.prompt(graph.tokenizer, T // n, rng.random(), TASK.key(rng), graph.config.bos_token_id)
    return torch.cat(parts)


def compare(before: Graph, after: Graph, text: str, args: argparse.Namespace, rows: Rows) -> list[Finding]:
    """Before at L, after at 4·L and at L, on the same tokens."""
    L, name = before.config.max_position, named(text)
    windows = max(1, args.tokens // (TIMES * L))
    ids = stream(before, text, windows * TIMES * L, seed=1)
    untrained = ScaleRope(TIMES * L, args.method)(before)

    def row(what: str, graph: Graph, length: int) -> Tensor:
        def measure() -> dict[str, Any]:
            nll = full_windows(graph.module(), ids, length, windows * TIMES * L // length)
            interval = perplexity_interval(nll)
            values = [round(x, 4) for x in (interval.value, interval.low, interval.high)]
            return {"model": what, "text": name, "length": length, "perplexity": values, "nll": [round(x, 6) for x in nll.tolist()]}

        nll = nll_of(rows.get(f"{name} {what} at {length}", measure))
        return nll.view(windows, -1).mean(1)  # by window of 4·L

    original, stretched = row("before", before, L), row("stretched", untrained, TIMES * L)
    far, near = row("after", after, TIMES * L), row("after", after, L)
    margin, at = MARGIN if text == "self" else 0.0, f"{named(args.model)}, text {name}"
    gain = paired_difference(stretched, far)
    worse, kept = paired_difference(far, original), paired_difference(near, original)
    limit = f"≤ {margin} nats a token"
    return [
        Finding(f"training wins back what stretching loses at {TIMES}·L, {at}", "> 0", gain, "> 0 nats a token", gain.low > 0),
        Finding(f"NLL at {TIMES}·L after, less that at L before, {at}", "≤ 0", worse, limit, worse.value <= margin),
        Finding(f"NLL at L after, less that at L before, {at}", "about 0", kept, limit, kept.value <= margin),
    ]


def retrieval(before: Graph, after: Graph, args: argparse.Namespace, rows: Rows) -> list[Finding]:
    """Keys read back by depth at L, 2·L and 4·L; the picture beside the results."""
    L = before.config.max_position
    found = {}
    for name, graph, lengths in (("before", before, [L]), ("after", after, [L, 2 * L, TIMES * L])):
        model = graph.module()
        found[name] = passkey(model, graph.tokenizer, lengths, DEPTHS, args.trials, TASK, seed=7)
        rows.get(f"passkey {name}", found[name].to_dict)
    if not args.quick:
        heat_map(found, HERE / "results" / f"context_by_finetuning_{named(args.model)}_passkey.png")
    shares = [right / args.trials for right in found["after"].right[-1]]
    least = min(shares)
    ours = Interval(least, least, max(shares))
    return [Finding(f"passkeys read back at {TIMES}·L, worst depth (… best), {named(args.model)}", "1", ours, "≥ 0.9", least >= 0.9)]


if __name__ == "__main__":
    main()

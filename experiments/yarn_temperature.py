"""YaRN's temperature: does scaling cos and sin by 0.1·ln s + 1 help, and is that the best value?

Paper: YaRN (arXiv:2309.00071), section 3.3 and appendix A.2: with the frequencies of NTK-by-parts, a factor √(1/t) on
cos and sin improves perplexity over the whole extended window of LLaMA models, and the best one is about 0.1·ln s + 1.

Claim, at s = 4: the formula's factor is better than 1 (no temperature), and no other factor of the sweep is clearly
better.

Protocol: full windows of s·L tokens that do not overlap, no training; attention factors from 0.9 to 1.3, and the
formula's; mean NLL a window, paired by window, 95% bootstrap. Texts as in context_form.py.

    python experiments/yarn_temperature.py --model stories260K --text self wikitext2
    python experiments/yarn_temperature.py --model smollm2-135m --text wikitext2 --times 2 --tokens 65536

Every row is written when it is measured, and a rerun takes up from there.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

import torch
from context_form import Rows, named, nll_of, stream
from form import Finding
from torch import Tensor

from tinycompress.checkpoints.checkpoint import load
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.evaluation.long_context import full_windows, perplexity_interval
from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.graph import Graph
from tinycompress.model.cpu_memory import keep_memory

SWEEP = (0.9, 1.0, 1.05, 1.1, 1.2, 1.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a folder, a GGUF file, a hub name, or smollm2-135m (default)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=["wikitext2"],
        help="self, or a text's path or name (default: wikitext2, its test split)",
    )
    parser.add_argument("--times", nargs="+", type=int, default=[4], help="factors s (default: 4)")
    parser.add_argument(
        "--tokens", type=int, default=53248, help="evaluation tokens a factor and text (default: 53,248)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, nothing written")
    args = parser.parse_args()
    args.tokens = 0 if args.quick else args.tokens
    graph = load(args.model, dtype=torch.float32)
    model, texts = named(args.model), [named(t) for t in args.text]
    protocol = {
        "model": model,
        "text": texts,
        "times": args.times,
        "tokens": args.tokens,
        "trained": graph.config.max_position,
    }
    how = (
        f"- `yarn_temperature`: {model} (trained on {protocol['trained']}), about {args.tokens:,} tokens a factor "
        f"of {' and '.join(texts)}; "
        f"`python experiments/yarn_temperature.py --model {model} --text {' '.join(texts)} --times "
        f"{' '.join(map(str, args.times))} "
        f"--tokens {args.tokens}`."
    )
    rows = Rows(f"yarn_temperature_{model}", (__doc__ or "").splitlines()[0], protocol, how, not args.quick)
    findings = []
    for text in args.text:
        ids = stream(graph, text, max(args.tokens, max(args.times) * graph.config.max_position), seed=1)
        for times in args.times:
            findings += sweep(graph, text, ids, times, args.tokens, rows)
    rows.finish(findings)


def sweep(graph: Graph, text: str, ids: Tensor, times: int, tokens: int, rows: Rows) -> list[Finding]:
    """All factors at one s, then the two claims."""
    context = times * graph.config.max_position
    formula = round(ScaleRope(context, "yarn")(graph).config.rope.attention_scale(), 4)

    def measure(factor: float) -> dict[str, Any]:
        config = ScaleRope(context, "yarn")(graph).config
        config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, attention_factor=factor))
        nll = full_windows(graph.replace(config=config).module(), ids, context, max(1, tokens // context))
        interval = perplexity_interval(nll)
        found = {
            "factor": factor,
            "text": named(text),
            "length": context,
            "windows": len(nll),
            "nll": [round(x, 6) for x in nll.tolist()],
        }
        return found | {"perplexity": [round(x, 4) for x in (interval.value, interval.low, interval.high)]}

    nll = {
        f: nll_of(rows.get(f"{named(text)} s={times} factor {f}", partial(measure, f)))
        for f in sorted({*SWEEP, formula})
    }
    best = min(nll, key=lambda f: nll[f].mean().item())
    helps = paired_difference(nll[1.0], nll[formula])
    regret = paired_difference(nll[formula], nll[best])
    at = f"s = {times}, {rows.result['protocol']['model']}, text {named(text)}"
    return [
        Finding(
            f"the formula's {formula} beats 1 (NLL difference), {at}", "> 0", helps, "> 0 nats a token", helps.low > 0
        ),
        Finding(
            f"the best of the sweep, {best}, is no better than {formula}, {at}",
            "about 0",
            regret,
            "≤ 0.01 nats a token",
            regret.value <= 0.01,
        ),
    ]


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()

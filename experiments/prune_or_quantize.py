"""At equal bytes, fewer bits beat fewer channels: quantizing alone loses less than pruning and then quantizing.

Paper: Pruning vs Quantization: Which is Better? (arXiv:2307.02973): in most settings, and at moderate compression,
quantization; pruning only where compression is extreme.

Claim: GPTQ to 3 bits loses less than a structured cut followed by GPTQ to 4 bits with the same bytes in its layers.

Protocol: groups of 64, every linear but the head. The share kept is the ratio of the two grids' bits a weight, scales
included, so the layers' bytes agree to the nearest width. The cut is `Prune` as it comes, with the same calibration
text. The difference of the NLLs is taken on paired windows, averaged over calibration seeds; 95% bootstrap over
windows. It holds where the lower end of the interval is above 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from form import Bench, Finding, run

from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.pruning.prune import Prune
from tinycompress.quantization.gptq import GPTQ

FEW, MANY, GROUP = 3, 4, 64


def prune_or_quantize(bench: Bench) -> Iterator[Finding]:
    scale_bits = 8 * bench.graph.dtype.itemsize / GROUP
    share = (FEW + scale_bits) / (MANY + scale_bits)
    runs: dict[str, list[torch.Tensor]] = {"quantized": [], "pruned, then quantized": []}
    sizes = {}
    for seed in bench.seeds:
        tokens = bench.calibration(seed)
        pruned = Prune(tokens, f"params={share:.4f}", multiple_of=GROUP)(bench.graph)
        for name, graph, bits in (("quantized", bench.graph, FEW), ("pruned, then quantized", pruned, MANY)):
            out = GPTQ(tokens, QuantSpec(bits, GROUP))(graph)
            sizes[name] = layer_bytes(out)
            runs[name].append(bench.nll(out))
    nll = {name: torch.stack(values).mean(0) for name, values in runs.items()}
    ours = paired_difference(nll["pruned, then quantized"], nll["quantized"])
    figures = ", ".join(f"{name} {nll[name].mean().exp():.2f} in {sizes[name] / 1e6:.1f} MB" for name in nll)
    yield Finding(
        f"w{FEW} over {share:.0%} of the parameters at w{MANY}, in nats ({figures})", "> 0", ours, "> 0", ours.low > 0
    )


def layer_bytes(graph: Graph) -> int:
    """Bytes of everything but the embedding and the head."""
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    return sum(entry.nbytes for name, entry in graph.weights.items() if name not in ends)


if __name__ == "__main__":
    run(prune_or_quantize, __doc__)

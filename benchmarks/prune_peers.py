"""Other libraries' own pruning recipes on the model, data and windows of prune.py, each in an environment of its own.

    python benchmarks/prune_peers.py --peer torch-pruning --python PEER_VENV/bin/python --calibration … --evaluation …
    python benchmarks/prune_peers.py --peer llm-pruner --python PEER_VENV/bin/python --checkout LLM-PRUNER …

  torch-pruning   (pip install torch-pruning==1.6.1 torch transformers==4.48.3) the recipe of its
                  examples/LLMs/prune_llm.py:
                  the L2 norm of everything that is cut together, one ratio for hidden width, FFN channels and heads,
                  round_to=4. With transformers 4.57 its search for what depends on a k_proj never ends under
                      grouped-query
                  attention: the indices grow past every width (its issue 527)
  llm-pruner      (a checkout of github.com/horseee/LLM-Pruner; pip install torch transformers) the recipe of its
                  llama3.py:
                  Taylor param_first on 10 examples of 64 tokens (of the calibration text here), block-wise, the first
                      4 and
                  the last 2 blocks left alone; attention too where the ratio takes less than a whole KV head

No retraining. The ratio is searched for until the share of the non-embedding parameters is met to 0.2% (Torch-Pruning:
1%), or as nearly as the library's steps allow; "kept" says how nearly. The perplexity is transformers', by prune.py's
protocol, and the rows go into its results/prune.json. Nothing of tinycompress is imported in the peer's process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PEERS = ("torch-pruning", "llm-pruner")
TRIES = 8  # models pruned in the search for a ratio
CLOSE = {
    "torch-pruning": 0.01,
    "llm-pruner": 0.002,
}  # how near to the share is enough: the former takes minutes a model


def torch_pruning(model: Any, ratio: float, calibration: torch.Tensor) -> None:
    import torch_pruning as tp

    heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = model.config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = model.config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=calibration[:1, :8],
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda out: out.logits,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def llm_pruner(model: Any, ratio: float, calibration: torch.Tensor) -> None:
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layers = model.model.layers
    blocks = range(min(4, len(layers) // 3), len(layers) - 2)
    keys = layers[0].self_attn.k_proj.out_features
    whole_heads = (keys - int(keys * (1 - ratio))) // layers[
        0
    ].self_attn.head_dim  # its step ends in an error where this is 0
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pruner = tp.pruner.MetaPruner(
        model,
        calibration[:2, :8],
        importance=hf_llama_pruner.TaylorImportance(group_reduction="sum", taylor="param_first"),
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=ratio,
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={layer.self_attn.k_proj: layer.self_attn.head_dim for layer in layers},
        customized_pruners={LlamaRMSNorm: hf_llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        output_transform=lambda out: out.logits,  # the cache beside them has no gradients
        root_instances=[layers[i].self_attn.k_proj for i in blocks if whole_heads]
        + [layers[i].mlp.gate_proj for i in blocks],
    )
    model.zero_grad()
    examples = calibration[:10, :64]
    model(examples, labels=examples).loss.backward()
    pruner.step()
    model.zero_grad()
    for layer in layers:
        layer.self_attn.num_key_value_groups = (
            layer.self_attn.q_proj.out_features // layer.self_attn.k_proj.out_features
        )


PRUNE: dict[str, Callable[[Any, float, torch.Tensor], None]] = {
    "torch-pruning": torch_pruning,
    "llm-pruner": llm_pruner,
}


def body(model: Any) -> int:
    """Parameters but those of the embedding and the head."""
    return sum(p.numel() for p in model.model.layers.parameters()) + sum(
        p.numel() for p in model.model.norm.parameters()
    )


def search(make: Callable[[float], Any], whole: int, share: float, close: float) -> tuple[Any, float]:
    """The model nearest to `share` of `whole` parameters and its ratio, by bisection."""
    low, high, best = 0.0, 1.0, None
    ratio = 1 - share
    for _ in range(TRIES):
        model = make(ratio)
        kept = body(model) / whole
        print(f"ratio {ratio:.4f}: {kept:.3f} kept", file=sys.stderr, flush=True)
        if best is None or abs(kept - share) < abs(body(best[0]) / whole - share):
            best = (model, ratio)
        if abs(kept - share) < close:
            break
        low, high = (ratio, high) if kept > share else (low, ratio)
        ratio = (low + high) / 2
    assert best is not None
    return best


@torch.no_grad()
def nll(model: Any, windows: torch.Tensor) -> list[float]:
    """Mean next-token NLL of each window, in nats."""
    out = []
    for ids in windows:
        hidden = model.model(ids[None]).last_hidden_state[0, :-1]
        losses = [
            torch.nn.functional.cross_entropy(model.lm_head(h).float(), t, reduction="none")
            for h, t in zip(hidden.split(512), ids[1:].split(512))
        ]
        out.append(float(torch.cat(losses).double().mean()))
    return out


def worker(args: argparse.Namespace) -> None:
    """In the peer's environment: one row as a line of JSON."""
    import math
    from importlib import metadata

    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    if args.checkout:
        sys.path.insert(0, str(args.checkout))
    torch.manual_seed(0)
    tokens = load_file(args.worker / "tokens.safetensors")

    def whole() -> Any:
        # eager attention: both libraries read what depends on what from the graph of single operations
        return LlamaForCausalLM.from_pretrained(args.worker, attn_implementation="eager").float().eval()

    def make(ratio: float) -> Any:
        model = whole()
        with torch.enable_grad():
            PRUNE[args.peer](model, ratio, tokens["calibration"])
        return model

    parameters = body(whole())
    model, ratio = search(make, parameters, args.share, CLOSE[args.peer])
    model.config._attn_implementation = "sdpa"
    values, size = nll(model, tokens["evaluation"]), model.model.layers[0].self_attn.head_dim

    def heads(linear: torch.nn.Linear) -> int:
        return linear.out_features // size

    row = {
        "recipe": args.peer,
        "share": args.share,
        "kept": body(model) / parameters,
        "perplexity": math.exp(sum(values) / len(values)),
        "nll": values,
        "ratio": ratio,
        "layers": " ".join(
            f"{heads(m.self_attn.q_proj)}/{heads(m.self_attn.k_proj)}/{m.mlp.gate_proj.out_features}"
            for m in model.model.layers
        ),
        "hidden": model.lm_head.in_features,
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", *(["torch-pruning"] if args.peer == "torch-pruning" else []))
        },
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--python", help="the interpreter of the peer's environment")
    parser.add_argument("--checkout", type=Path, help="LLM-Pruner's repository")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.8, 0.7, 0.5, 0.9))
    parser.add_argument("--quick", action="store_true", help="a smoke test: two windows, one share, nothing written")
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if not args.python:
        parser.error("--python PEER_VENV/bin/python")
    if args.quick:
        args.samples, args.windows, args.shares = 10, 2, [0.8]

    import prune
    from safetensors.torch import save_file

    from tinycompress.calibration import data
    from tinycompress.checkpoints.checkpoint import save
    from tinycompress.evaluation.perplexity import environment
    from tinycompress.files import read_json, write_json

    protocol = prune.protocol(args)
    found = (
        read_json(prune.RESULTS) if prune.RESULTS.exists() and not args.quick else {"protocol": protocol, "rows": []}
    )
    if found["protocol"] != protocol:
        parser.error(f"{prune.RESULTS} was measured with {found['protocol']}, not {protocol}")
    done = {(row["recipe"], row["share"]) for row in found["rows"]}
    graph, calibration = prune.opened(args)
    evaluation = data.tokens(
        args.evaluation, graph.tokenizer, args.windows, min(2048, graph.config.max_position), split="test"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(graph, folder)
        save_file({"calibration": calibration, "evaluation": evaluation}, folder / "tokens.safetensors")
        del graph
        for share in (s for s in args.shares if (args.peer, s) not in done):
            command = [args.python, __file__, "--peer", args.peer, "--worker", str(folder), "--share", str(share)]
            command += [f"--checkout={args.checkout.absolute()}"] if args.checkout else []
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                print(f"{args.peer} at {share}: failed, left out", file=sys.stderr)
                continue
            row = json.loads(ran.stdout.splitlines()[-1])
            print(f"{args.peer} at {share}: perplexity {row['perplexity']:.2f}, {row['kept']:.3f} kept")
            if not args.quick:
                latest = read_json(prune.RESULTS)
                write_json(
                    prune.RESULTS, latest | {"rows": [*latest["rows"], row | {"machine": environment()["machine"]}]}
                )


if __name__ == "__main__":
    main()

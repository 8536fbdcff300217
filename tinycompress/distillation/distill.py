"""Distillation: a student learns the distribution that a teacher gives each next token.

    L = Σ_k weight_k · mean over tokens of D_k(teacher ‖ student)  (+ Σ_j weight_j · distance of inner states)

Forward KL alone at temperature 1 is the default: for base models it beat CE, mixtures of the two and reverse KL
(Minitron: Compact Language Models via Pruning and Knowledge Distillation, arXiv:2407.14679). Logit losses are fused
with the head, chunk by chunk (fused_loss.py), so that [tokens × vocabulary] never exists. The teacher runs beside the
student, or was cached once; on-policy, the student writes part of the text itself (GKD, arXiv:2306.13649).

The student learns with all its weights, through low-rank updates (lora.py), seeing the grid that it will be packed on,
or, packed already, by its scales (fake_quant.py). Under torchrun student and teacher are split over the processes
(distributed.py): the same pass. Letters: N windows, B windows of a micro-batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.walk import check_calibration
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import feeds
from ..quantization.fake_quant import GRIDS
from ..quantization.linear_specs import named_specs, targets
from .distributed import shard, world_size
from .fused_loss import Loss
from .hidden_losses import HiddenLoss
from .lora import LoRA, add_lora
from .objective import Objective
from .student import Network, add_fake_quant, add_packed, add_stable_embedding
from .teacher_checks import check_cache, check_teacher
from .trained_weights import matching, train_only, trained_weights
from .training import Training
from .training_loop import train

if TYPE_CHECKING:
    from .teacher_cache import TeacherCache


@dataclass(frozen=True)
class Distill:
    """Trains a graph to follow a teacher. Under torchrun the model is split over the processes.

    Fields:
        tokens: training windows [N, T] of ids, or an iterable of them.
        teacher: a Graph, a cache of one (`open_cache`), or None; then the losses can only be ce.
        training: steps, learning rate, batch, seed and the rest of the loop.
        losses: of the logits; their weights may be `Ramp`s over the run.
        hidden: losses of inner states and of attention relations.
        held_out: windows [N, T], or several by name, whose perplexities are logged; one should be of another corpus.
        lora: low-rank updates learn instead of the weights.
        fake_quant: a grid (a spec, or specs by the name of a linear) that the forward sees. The result is packed:
            exactly what the last forward saw.
        grid: of fake_quant: "refind" searches the scales in every step, "learn" trains them (fake_quant.py).
        scales: of a graph that is packed already the scales learn, with norms and biases; integers and tables stay.
        stable_embedding: the embedding learns behind a norm, which is folded away (stable_embedding.py).
        on_policy: the share of the steps whose second half the student writes itself, at temperature 1.
        teacher_context: the teacher reads longer windows in pieces of so many tokens, each from position 0. A teacher
            of a short context then keeps what its student, stretched to a longer one, knew. Pieces should begin where
            documents do.
        trainable: patterns of the parameters or modules that learn, as in a shell ("model.norm", "*.mlp.*"); all others
            stay as they are. Empty: all learn. Only for plain weights.
        token_weights: [N, T], how much each token counts as one to predict (0: not at all), for all losses of logits or
            for each by its kind. Each loss of a step is divided by the sum of its weights.
        work: folder of the training state, found again by a rerun.
        log: folder of train.jsonl.
        stop: asked after every step; where it is true, the state is saved in `work` and `Stopped` is raised.
        device: where the training runs, such as "cuda". Default None: the device of `tokens`; under torchrun with GPUs,
            that of the process. The weights that learned return to where they were.
        progress: show a bar.

    Errors: an `InputError` for fields that do not go together, or that do not fit the graph (`check`).
    """

    tokens: Tensor = field(repr=False, compare=False)
    teacher: Graph | TeacherCache | None = field(repr=False, compare=False)
    training: Training
    losses: tuple[Loss, ...] = (Loss(),)
    hidden: tuple[HiddenLoss, ...] = ()
    held_out: Tensor | Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    lora: LoRA | None = None
    fake_quant: QuantSpec | Mapping[str, QuantSpec] | None = None
    grid: str = "refind"
    scales: bool = False
    stable_embedding: bool = False
    on_policy: float = 0.0
    teacher_context: int | None = None
    trainable: tuple[str, ...] = ()
    token_weights: Tensor | Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    work: Path | None = field(default=None, repr=False, compare=False, metadata={"key": False})
    log: Path | None = field(default=None, repr=False, compare=False, metadata={"key": False})
    stop: Callable[[], bool] | None = field(default=None, repr=False, compare=False, metadata={"key": False})
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if self.fake_quant is not None:
            object.__setattr__(self, "fake_quant", named_specs(self.fake_quant))
        kinds = {loss.kind for loss in self.losses}
        if not self.losses:
            raise InputError("Distill.losses", "none", "at least one Loss")
        if self.teacher is None and kinds != {"ce"}:
            raise InputError(
                "Distill.teacher", f"None, with the losses {sorted(kinds)}", "a teacher, or the loss ce alone"
            )
        if not isinstance(self.teacher, Graph) and (self.hidden or self.on_policy):
            raise InputError(
                "Distill.teacher", type(self.teacher).__name__, "a Graph, for losses of hidden states or on-policy text"
            )
        if self.grid not in GRIDS:
            raise InputError("Distill.grid", repr(self.grid), " | ".join(GRIDS))
        if self.lora and self.fake_quant:
            raise InputError(
                "Distill", "lora together with fake_quant", "one of the two (a merged update would leave the grid)"
            )
        if self.scales and (self.lora or self.fake_quant or self.stable_embedding):
            raise InputError(
                "Distill.scales", "True, together with lora, fake_quant or stable_embedding", "one of them"
            )
        if self.lora and self.stable_embedding:
            raise InputError(
                "Distill",
                "lora together with stable_embedding",
                "one of the two (with LoRA the embedding does not learn)",
            )
        object.__setattr__(self, "trainable", _patterns(self.trainable))
        if self.trainable and (self.lora or self.fake_quant or self.scales or self.stable_embedding):
            raise InputError(
                "Distill.trainable",
                f"{self.trainable} together with lora, fake_quant, scales or stable_embedding",
                "plain weights, or () for all that the other field lets learn",
            )
        if not 0 <= self.on_policy <= 1:
            raise InputError("Distill.on_policy", self.on_policy, "a share of the steps, between 0 and 1")
        for kind, found in self.weights_by_kind().items():
            shape = tuple(self.tokens.shape)
            if tuple(found.shape) != shape or not bool((found >= 0).all() & found.isfinite().all()):
                raise InputError(
                    f"Distill.token_weights of {kind}",
                    f"{found.dtype} {tuple(found.shape)}",
                    f"finite numbers of at least 0, {shape}",
                )
            if self.on_policy:
                raise InputError(
                    "Distill.token_weights",
                    f"with on_policy {self.on_policy}",
                    "one of the two: of its own text all counts",
                )
        if isinstance(self.token_weights, Mapping) and self.token_weights.keys() != kinds:
            raise InputError(
                "Distill.token_weights", f"for {sorted(self.token_weights)}", f"for each of the losses: {sorted(kinds)}"
            )
        if self.teacher_context is not None:
            if not isinstance(self.teacher, Graph) or not all(loss.of_states for loss in self.hidden):
                raise InputError(
                    "Distill.teacher_context",
                    self.teacher_context,
                    "None, or a Graph as the teacher and no relations of its tokens",
                )
            if self.teacher_context < 1 or self.tokens.shape[-1] % self.piece:
                raise InputError(
                    "Distill.teacher_context",
                    self.teacher_context,
                    f"a divisor of the windows' {self.tokens.shape[-1]} tokens",
                )

    def weights_by_kind(self) -> Mapping[str, Tensor]:
        """token_weights [N, T] by kind of loss; empty if all tokens count the same."""
        given = self.token_weights
        if given is None or isinstance(given, Mapping):
            return given or {}
        return {loss.kind: given for loss in self.losses}

    @property
    def piece(self) -> int:
        """Tokens that the teacher reads at a time."""
        return min(self.teacher_context or self.tokens.shape[-1], self.tokens.shape[-1])

    def __call__(self, graph: Graph) -> Graph:
        self.check(graph)
        device = self._place()
        dtype = torch.promote_types(graph.dtype, torch.float32)
        dense = graph.dense(dtype) if self.scales else graph
        network = Network(dense, dtype=dtype, trainable=True, checkpointing=self.training.checkpointing)
        if self.trainable:
            train_only(network, matching(graph.weights, self.trainable))
        if self.lora:
            add_lora(network, graph, self.lora, self.training.seed)
        if self.fake_quant:
            add_fake_quant(network, graph, targets(graph, self.fake_quant), self.grid == "learn")
        if self.scales:
            add_packed(network, graph)
        if self.stable_embedding:
            add_stable_embedding(network)
        objective = Objective(self, graph, device)
        objective.add_width_maps(network, dtype)
        shard(network, network.blocks, device)
        parameters = dict(network.named_parameters())  # the shards: a sharded module shows whole ones while it computes
        objective.network = network
        train(
            network,
            self.tokens,
            objective,
            self.training,
            held_out=self._held_out(),
            work=None if self.work is None else Path(self.work),
            log=None if self.log is None else Path(self.log),
            key=self.key(graph) if self.work else "",
            stop=self.stop,
            progress=self.progress,
        )
        with torch.no_grad():
            quantized = targets(graph, self.fake_quant) if self.fake_quant else {}
            changed = trained_weights(graph, network, parameters, quantized, self.lora)
        return graph.replace(weights=changed, by=self)

    def check(self, graph: Graph) -> None:
        """What would fail later, as an InputError now: no weight is read."""
        check_calibration(graph, self.tokens)
        for name, windows in self._held_out().items():
            if windows.dim() != 2 or not 2 <= windows.shape[1] <= graph.config.max_position:
                raise InputError(
                    f"held-out set {name}",
                    tuple(windows.shape),
                    f"windows [N, T] of 2 … {graph.config.max_position} tokens",
                )
        if isinstance(self.teacher, Graph):
            check_teacher(self.teacher, graph, self.piece)
            for loss in self.hidden:
                loss.pairs(graph.config, self.teacher.config)
        elif self.teacher is not None:
            check_cache(self.teacher, graph, self.tokens)
        if self.scales:
            linears = [
                graph.weights.entries[f"{name}.weight"]
                for feed in feeds(graph.config)
                if feed.layer is not None
                for name in feed.readers
            ]
            if not any(isinstance(weight, QuantTensor) for weight in linears):
                raise InputError(
                    "Distill.scales", "True for a graph without a packed linear in its layers", "a quantized graph"
                )
        # the weights must still be dense, and groups must divide them
        specs = {} if self.scales else targets(graph, self.fake_quant or QuantSpec(8, None))
        if "lm_head" in specs:
            raise InputError("Distill.fake_quant", "a grid for lm_head", "linears of the layers")
        if self.grid == "learn" and any(spec.search == "lpbq" for spec in specs.values()):
            raise InputError("Distill.grid", "'learn' with lpbq scales, which have a form of their own", "'refind'")
        if self.training.batch % world_size():
            raise InputError("Training.batch", self.training.batch, f"a multiple of the {world_size()} processes")
        if self.on_policy and world_size() > 1:
            raise InputError(
                "Distill.on_policy",
                f"{self.on_policy} on {world_size()} processes",
                "one process: the student generates whole",
            )
        matching(graph.weights, self.trainable)
        if self.training.lr == 0:
            raise InputError("Training.lr", 0, "a number above 0")

    def _place(self) -> torch.device:
        """Where student and teacher compute."""
        if self.device is not None:
            return torch.device(self.device)
        if world_size() > 1 and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return self.tokens.device

    def _held_out(self) -> Mapping[str, Tensor]:
        if self.held_out is None or isinstance(self.held_out, Tensor):
            return {} if self.held_out is None else {"held_out": self.held_out}
        return self.held_out

    def key(self, graph: Graph) -> str:
        """Equal for runs that compute the same: everything but where and how often states and logs are written."""
        teacher = (
            self.teacher.fingerprint() if isinstance(self.teacher, Graph) else self.teacher and self.teacher.fingerprint
        )
        settings = asdict(replace(self.training, save_every=1))
        parts = [
            graph.fingerprint(),
            str(teacher),
            json.dumps(settings),
            f"({self.losses!r}, {self.hidden!r}, {self.lora!r}, {_spec_text(self.fake_quant)})",
        ]
        parts.append(f"{self.grid} {self.stable_embedding} {self.on_policy} {self.piece} {self.scales}")
        if self.trainable:  # a key without it is that of older versions
            parts.append(repr(self.trainable))
        digest = hashlib.sha256(" ".join(parts).encode())
        measured = self._held_out().values() if self.training.patience else ()  # what decides about stopping
        weights = [part.double() for _, part in sorted(self.weights_by_kind().items())]
        for windows in (self.tokens, *weights, *measured):
            digest.update(windows.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _patterns(trainable: object) -> tuple[str, ...]:
    if not isinstance(trainable, list | tuple) or not all(isinstance(name, str) and name for name in trainable):
        raise InputError("Distill.trainable", repr(trainable), "a tuple of patterns of names")
    return tuple(trainable)


def _spec_text(spec: object) -> str:
    """A spec as keys of training states hold it: fields in this order and by these names, whatever its repr says."""
    if not isinstance(spec, QuantSpec):
        return repr(spec)
    grid = f"bits={spec.bits}, group_size={spec.group_size}, symmetric={spec.symmetric}"
    return f"QuantSpec({grid}, scale={spec.search!r}, float_zero={spec.float_zero})"

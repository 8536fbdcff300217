"""The loss of one micro-batch of distillation: what `train` minimises.

Teacher and student read the same windows; the teacher says what each next token should be (itself, or from a cache),
and the losses of logits and of inner states make one number of it, as a part of the mean over the whole step. Letters:
B windows of a micro-batch, T positions, D hidden.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.graph import Graph
from .distributed import shard
from .fused_loss import IGNORED, HiddenTarget, TeacherTarget, fused_loss
from .hidden_losses import HiddenLoss, hidden_loss, relation_sum
from .schedule import weight_at
from .student import Network

if TYPE_CHECKING:
    from .distill import Distill


class Objective:
    """Called by `train` with the windows of a micro-batch."""

    def __init__(self, of: Distill, graph: Graph, device: torch.device) -> None:
        self.of = of
        self.network: Network | None = None  # set when it has been sharded
        self.pairs: list[tuple[HiddenLoss, int, int]] = []
        self.teacher: Network | None = None
        if isinstance(of.teacher, Graph):
            teacher = of.teacher
            self.pairs = [(loss, s, t) for loss in of.hidden for s, t in loss.pairs(graph.config, teacher.config)]
            # the CPU has fast products for float32 only; a GPU takes the teacher as it is stored
            dtype = torch.promote_types(teacher.dtype, torch.float32) if device.type == "cpu" else teacher.dtype
            self.teacher = Network(teacher, dtype=dtype)
            shard(self.teacher, self.teacher.blocks, device)
        self.widths = (graph.config.hidden_size, of.teacher.config.hidden_size if isinstance(of.teacher, Graph) else 0)

    def add_width_maps(self, network: Network, dtype: torch.dtype) -> None:
        """One [D_t, D_s] for each pair of layers of different widths, drawn by the seed."""
        generator = torch.Generator().manual_seed(self.of.training.seed)
        D_s, D_t = self.widths
        for i in (i for i, (loss, _, _) in enumerate(self.pairs) if loss.of_states and D_s != D_t):
            network.projections[str(i)] = nn.Parameter(
                (torch.randn(D_t, D_s, generator=generator) / D_s**0.5).to(dtype)
            )

    def __call__(self, ids: Tensor, index: Tensor, step: int) -> Tensor:
        """The loss of windows ids [B, T], as a part of the mean over the whole step."""
        assert self.network is not None
        network, training = self.network, self.of.training
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
        counted = ids.shape[1] - 1
        if self.of.on_policy:
            ids, labels, counted = self._own_text(ids, labels, index, step)
        target, theirs = self._target(ids, index)
        share, weights = len(ids) / training.batch, self._token_weights(index, step)
        autocast, total_steps = training.autocast(ids.device), training.total_steps(*self.of.tokens.shape)
        losses = [part.at(step, total_steps) for part in self.of.losses]

        def loss(hidden: Tensor, head: Tensor, states: list[Tensor]) -> Tensor:
            with torch.autocast(ids.device.type, enabled=False):
                if autocast._enabled:
                    hidden, head = hidden.to(torch.bfloat16), head.to(torch.bfloat16)
                total = fused_loss(
                    hidden.flatten(0, 1),
                    head,
                    losses,
                    labels=labels.flatten(),
                    teacher=target,
                    token_weights=weights or None,
                    denominator=1.0 if weights else training.batch * counted,
                )
                ours, others = iter(states), iter(theirs)
                for i, (how, s, _) in enumerate(
                    self.pairs
                ):  # also where a weight is 0 for now: AdamW counts the steps of a projection
                    mine, other = (list(islice(side, len(how.taps(s)))) for side in (ours, others))
                    total = total + weight_at(how.weight, step, total_steps) * share * self._distance(i, mine, other)
            return total

        with autocast:
            return network(ids, loss, [tap for how, s, _ in self.pairs for tap in how.taps(s)])

    def _token_weights(self, index: Tensor, step: int) -> dict[str, Tensor]:
        """Of the tokens that follow those of windows `index`, [B·T] by kind of loss, over their sum in the whole
        step."""
        whole_step, out = self.of.training.windows_of(step, len(self.of.tokens)), {}
        for kind, given in self.of.weights_by_kind().items():
            total = given[whole_step.to(given.device), 1:].double().sum().item() or 1.0
            out[kind] = F.pad(given[index.to(given.device), 1:].double() / total, (0, 1)).flatten()
        return out

    def _distance(self, i: int, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The i-th pair's loss, from what was tapped [B, T, width] of both models: a mean over tokens."""
        assert self.network is not None and self.teacher is not None
        how, s, t = self.pairs[i]
        if how.of_states:
            project = self.network.projections.get(str(i))
            return hidden_loss(mine[0].flatten(0, 1), theirs[0].flatten(0, 1), how.kind, project)
        heads = how.relation_heads(self.network.transformer.config, self.teacher.transformer.config, (s, t))
        return relation_sum(how.kind, heads, mine, theirs, (self.network.turned, self.teacher.turned))

    @torch.no_grad()
    def _target(self, ids: Tensor, index: Tensor) -> tuple[TeacherTarget | None, list[Tensor]]:
        """What the teacher says of ids [B, T]: a target of B·T rows, and the states of its layers in the pairs."""
        if self.teacher is None:
            cache = self.of.teacher
            if cache is None or isinstance(cache, Graph):
                return None, []
            target = cache.target(index)
            return target.to(ids.device), []
        found: list[Any] = []

        def keep(hidden: Tensor, head: Tensor, states: list[Tensor]) -> Tensor:
            found.extend((head, states))
            return hidden

        pieces = ids.reshape(-1, self.of.piece)
        hidden = self.teacher(pieces, keep, [tap for how, _, t in self.pairs for tap in how.taps(t)])
        return HiddenTarget(hidden.flatten(0, 1), found[0]), found[1]

    def _own_text(self, ids: Tensor, labels: Tensor, index: Tensor, step: int) -> tuple[Tensor, Tensor, int]:
        """On a share `on_policy` of the steps the student goes on from the first half of each window, and only what it
        wrote counts. Also: how many tokens of a window count (an early end of text is not made up for)."""
        from .teacher import sample_continuations

        assert self.network is not None
        seed = self.of.training.seed * 1_000_003 + step
        if torch.rand((), generator=torch.Generator().manual_seed(seed)) >= self.of.on_policy:
            return ids, labels, ids.shape[1] - 1
        half = ids.shape[1] // 2
        text, written = sample_continuations(
            self.network.transformer, ids[:, :half], ids.shape[1] - half, 1.0, seed * 4096 + int(index[0])
        )
        following = torch.cat(
            [text[:, 1:].masked_fill(~written[:, 1:], IGNORED), torch.full_like(text[:, :1], IGNORED)], 1
        )
        return text, following, ids.shape[1] - half

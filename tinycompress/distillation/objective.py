"""The loss of one micro-batch of distillation: what `train` minimises.

Teacher and student read the same windows; the teacher says what each next token should be (itself, or from a cache),
and the losses of logits and of inner states make one number of it, as a part of the mean over the whole step. Letters:
B windows of a micro-batch, T positions, D hidden.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.graph import Graph
from .distributed import shard
from .fused_loss import IGNORED, HiddenTarget, TeacherTarget, fused_loss
from .hidden_losses import HiddenLoss, Tap, hidden_loss, relation_sum
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
        self.teacher_width = 0
        if isinstance(of.teacher, Graph):
            teacher = of.teacher
            for loss in of.hidden:
                self.pairs += [(loss, s, t) for s, t in loss.pairs(graph.config, teacher.config)]
            # the CPU has fast products for float32 only; a GPU takes the teacher as it is stored
            dtype = torch.promote_types(teacher.dtype, torch.float32) if device.type == "cpu" else teacher.dtype
            self.teacher = Network(teacher, dtype=dtype)
            shard(self.teacher, self.teacher.blocks, device)
            self.teacher_width = teacher.config.hidden_size
        self.student_width = graph.config.hidden_size

    def add_width_maps(self, network: Network, dtype: torch.dtype) -> None:
        """One [D_t, D_s] for each pair of layers of different widths, drawn by the seed."""
        generator = torch.Generator().manual_seed(self.of.training.seed)
        D_s = self.student_width
        D_t = self.teacher_width
        if D_s == D_t:
            return
        for i, (loss, _, _) in enumerate(self.pairs):
            if loss.of_states:
                drawn = torch.randn(D_t, D_s, generator=generator) / D_s**0.5
                network.projections[str(i)] = nn.Parameter(drawn.to(dtype))

    def __call__(self, ids: Tensor, index: Tensor, step: int) -> Tensor:
        """The loss of windows ids [B, T], as a part of the mean over the whole step."""
        assert self.network is not None
        network = self.network
        training = self.of.training
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
        counted = ids.shape[1] - 1
        if self.of.on_policy:
            ids, labels, counted = self._own_text(ids, labels, index, step)
        target, teacher_states = self._target(ids, index)
        share = len(ids) / training.batch
        weights = self._token_weights(index, step)
        autocast = training.autocast(ids.device)
        total_steps = training.total_steps(*self.of.tokens.shape)
        losses = [part.at(step, total_steps) for part in self.of.losses]

        def loss(hidden: Tensor, head: Tensor, states: list[Tensor]) -> Tensor:
            with torch.autocast(ids.device.type, enabled=False):
                if autocast._enabled:
                    hidden = hidden.to(torch.bfloat16)
                    head = head.to(torch.bfloat16)
                total = fused_loss(
                    hidden.flatten(0, 1),
                    head,
                    losses,
                    labels=labels.flatten(),
                    teacher=target,
                    token_weights=weights or None,
                    denominator=1.0 if weights else training.batch * counted,
                )
                student_left = iter(states)
                teacher_left = iter(teacher_states)
                # also where a weight is 0 for now: AdamW counts the steps of a projection
                for i, (part, layer, _) in enumerate(self.pairs):
                    taps = len(part.taps(layer))
                    student = list(islice(student_left, taps))
                    teacher = list(islice(teacher_left, taps))
                    weight = weight_at(part.weight, step, total_steps)
                    total = total + weight * share * self._distance(i, student, teacher)
            return total

        with autocast:
            return network(ids, loss, self._taps(of_teacher=False))

    def _token_weights(self, index: Tensor, step: int) -> dict[str, Tensor]:
        """Of the tokens that follow those of windows `index`, [B·T] by kind of loss, over their sum in the whole
        step."""
        whole_step = self.of.training.windows_of(step, len(self.of.tokens))
        shares = {}
        for kind, weights in self.of.weights_by_kind().items():
            total = weights[whole_step.to(weights.device), 1:].double().sum().item() or 1.0
            shares[kind] = F.pad(weights[index.to(weights.device), 1:].double() / total, (0, 1)).flatten()
        return shares

    def _taps(self, of_teacher: bool) -> list[Tap]:
        """What is tapped of one of the models, in the order of the pairs."""
        taps: list[Tap] = []
        for loss, student_layer, teacher_layer in self.pairs:
            taps += loss.taps(teacher_layer if of_teacher else student_layer)
        return taps

    def _distance(self, i: int, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The i-th pair's loss, from what was tapped [B, T, width] of both models: a mean over tokens."""
        assert self.network is not None and self.teacher is not None
        loss, student_layer, teacher_layer = self.pairs[i]
        if loss.of_states:
            project = self.network.projections.get(str(i))
            return hidden_loss(student[0].flatten(0, 1), teacher[0].flatten(0, 1), loss.kind, project)
        student_config = self.network.transformer.config
        teacher_config = self.teacher.transformer.config
        heads = loss.relation_heads(student_config, teacher_config, (student_layer, teacher_layer))
        return relation_sum(loss.kind, heads, student, teacher, (self.network.turned, self.teacher.turned))

    @torch.no_grad()
    def _target(self, ids: Tensor, index: Tensor) -> tuple[TeacherTarget | None, list[Tensor]]:
        """What the teacher says of ids [B, T]: a target of B·T rows, and the states of its layers in the pairs."""
        if self.teacher is None:
            cache = self.of.teacher
            if cache is None or isinstance(cache, Graph):
                return None, []
            target = cache.target(index)
            return target.to(ids.device), []
        heads: list[Tensor] = []  # of one forward: one
        tapped: list[Tensor] = []

        def keep(hidden: Tensor, head: Tensor, states: list[Tensor]) -> Tensor:
            heads.append(head)
            tapped.extend(states)
            return hidden

        pieces = ids.reshape(-1, self.of.piece)
        hidden = self.teacher(pieces, keep, self._taps(of_teacher=True))
        return HiddenTarget(hidden.flatten(0, 1), heads[0]), tapped

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
        nothing = torch.full_like(text[:, :1], IGNORED)  # follows the last token
        following = torch.cat([text[:, 1:].masked_fill(~written[:, 1:], IGNORED), nothing], 1)
        return text, following, ids.shape[1] - half

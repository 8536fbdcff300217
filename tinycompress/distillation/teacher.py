"""Teachers that run: whole in memory, or streamed layer by layer; and the student's own text for them to score.

  OnlineTeacher         the model as a module; each call is a forward
  StreamedTeacher       one block's weights at a time, read from the graph's memory map, over all windows of a call: for
                        P parameters and w windows a call, each window costs P / w of reading, so give it many
  sample_continuations  on-policy text (GKD, arXiv:2306.13649): the student writes, the teacher is asked about it

Teachers hand over hidden states and the head, never logits: the losses make those a chunk at a time.
Letters: B, N windows, T positions, b windows of a batch, D hidden, V vocabulary, P prompt length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.walk import Stream, blocks, working_dtype
from ..errors import InputError
from ..graph.config import FINAL_NORM, HEAD
from ..graph.graph import Graph
from ..model.generation import check_ids, end_tokens
from ..model.transformer import Norm, Transformer
from .fused_loss import HiddenTarget


class OnlineTeacher:
    """A graph that is asked with token ids [B, T] and answers with all B·T positions' hidden states [B·T, D] and its
    head.

    dtype: of the computation; by default the graph's own, but float32 for 16-bit weights on a CPU, which has fast
    products only for that. Ids outside the vocabulary or the context are an InputError.
    """

    def __init__(
        self, graph: Graph, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.config = graph.config
        self.module = graph.module(device, dtype or working_dtype(graph, device))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> HiddenTarget:
        _check_windows(self.config.max_position, self.config.vocab_size, tokens)
        hidden = self.module.hidden(tokens.to(self.module.device))
        return HiddenTarget(hidden.flatten(0, 1), self.module.lm_head.weight)  # type: ignore[arg-type]


class StreamedTeacher:
    """The same answers from a model that does not fit in memory: it needs the weights of one block, and the hidden
    states of all windows of a call (N·T·D numbers; on a GPU twice, at the end).

    progress: the name of a bar over the layers; None shows none.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        progress: str | None = None,
    ) -> None:
        self.graph = graph
        self.config = graph.config
        self.progress = progress
        self.device = torch.device(device or "cpu")
        self.dtype = dtype or working_dtype(graph, self.device)
        self.head = graph.linear(HEAD).to(self.device)  # a view of the memory map until it is multiplied by

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> HiddenTarget:
        config = self.config
        _check_windows(config.max_position, config.vocab_size, tokens)
        stream = Stream(self.graph, tokens, self.device, self.dtype)
        for block in blocks(self.graph, self.device, self.dtype, self.progress):
            stream.step(block)
            del block  # before the next one is read
        norm = Norm(self.graph.tensor(f"{FINAL_NORM}.weight").to(self.device, self.dtype), config.norm_eps)
        hidden = torch.empty(*tokens.shape, config.hidden_size, device=self.device, dtype=self.dtype)
        for part in hidden.split(len(stream.hidden[0])):  # views
            part.copy_(norm(stream.hidden.pop(0)))  # a batch's memory is free once it is copied
        return HiddenTarget(hidden.flatten(0, 1), self.head)


def _check_windows(context: int, vocab_size: int, tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise InputError("teacher's tokens", tuple(tokens.shape), "ids [windows, T]")
    check_ids(tokens, vocab_size)
    if tokens.shape[1] > context:
        raise InputError("teacher's tokens", f"windows of {tokens.shape[1]}", f"at most its context, {context}")


@torch.no_grad()
def sample_continuations(
    student: Transformer, prompts: Tensor, n_new: int, temperature: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prompts [B, P] and what the student writes behind them, all B together with one KV cache.

    Returns ids int64 [B, P + n_new] and bool [B, P + n_new], true where the student wrote. Behind an end of text (which
    counts as written) the row is filled up with it, unmarked. temperature 0 is greedy. An InputError for prompts that
    with n_new do not fit the context.
    """
    config = student.config
    check_ids(prompts, config.vocab_size)
    if n_new < 1 or temperature < 0:
        raise InputError(
            "sample_continuations",
            f"n_new {n_new}, temperature {temperature}",
            "n_new of at least 1, temperature of at least 0",
        )
    B, P = prompts.shape
    if P + n_new > config.max_position:
        raise InputError("prompts", f"{P} tokens and {n_new} new ones", f"at most the context, {config.max_position}")
    generator = torch.Generator(student.device).manual_seed(seed)
    ends = torch.tensor(end_tokens(config), device=student.device, dtype=torch.long)
    cache = student.new_cache(B, P + n_new)
    new = prompts.long().to(student.device)
    ids = [new]
    written = [torch.zeros(B, P, dtype=torch.bool, device=student.device)]
    for step in range(n_new):
        logits = student.lm_head(student.hidden(new, cache)[:, -1]).float()  # (B, V)
        drawn = _draw(logits, temperature, generator)
        going = torch.ones_like(drawn, dtype=torch.bool) if step == 0 else written[-1] & ~torch.isin(ids[-1], ends)
        new = torch.where(going, drawn, ids[-1][:, -1:])
        ids.append(new)
        written.append(going)
    return torch.cat(ids, 1), torch.cat(written, 1)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id [B, 1] a row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

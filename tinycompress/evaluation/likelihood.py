"""Log-likelihoods of continuations: what questions with choices, and whole texts, are scored by.

    log p(continuation | context) = Σ_t log softmax(logits at t - 1)[token t],    t over the continuation's tokens

Text becomes tokens as in lm-evaluation-harness' class for transformers models, so that both give the same numbers:
spaces at the end of a context go to the continuation, the two are tokenized as one text, and what is too long is cut on
the left. What inputs have in common is computed once: a context behind which several continuations stand is read into
a KV cache that they share, equal inputs (choices of one token) are one, and the head sees scored positions only.

Letters: N rows, P tokens that rows begin with in common, T tokens of a row behind them, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..errors import InputError
from ..graph.config import Config
from ..model.generation import Stepwise, check_ids, end_tokens
from ..model.transformer import Transformer
from ..progress import tqdm

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation
POSITIONS = 4096  # of one forward, those in its cache included
SLACK = 8  # beginnings that are batched differ in length by less; a shorter one is not worth a cache of its own
HEAD_POSITIONS = 256  # whose logits exist at one time


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is behind its context.

    Fields:
        value: its log-likelihood, in nats, summed over its tokens.
        greedy: whether greedy decoding would write it.
    """

    value: float
    greedy: bool


class PairEncoder:
    """Text to token ids with a tokenizer's own special tokens, as lm-evaluation-harness' class for transformers models
    does it.

    Fields:
        tokenizer: of the model.
        prefix: the id that stands before a continuation without context: BOS, or else EOS. None without either.
        end: the id that ends a text: EOS. None without.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.tokenizer = tokenizer
        ends = end_tokens(config)
        end = tokenizer.token_id("eos_token")
        self.end = end if end is not None else next(iter(ends), None)
        candidates = (tokenizer.token_id("bos_token"), end, config.bos_token_id, self.end)
        self.prefix = next((token for token in candidates if token is not None), None)
        self._prefix_text = None if self.prefix is None else tokenizer.decode([self.prefix])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """None adds what the tokenizer adds (BOS), unless the text begins with it."""
        if add_special_tokens is None:
            add_special_tokens = self._prefix_text is None or not text.startswith(self._prefix_text)
        return self.tokenizer.encode(text, add_special_tokens)

    def pair(self, context: str, continuation: str) -> Pair:
        """Ids of both. Without a context the prefix stands there; an `InputError` where the tokenizer has none."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.encode(stripped) if context else []
        if before:
            return before, self.encode(stripped + continuation)[len(before) :]
        if self.prefix is None:
            raise InputError("context", repr(context), "some text: the tokenizer has neither a BOS nor an EOS token")
        ids = self.encode(continuation, add_special_tokens=False)
        return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])


@torch.inference_mode()
def log_likelihoods(
    model: Transformer | Stepwise, pairs: Sequence[Pair], max_length: int | None = None, progress: bool = True
) -> list[Likelihood]:
    """The likelihood of every continuation behind its context, in the order of the pairs.

    Args:
        model: in torch, or an exported one that is asked step by step.
        pairs: ids of contexts and continuations, neither empty; a pair longer than `max_length` is cut on its left.
        max_length: tokens that the model reads at once; None is its context.
        progress: whether a bar is shown after two seconds.
    """
    config = model.config
    rows = _rows(pairs, max_length or config.max_position, config.vocab_size)
    tally = _Tally(pairs)
    varies = config.rope.varies_with_length  # then a prefix alone has other keys than in front of a continuation
    with tqdm(total=len(pairs), desc="log-likelihoods", unit="answer", delay=2, disable=not progress) as bar:
        batches = [[_Family([row], 0)] for row in rows] if varies else _batches(_families(rows))
        for batch in batches:
            scored = _torch_scores(model, batch) if isinstance(model, Transformer) else _stepwise_scores(model, batch)
            for some, logits in scored:
                tally.add(some, logits)
                bar.update(sum(len(row.pairs) for row in some))
    return tally.results()


@dataclass
class _Row:
    """An input, and the pairs that are scored at its last positions."""

    ids: tuple[int, ...]
    scored: int
    pairs: list[int]


@dataclass
class _Family:
    """Rows that begin alike: with `shared` tokens, none of which is scored."""

    rows: list[_Row]
    shared: int

    @property
    def longest(self) -> int:
        return max(len(row.ids) for row in self.rows)


def _rows(pairs: Sequence[Pair], room: int, vocab_size: int) -> list[_Row]:
    """The inputs that differ, sorted so that those that begin alike are neighbours."""
    rows: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise InputError(f"pair {number}", f"{len(context)} and {len(continuation)} tokens", "at least one of each")
        if len(continuation) > room:
            raise InputError("continuation", f"{len(continuation)} tokens", f"at most the model's context, {room}")
        ids = (*context, *continuation)[-(room + 1) :]
        row = rows.setdefault(ids[:-1], _Row(ids[:-1], 0, []))
        row.scored = max(row.scored, len(continuation))
        row.pairs.append(number)
        check_ids(torch.tensor(ids), vocab_size)
    return [rows[ids] for ids in sorted(rows)]


def _families(rows: Sequence[_Row]) -> list[_Family]:
    """Neighbours share a beginning where that saves tokens."""
    families: list[_Family] = []
    for row in rows:
        family = families[-1] if families else None
        if family is not None:
            n = len(family.rows)
            limit = family.shared if n > 1 else len(family.rows[0].ids) - family.rows[0].scored
            common = _common(family.rows[0].ids, row.ids, min(limit, len(row.ids) - row.scored))
            saves = n * common > (n - 1) * family.shared
            if saves and common >= max(SLACK, len(row.ids) // 4):
                family.rows.append(row)
                family.shared = common
                continue
        families.append(_Family([row], 0))
    return families


def _common(a: Sequence[int], b: Sequence[int], at_most: int) -> int:
    """How many ids two sequences share at their start."""
    return next((i for i in range(at_most) if a[i] != b[i]), at_most)


def _batches(families: list[_Family]) -> Iterator[list[_Family]]:
    """Families whose beginnings are about as long, longest first; a family too large for a batch is one by itself."""
    batch: list[_Family] = []
    for family in sorted(families, key=lambda f: (-(f.shared // SLACK), -f.longest)):
        together = [*batch, family]
        alike = together[0].shared // SLACK == family.shared // SLACK
        size = sum(len(f.rows) for f in together) * max(f.longest for f in together)
        if batch and not (alike and size <= POSITIONS):
            yield batch
            together = [family]
        batch = together
    if batch:
        yield batch


def _torch_scores(model: Transformer, batch: list[_Family]) -> Iterator[tuple[list[_Row], Iterator[Tensor]]]:
    """Rows, and their logits at scored positions one below the other, in pieces [n, V]."""
    P = min(family.shared for family in batch)
    members = [(row, owner) for owner, family in enumerate(batch) for row in family.rows]
    members.sort(key=lambda member: -len(member[0].ids))
    longest = len(members[0][0].ids)
    cache = None
    if P:
        cache = model.new_cache(len(batch), longest)
        model.hidden(torch.tensor([family.rows[0].ids[:P] for family in batch], device=model.device), cache)
    together = max(1, POSITIONS // longest)
    for first in range(0, len(members), together):
        some = members[first : first + together]
        rows = [row for row, _ in some]
        T = len(rows[0].ids) - P
        ids = torch.tensor([[*row.ids[P:], *[0] * (T + P - len(row.ids))] for row in rows], device=model.device)
        owners = torch.tensor([owner for _, owner in some], device=model.device)
        hidden = model.hidden(ids, cache.rows(owners) if cache else None)  # (N, T, D); what pads stands behind all else
        ends = [len(row.ids) - P for row in rows]
        scored = torch.cat([h[end - row.scored : end] for h, row, end in zip(hidden, rows, ends)])
        yield rows, (model.lm_head(piece) for piece in scored.split(HEAD_POSITIONS))


def _stepwise_scores(model: Stepwise, batch: list[_Family]) -> Iterator[tuple[list[_Row], Iterator[Tensor]]]:
    """The same of an exported model: row by row, behind the beginning that a family shares."""
    for family in batch:
        cache = model.new_cache(1, family.longest)
        P = family.shared
        if P:
            model.step(torch.tensor([family.rows[0].ids[:P]]), cache)
        for row in family.rows:
            cache.length = P
            logits = model.step(torch.tensor([row.ids[P:]]), cache)[0, -row.scored :]
            yield [row], iter(logits.split(HEAD_POSITIONS))


class _Tally:
    """Sums over the tokens of every pair."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.sums = torch.zeros(len(pairs), dtype=torch.float64)
        self.misses = torch.zeros(len(pairs), dtype=torch.long)

    def add(self, rows: Sequence[_Row], pieces: Iterator[Tensor]) -> None:
        """Adds what logits say of the pairs of these rows; pieces [n, V] are those of `_torch_scores`."""
        places: list[int] = []
        numbers: list[int] = []
        tokens: list[int] = []
        start = 0
        for row in rows:
            start += row.scored
            for number in row.pairs:
                continuation = self.pairs[number][1]
                places += range(start - len(continuation), start)
                numbers += [number] * len(continuation)
                tokens += continuation
        place, owner, token = torch.tensor(places), torch.tensor(numbers), torch.tensor(tokens)
        first = 0
        for logits in pieces:
            inside = (place >= first) & (place < first + len(logits))
            at = place[inside] - first
            chosen = token[inside]
            values = logits.float()
            log_sum = values.logsumexp(-1).cpu()
            likeliest = values.argmax(-1).cpu()
            found = values[at.to(values.device), chosen.to(values.device)].cpu() - log_sum[at]
            self.sums.index_add_(0, owner[inside], found.double())
            self.misses.index_add_(0, owner[inside], (likeliest[at] != chosen).long())
            first += len(logits)

    def results(self) -> list[Likelihood]:
        return [Likelihood(value, misses == 0) for value, misses in zip(self.sums.tolist(), self.misses.tolist())]

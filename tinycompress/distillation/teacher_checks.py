"""Whether a teacher, or a cache of one, fits a student: asked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import InputError
from ..graph.graph import Graph

if TYPE_CHECKING:
    from .teacher_cache import TeacherCache


def check_teacher(teacher: Graph, student: Graph, seq_len: int) -> None:
    """A teacher of another vocabulary, or of too short a context, is an InputError."""
    theirs, ours = teacher.config.vocab_size, student.config.vocab_size
    if theirs != ours:
        raise InputError(
            "teacher", f"a vocabulary of {theirs} tokens", f"the student's, {ours}: logits are compared token by token"
        )
    if teacher.tokenizer and student.tokenizer:
        different = [t for t in _vocabulary(teacher).items() ^ _vocabulary(student).items()]
        if different:
            raise InputError(
                "teacher",
                f"another tokenizer ({len(different)} entries differ, such as {different[0]})",
                "the student's tokenizer",
            )
    if seq_len > teacher.config.max_position:
        raise InputError(
            "windows",
            f"{seq_len} tokens",
            f"at most the teacher's context, {teacher.config.max_position}, or a teacher_context",
        )


def check_cache(cache: TeacherCache, student: Graph, tokens: Tensor) -> None:
    """A cache of another vocabulary, of other tokens or made with another tokenizer is an InputError."""
    from .teacher_cache import digest

    if cache.vocab_size != student.config.vocab_size:
        raise InputError(
            "teacher",
            f"a cache of {cache.vocab_size} tokens' vocabulary",
            f"the student's, {student.config.vocab_size}",
        )
    if cache.index["tokens"] != digest(tokens):
        raise InputError(
            "teacher",
            f"a cache of other tokens ({cache.windows} × {cache.seq_len})",
            f"one of these very windows {tuple(tokens.shape)}",
        )
    if student.tokenizer and cache.index["tokenizer"] not in (None, digest(student.tokenizer)):
        raise InputError("teacher", "a cache made with another tokenizer", "the student's tokenizer")


def _vocabulary(graph: Graph) -> dict[str, int]:
    assert graph.tokenizer
    return graph.tokenizer.backend.get_vocab()

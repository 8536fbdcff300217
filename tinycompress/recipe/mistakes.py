"""Mistakes in a recipe: all of them are collected, and told with their lines and the nearest right names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import InputError

MOST = 50  # mistakes that a message lists
Place = tuple[str | int, ...]  # keys and indices from the top of a document: ("pass", 1, "training", "lr")


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Fields:
        place: where in the document.
        found: what is there.
        accepted: what would be right.
        error: the error of a pass that says so, where it is one.
    """

    place: Place
    found: str
    accepted: str
    error: InputError | None = None


class RecipeError(InputError):
    """All mistakes of a recipe. With one, the message is one line; with several, a line for each.

    mistakes: (where, found, accepted) of each, in the order of the lines. name: the file, or what stands for it.
    """

    def __init__(self, name: str, mistakes: Sequence[tuple[str, str, str]]) -> None:
        self.mistakes = tuple(mistakes)
        where, found, accepted = self.mistakes[0]
        super().__init__(where, found, accepted)
        if len(self.mistakes) > 1:
            lines = [f"  {where}: found {found}; accepted: {accepted}" for where, found, accepted in self.mistakes]
            more = [f"  and {len(lines) - MOST} more"] if len(lines) > MOST else []
            self.args = ("\n".join([f"{name}: {len(lines)} mistakes", *lines[:MOST], *more]),)


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that `word` was probably meant to be; all of them where none is near."""
    known = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else " | ".join(known.values())


def shown(value: object) -> str:
    """A value as a message quotes it: in one line, not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"

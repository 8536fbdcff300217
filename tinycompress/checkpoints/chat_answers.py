"""Which tokens of a conversation the assistant wrote: those that a model which answers has to learn.

A template's own `{% generation %}` tags say so, as in transformers. Without them the conversation is rendered again
with a mark in place of every answer: what stands around the marks is the template's, what is left in the text itself
is the answers'. The special token that ends an answer counts as a part of it. Letters: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError
from .chat_rendering import ChatTemplate, Message, Messages, Rendered, Span

MARK = "answer7351mark{}end"
TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversations(
    template: ChatTemplate, conversations: Sequence[Messages], places: Sequence[str], answers: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Each conversation's T ids, and for each id whether the assistant wrote it; without `answers` that is left empty.

    places: where each conversation comes from, for errors.

    Errors: an `InputError` for a conversation that the template refuses, or in which answers cannot be told apart.
    """
    whole = template.render(conversations)
    marked: Sequence[Rendered] = [Rendered()] * len(whole)
    tagged = TAGS.search(template.source) is not None
    if answers and not tagged:
        marked = template.render([_with_marks(messages) for messages in conversations])
    out = []
    for messages, made, skeleton, place in zip(conversations, whole, marked, places):
        if made.error is not None:
            raise InputError(f"the conversation in {place}", made.error, "one that the model's chat template takes")
        encoded = template.tokenizer.backend.encode(made.text, add_special_tokens=False)
        counted: list[bool] = []
        if answers:
            spans = made.spans if tagged else _spans(made.text, skeleton, messages, template, place)
            counted = inside(encoded.offsets, spans)
        out.append((encoded.ids, counted))
    return out


def inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its characters (start, stop): whether it is one of those from the first to the last that has
    characters of a span."""
    counted = [False] * len(offsets)
    for start, stop in spans:
        touched = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
        if touched:
            counted[touched[0] : touched[-1] + 1] = [True] * (touched[-1] + 1 - touched[0])
    return counted


def _with_marks(messages: Messages) -> list[Message]:
    out: list[Message] = []
    for number, message in enumerate(messages):
        mark = {"content": MARK.format(number)} if message["role"] == "assistant" else {}
        out.append({**message, **mark})
    return out


def _spans(text: str, skeleton: Rendered, messages: Messages, template: ChatTemplate, place: str) -> list[Span]:
    """Where the answers are in a text whose `skeleton` has marks in their place."""
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    around = re.split("|".join(map(re.escape, map(MARK.format, numbers))), skeleton.text) if numbers else [text]
    at = len(around[0])
    accepted = "a chat template with {% generation %} tags, or one that writes answers as they are"
    unclear = InputError(f"the answers in {place}", "not to be told from the rest of the text", accepted)
    if skeleton.error is not None or len(around) != len(numbers) + 1 or not text.startswith(around[0]):
        raise unclear
    specials = [t.content for t in template.tokenizer.backend.get_added_tokens_decoder().values() if t.special]
    spans = []
    for number, after in zip(numbers, around[1:]):
        content = messages[number]["content"]
        known = (form for form in (content, content.strip()) if text.startswith(form + after, at))
        answer = next(known, None)
        if answer is None:
            raise unclear
        stop = at + len(answer)
        end = next((t for t in specials if after.lstrip().startswith(t)), "")
        ending = len(after) - len(after.lstrip()) + len(end) if end else 0
        spans.append((at, stop + ending))
        at = stop + len(after)
    return spans

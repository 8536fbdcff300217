"""Conversations as a model's chat template writes them: the text and ids of transformers' `apply_chat_template`.

A template is a program in Jinja that came with the model, so it runs in a process of its own (chat_worker.py), in
Jinja's sandbox, with limits on time, memory and the length of the text. Letters: T tokens of a conversation.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .chat_template import DEFAULT
from .tokenizer_config import MORE, NAMED

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}
Messages = Sequence[Message]
Span = tuple[int, int]  # characters start … stop - 1 of a text

WORKER = Path(__file__).with_name("chat_worker.py")
SECONDS = 10  # of computation for one call
WAIT = 120  # seconds for one call, the start of its process on a busy machine included
MEMORY = 1 << 30  # bytes
CHARACTERS = 1 << 22  # of one conversation
REMEDY = (
    "a model with one: chat_template.jinja, or chat_template in tokenizer_config.json (GGUF: tokenizer.chat_template)"
)


@dataclass(frozen=True)
class Rendered:
    """One conversation as text.

    Fields:
        text: what the template wrote.
        spans: where the assistant's words are in it, by the template's own `{% generation %}` tags; empty without.
        error: why there is no text; None where there is one.
    """

    text: str = ""
    spans: tuple[Span, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Fields:
        tokenizer: whose it is; its special tokens are the template's variables.
        source: the template, in Jinja.
    """

    tokenizer: Tokenizer = field(repr=False)
    source: str = field(repr=False)

    @staticmethod
    def of(tokenizer: Tokenizer | None, name: str = DEFAULT) -> ChatTemplate:
        """The template of that name; an `InputError` for a tokenizer without it."""
        stored = None if tokenizer is None else tokenizer.config.get("chat_template")
        if tokenizer is None or not stored:
            raise InputError("chat template", "none in this model", REMEDY)
        named: Mapping[str, str] = {DEFAULT: stored} if isinstance(stored, str) else stored
        if name not in named:
            raise InputError("chat template", repr(name), " | ".join(sorted(named)))
        return ChatTemplate(tokenizer, named[name])

    def text(self, messages: Messages, add_generation_prompt: bool = False, **variables: Any) -> str:
        """A conversation as text.

        Args:
            messages: mappings with `role` and `content`, such as {"role": "user", "content": "Hello"}.
            add_generation_prompt: whether the text ends where the assistant's next answer begins.
            variables: more variables of the template, such as `enable_thinking`, as values that JSON has.

        Errors: an `InputError` for what the template refuses, and for a template that goes beyond the limits.
        """
        (made,) = self.render([messages], add_generation_prompt, **variables)
        if made.error is not None:
            raise InputError("messages", made.error, "a conversation that the model's chat template takes")
        return made.text

    def ids(self, messages: Messages, add_generation_prompt: bool = False, **variables: Any) -> list[int]:
        """A conversation as T token ids; arguments and errors as in `text`."""
        return self.tokenizer.encode(self.text(messages, add_generation_prompt, **variables))

    def render(
        self, conversations: Sequence[Messages], add_generation_prompt: bool = False, **variables: Any
    ) -> list[Rendered]:
        """Many conversations at a time, each with its text or what is wrong with it; arguments as in `text`."""
        for messages in conversations:
            check_messages(messages)
        known = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        request = {
            "template": self.source,
            "conversations": [[dict(message) for message in messages] for messages in conversations],
            "variables": known | special_tokens(self.tokenizer.config) | variables,
            "seconds": SECONDS,
            "memory": MEMORY,
            "characters": CHARACTERS,
        }
        replies = _ask(request)
        return [Rendered(r.get("text", ""), tuple(map(tuple, r.get("spans", ()))), r.get("error")) for r in replies]


def opening(system: str | None) -> list[Message]:
    """How a conversation begins: with the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def check_messages(messages: Any) -> None:
    """An `InputError` for what is no conversation."""
    accepted = 'a list of messages such as {"role": "user", "content": "Hello"}'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages", repr(messages)[:80], accepted)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError("messages", repr(message)[:80], accepted)


def special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that transformers gives a template: special tokens by name, as in tokenizer_config.json."""
    out = {name: config[name] for name in (*NAMED, MORE) if config.get(name)}
    more = config.get("extra_special_tokens")
    return out | (dict(more) if isinstance(more, Mapping) else {})


def _ask(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The worker's replies, one for each conversation."""
    ended = InputError("chat template", f"no end after {SECONDS} s, or too much memory", "a template that ends")
    try:
        question = json.dumps(request)
    except (TypeError, ValueError) as error:
        raise InputError("messages", str(error), "values that JSON has: texts, numbers, lists, mappings") from None
    command = [sys.executable, "-P", str(WORKER)]  # -P: the files beside the worker are not for it to import
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, encoding="utf-8", timeout=WAIT, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise ended from None
    if (
        done.returncode in (-getattr(signal, "SIGXCPU", 0), -getattr(signal, "SIGKILL", 0))
        or "MemoryError" in done.stderr
    ):
        raise ended
    if done.returncode:
        raise RuntimeError(f"the process of chat templates failed: {done.stderr[-2000:]}")
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise InputError("chat template", reply["error"], "a template in Jinja")
    return reply["replies"]

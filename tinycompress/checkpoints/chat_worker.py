"""Chat templates rendered in a process of its own: a template is a program that came with a model.

Run as a script, with nothing of tinycompress imported: a request in JSON on standard input, a reply on standard output
(`chat_rendering` is the other side). Jinja's sandbox keeps a template from the machine; limits of the process keep it
from its memory and time. Everything a template sees is what transformers shows it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Answers(Extension):
    """`{% generation %} … {% endgeneration %}` around what the assistant says; where such a block begins and ends in
    the text is noted in `environment.spans`, by `environment.written`, the characters before it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(written=0, spans=[])

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        environment: Any = self.environment
        environment.spans.append((environment.written, environment.written + len(text)))
        return text


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> Any:
    made: Any = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Answers, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def rendered(template: Any, messages: Any, variables: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The text of one conversation and the spans of its answers, or what is wrong."""
    state = template.environment
    state.written = 0
    state.spans = []
    pieces = []
    try:
        for piece in template.generate(messages=messages, **variables):
            pieces.append(piece)
            state.written += len(piece)
            if state.written > most:
                return {"error": f"a text of more than {most:,} characters"}
    except jinja2.TemplateError as error:
        return {"error": str(error.message or type(error).__name__)}
    except Exception as error:  # a template may raise whatever Python does
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"text": "".join(pieces), "spans": state.spans}


def limit(memory: int, seconds: int) -> None:
    """Bytes of memory and seconds of computation, where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        with contextlib.suppress(ValueError, OSError):  # a lower one is set already, or it is not known
            resource.setrlimit(kind, (most, most))


def main() -> None:
    request = json.load(sys.stdin)
    limit(request["memory"], request["seconds"])
    try:
        template = environment().from_string(request["template"])
    except Exception as error:
        json.dump({"error": f"{type(error).__name__}: {error}"[:500]}, sys.stdout)
        return
    variables = request["variables"]
    most = request["characters"]
    replies = [rendered(template, messages, variables, most) for messages in request["conversations"]]
    json.dump({"replies": replies}, sys.stdout)


if __name__ == "__main__":
    main()

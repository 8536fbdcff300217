"""`tinycompress chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import need_tokenizer, open_model, runnable
from .options import Model
from .sampling_options import RepetitionPenalty, Seed, System, Temperature, TopK, TopP, say_draw, speed

if TYPE_CHECKING:
    from ..checkpoints.chat_rendering import ChatTemplate, Message
    from ..model.conversation import Conversation
    from ..model.sampling import Sampling

POSITIONS = 4096  # of a conversation, where the model has more: a cache of them fits beside the weights
HELP = "/reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer, /help shows this"


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of the whole conversation.  [default: the model's context, at most 4096]"),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
) -> None:
    """Talk with a model through its chat template: a checkpoint in torch, an export in its runtime.

    One line is one turn, also where standard input is a pipe. Answers go to standard output as they come, all else to
    standard error. Only what is new is run, what was said before stays in the KV cache. Ctrl-C stops an answer.

    \b
    Examples:
      tinycompress chat smollm2-135m
      tinycompress chat small-onnx --system "Answer in one sentence." --temperature 0
      tinycompress chat model.gguf < questions.txt > answers.txt
    """
    from ..checkpoints.chat_rendering import ChatTemplate
    from ..model.conversation import Conversation

    graph = open_model(model)
    template = ChatTemplate.of(need_tokenizer(graph))
    if context is not None and context > graph.config.max_position:
        raise InputError("--context", context, f"at most the model's context, {graph.config.max_position}")
    options: Sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    say_draw(graph.generation, options)
    engine = Conversation(runnable(model, graph), context or min(POSITIONS, graph.config.max_position))
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    talk = Talk(engine, template, system, max_new_tokens, options)
    for line in lines(interactive):
        if not talk.take(line):
            return


class Talk:
    """The turns of a conversation.

    Fields:
        engine: what writes the answers.
        template: how the conversation is written for it.
        system: the system message; None for none.
        max_new_tokens: of an answer.
        options: how answers are drawn.
        messages: what was said.
    """

    def __init__(
        self, engine: Conversation, template: ChatTemplate, system: str | None, max_new_tokens: int, options: Sampling
    ) -> None:
        self.engine = engine
        self.template = template
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.options = options
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        from ..checkpoints.chat_rendering import opening

        self.messages = opening(self.system)

    def take(self, line: str) -> bool:
        """A command, or a turn that is answered; False where the conversation ends."""
        words = line.strip()
        if not words:
            return True
        if words == "/exit":
            return False
        if words == "/reset":
            self.reset()
        elif words.startswith("/"):
            print(HELP if words == "/help" else f"no command {words.split()[0]}: {HELP}", file=sys.stderr)
        else:
            self.answer(words)
        return True

    def answer(self, question: str) -> None:
        """Asks, and shows the answer as it comes; one that is stopped stays in the conversation as far as it came."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        tokens: list[int] = []
        times = [time.perf_counter()]
        text = self.template.tokenizer.decode_stream()

        def show(token: int) -> None:
            times.append(time.perf_counter())
            tokens.append(token)
            print(text(token), end="", flush=True)

        options: Sampling = {**self.options, "on_token": show}
        stopped = False
        try:
            ids: Any = self.template.ids(asked, add_generation_prompt=True)
            self.engine.generate(ids, self.max_new_tokens, **options)
        except InputError as error:
            print(f"{error}; {HELP}", file=sys.stderr)
            return
        except KeyboardInterrupt:
            stopped = True
        print(flush=True)
        said = self.template.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": said}]
        print(f"{'stopped: ' if stopped else ''}{speed(times)}", file=sys.stderr)


def lines(interactive: bool) -> Iterator[str]:
    """What is typed, line by line; Ctrl-C at the prompt gives up the line that was begun."""
    if not interactive:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrows and earlier lines, where the system has it)
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            yield input()
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return

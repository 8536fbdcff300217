"""Conversations on the command line: the answers of a fresh run, commands, stops, and two models side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import LONG, SHORT, byte_tokenizer
from cli_cases import invoke, refused, run

from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.chat_rendering import ChatTemplate
from tinycompress.cli import chat as command
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.model.conversation import Conversation

CONFIG = Config(
    vocab_size=260, hidden_size=32, head_dim=8, layers=(Layer(4, 2, 64),) * 2, max_position=256, eos_token_id=3
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, another one `other`, `plain` without a template, and `onnx`, an export of the first."""
    folder = tmp_path_factory.mktemp("chat")
    for name, seed, template in (("model", 1, True), ("other", 2, True), ("plain", 1, False)):
        tokenizer = byte_tokenizer() if template else byte_tokenizer(None)
        checkpoint.save(Graph.random(CONFIG, seed, std=0.2).replace(tokenizer=tokenizer), folder / name)
    run("export", folder / "model", "--profile", "ort", "-o", folder / "onnx")
    return folder


def windowed() -> Graph:
    config = Config(260, 32, 8, (Layer(4, 2, 64, window=12), Layer(4, 2, 64)), max_position=256)
    return Graph.random(config, 3, std=0.2)


@pytest.mark.parametrize("kind", ["torch", "window", "onnx"])
def test_only_new_tokens_are_run_and_the_text_is_that_of_a_fresh_run(kind, models):
    if kind == "onnx":
        from tinycompress.export import OrtModel

        engine: Any = OrtModel(models / "onnx")
    else:
        engine = (windowed() if kind == "window" else checkpoint.load(models / "model")).module()
    conversation = Conversation(engine)
    ids = list(range(4, 40))
    for turn in range(3):
        new = conversation.generate(torch.tensor(ids), 6)
        assert torch.equal(new, engine.generate(torch.tensor(ids), 6))
        assert conversation.ran == (36 + 5 if turn == 0 else 9 + 1 + 5)
        ids += [*new.tolist(), *range(50, 59)]
    changed = [*ids[:20], 99, 98]  # an earlier turn is another one
    assert torch.equal(conversation.generate(torch.tensor(changed), 6), engine.generate(torch.tensor(changed), 6))
    if kind != "window":
        assert conversation.ran == 2 + 5


def test_an_interrupted_answer_leaves_the_cache_sound(models):
    engine = checkpoint.load(models / "model").module()
    conversation = Conversation(engine)
    prompt = torch.arange(4, 30)
    hidden = engine.hidden

    def interrupted(ids, cache=None):
        out = hidden(ids, cache)
        if cache.length > 28:
            raise KeyboardInterrupt
        return out

    engine.hidden = interrupted
    with pytest.raises(KeyboardInterrupt):
        conversation.generate(prompt, 8)
    del engine.hidden
    assert torch.equal(conversation.generate(prompt, 8), engine.generate(prompt, 8)) and conversation.ran == 8


def talk(monkeypatch: pytest.MonkeyPatch, model: Path, lines: list[str], *options: object) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    from typer.testing import CliRunner

    from tinycompress.cli.main import app

    result = CliRunner().invoke(app, ["chat", str(model), *map(str, options)], input="\n".join(lines) + "\n")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout, result.stderr


def expected(model: Path, messages: list[dict[str, str]], n: int) -> str:
    graph = checkpoint.load(model)
    ids = ChatTemplate.of(graph.tokenizer).ids(messages, add_generation_prompt=True)
    new = graph.module().generate(torch.tensor(ids), n)
    return graph.tokenizer.decode(new.tolist(), skip_special_tokens=True)


def test_a_line_is_a_turn_and_history_is_kept(models, monkeypatch):
    model = models / "model"
    lines = ["Hi", "", "/help", "/nothing", "Again", "/reset", "Hi", "/exit", "never"]
    out, err = talk(monkeypatch, model, lines, "--max-new-tokens", 8)
    first = expected(model, SHORT, 8)
    more = [*SHORT, {"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
    assert out.replace("\ufffd", "") == f"{first}\n{expected(model, more, 8)}\n{first}\n".replace("\ufffd", "")
    assert err.count("8 tokens, ") == 3 and "no command /nothing: /reset begins anew" in err
    system = [{"role": "system", "content": "Rhyme."}, *SHORT]
    out, _ = talk(monkeypatch, model, ["Hi"], "--system", "Rhyme.", "--max-new-tokens", 8)
    assert out.replace("\ufffd", "") == (expected(model, system, 8) + "\n").replace("\ufffd", "")


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(models, capsys):
    graph = checkpoint.load(models / "model")
    engine = Conversation(graph.module())
    turns = command.Talk(engine, ChatTemplate.of(graph.tokenizer), None, 8, {})
    generate = engine.generate

    def stopped(ids, n, **options):
        generate(ids, 3, **options)
        raise KeyboardInterrupt

    engine.generate = stopped  # type: ignore[method-assign]
    assert turns.take("Hi")
    assert "stopped: 3 tokens" in capsys.readouterr().err and turns.messages[-1]["role"] == "assistant"
    engine.generate = generate  # type: ignore[method-assign]
    assert turns.take("Again") and len(turns.messages) == 4 and "8 tokens" in capsys.readouterr().err


def test_a_full_conversation_says_so_and_goes_on(models, monkeypatch):
    out, err = talk(monkeypatch, models / "model", ["x" * 300, "/reset", "Hi"], "--max-new-tokens", 4)
    assert "conversation: found" in err and "4 tokens" in err and out.strip()


def test_a_model_without_a_template_is_refused(models):
    for arguments in (("chat", models / "plain"), ("generate", models / "plain", "Hi", "--chat")):
        assert "chat template: found none in this model; accepted: a model with one" in refused(*arguments)
    assert "--system" in refused("generate", models / "model", "Hi", "--system", "x")
    assert "--context" in refused("chat", models / "model", "--context", 9999)


def test_generate_answers_as_transformers_does(models):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "model")
    ids = tokenizer.apply_chat_template(SHORT, add_generation_prompt=True, return_tensors="pt")
    mask = torch.ones_like(ids)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=3)[
        0, ids.shape[1] :
    ]
    text = tokenizer.decode(new, skip_special_tokens=True)
    shown = run("generate", models / "model", "Hi", "--chat", "--max-new-tokens", 12)
    assert shown.replace("\ufffd", "") == (text + "\n").replace("\ufffd", "")


def test_two_models_side_by_side(models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, [{"prompt": "Hi"}, {"messages": LONG}, {"prompt": LONG[:2]}])))
    model, other = models / "model", models / "other"
    made = json.loads(run("compare", model, other, "--prompts", prompts, "--json", "--max-new-tokens", 6))
    row = made["answers"][0]
    assert row["answers"] == [expected(model, SHORT, 6), expected(other, SHORT, 6)]
    assert made["same"] == 0 and not row["same"] and row["agree"] < 6
    assert made["answers"][1]["answers"][0] == expected(model, LONG[:-1], 6)
    same = json.loads(run("compare", model, model, "--prompts", prompts, "--json", "--max-new-tokens", 6))
    assert same["same"] == 3 and all(row["agree"] == row["tokens"][0] for row in same["answers"])
    (tmp_path / "lines.txt").write_text("Hi\n\nBye\n")
    shown = run("compare", model, other, "--prompts", tmp_path / "lines.txt", "--max-new-tokens", 4, "--raw")
    assert shown.count("▸, after") == 2 and "0 of 2 answers are the same" in shown
    assert "none in use" in refused("compare", model, other, "--prompts", prompts, "--raw")
    code, _, err = invoke("compare", model, other, "--prompts", tmp_path / "none.txt")
    assert code == 2 and "--prompts" in err

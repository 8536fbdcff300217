"""Rows that are conversations: their shapes, what is refused, and which tokens a student learns."""

import json

import pytest
import torch
from chat_templates import CHATML, byte_tokenizer

from tinycompress.calibration import data
from tinycompress.checkpoints.chat_rendering import ChatTemplate
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.recipe.sources import Loaded
from tinycompress.recipe.vocabulary import Data

ASKED = {"role": "user", "content": "Tell a story.\n\nA short one."}
TOLD = {"role": "assistant", "content": "Once."}
SYSTEM = {"role": "system", "content": "Be kind."}
SHAPES = {
    "messages": ({"id": "7", "messages": [ASKED, TOLD], "source": "x"}, [ASKED, TOLD]),
    "prompt": ({"prompt": ASKED["content"], "completion": "Once.", "text": "x"}, [ASKED, TOLD]),
    "prompt of messages": ({"prompt": [SYSTEM, ASKED], "completion": [TOLD]}, [SYSTEM, ASKED, TOLD]),
    "Alpaca": ({"instruction": "Tell a story.", "input": "A short one.", "output": "Once."}, [ASKED, TOLD]),
    "Alpaca without input": ({"instruction": ASKED["content"], "input": "", "output": "Once."}, [ASKED, TOLD]),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "Once."}],
            "system": "Be kind.",
        },
        [SYSTEM, ASKED, TOLD],
    ),
}


def write(path, rows, kind="jsonl"):
    path = path / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_shape_goes_through_the_template(name, kind, tmp_path):
    row, messages = SHAPES[name]
    tokenizer = byte_tokenizer()
    ids = ChatTemplate.of(tokenizer).ids(messages)
    windows = data.tokens(write(tmp_path, [row] * 3, kind), tokenizer, 1, 3 * len(ids))
    assert windows[0].tolist() == ids * 3


def test_texts_are_found_behind_null_and_beside_other_columns(tmp_path):
    rows = [{"text": None, "id": "0"}, {"text": "one", "id": "1", "meta": {"n": 1}}]
    assert data.text(write(tmp_path, rows)) == "\n\none"


REFUSED = {
    "two columns": ([{"id": "a", "body": "x"}], "line 1 of .*: found id .str., body .str.; accepted: messages"),
    "an unknown conversation": ([{"id": "a", "dialog": []}], "line 1 of .*id .str., dialog .list.; accepted: messages"),
    "nothing": ([{}], "no columns"),
    "mixed": (
        [SHAPES["Alpaca"][0], SHAPES["ShareGPT"][0]],
        "line 2 of .*: found conv.*accepted: the columns of line 1",
    ),
    "a text among chats": ([SHAPES["messages"][0], {"text": "x"}], "line 2 of .*: found text .str."),
    "a chat among texts": ([{"text": "x"}, {"text": "x", "messages": [ASKED]}], "line 2 of"),
    "a missing text": ([{"text": "x"}, {"id": "x"}], "line 2 of .*: found id .str.; accepted: .*text"),
    "null messages": ([{"messages": None}], "messages in line 1 of .*: found None"),
    "parts of content": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "messages in line 1"),
    "an unknown speaker": ([{"conversations": [{"from": "bing", "value": "x"}]}], "from 'bing'; accepted: human"),
    "earlier turns aside": ([{"instruction": "a", "output": "b", "history": [["c", "d"]]}], "history in line 1"),
    "no object": ([3], "line 1 of .*: found 3; accepted: an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_of_another_shape_is_refused(name, tmp_path):
    rows, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        data.tokens(write(tmp_path, rows), byte_tokenizer(), 1, 8)


def test_a_list_names_the_line_of_the_row(tmp_path):
    with pytest.raises(InputError, match="line 5 of"):
        data.text(write(tmp_path, [{"text": "x"}, {"id": "x"}], "json"))


def test_conversations_need_a_template(tmp_path):
    path = write(tmp_path, [SHAPES["messages"][0]])
    for tokenizer in (byte_tokenizer(None), lambda text: {"input_ids": [1]}):
        with pytest.raises(InputError, match=r"chat template for .*chat_template\.jinja.*plain text"):
            data.tokens(path, tokenizer, 1, 8)
    with pytest.raises(InputError, match=r"line 1 of .*no answers"):
        template = CHATML + "{% if messages | length > 1 %}{{ raise_exception('no answers') }}{% endif %}"
        data.tokens(path, byte_tokenizer(template), 1, 8)


def test_a_student_learns_the_answers(tmp_path):
    """The recipe's Distill gets weights that are 1 exactly where the assistant's words are."""
    path = write(tmp_path, [SHAPES["messages"][0], SHAPES["messages"][0] | {"messages": [ASKED, TOLD] * 2}])
    tokenizer = byte_tokenizer()
    config = Config(vocab_size=260, hidden_size=16, head_dim=8, layers=(Layer(2, 1, 16),), max_position=32)
    graph = Graph.random(config).replace(tokenizer=tokenizer)
    sources = Loaded(graph, 32)
    for described in (Data(str(path), 64, 16, in_order=True), Data(str(path), 4, 32, seed=3)):
        windows = sources.tokens(described)
        weights = sources.answers(windows)
        assert weights is not None and weights.shape == windows.shape
        learned = tokenizer.decode(windows[weights.bool()].tolist())
        assert learned == "Once.<|im_end|>" * learned.count("Once.") and "Once." in learned
        rest = tokenizer.decode(windows[~weights.bool()].tolist())
        assert "Once" not in rest and "story" in rest
    assert sources.answers(torch.zeros(1, 2)) is None
    assert sources.answers(sources.tokens(Data("pydoc", 2, 16))) is None

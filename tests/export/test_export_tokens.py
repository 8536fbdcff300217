"""What ends a text, how it is drawn, and the tokenizer's files: kept in exports, in the form each runtime takes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from exported import small
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.export import OrtModel, StaticModel, export, read
from tinycompress.graph.graph import Graph

LLAMA3 = {
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
}
PROMPT = [1, 5, 9, 77, 3, 8]


def tokenizer(**config) -> Tokenizer:
    """One of 128 letters."""
    letters = [*map(chr, range(33, 127)), *map(chr, range(0x100, 0x11F))]  # Ġ, 0x120, is the blank
    tokens = ["<unk>", "<s>", "</s>", *letters[:-1], "Ġ"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"} | config)


def with_generation(folder: Path, graph: Graph, **changes) -> Graph:
    """The graph of a saved folder that has another generation_config.json."""
    save(graph, folder)
    (folder / "generation_config.json").write_text(json.dumps(LLAMA3 | changes))
    return load(folder)


@pytest.mark.parametrize("profile", ["ort", "web", "std"])
def test_generation_config_goes_along(profile, tmp_path):
    graph = with_generation(tmp_path / "model", small())
    export(graph, tmp_path / "out", profile, check=False)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == LLAMA3
    back = read(tmp_path / "out")
    assert back.generation == LLAMA3 and back.config.eos_token_id == (2, 7)
    if profile == "web":
        return
    config = json.loads((tmp_path / "out/genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 7] and config["model"]["pad_token_id"] == 0
    search = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    assert config["search"].items() >= search.items()


def test_the_runtime_draws_as_torch_does(tmp_path):
    graph = with_generation(tmp_path / "model", small(), top_k=5)
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    ids = torch.tensor(PROMPT)
    model, module = OrtModel(tmp_path / "out"), graph.module()
    for options in ({"seed": 1}, {"seed": 2, "stop": ()}, {"temperature": 0.0}):
        assert torch.equal(model.generate(ids, 20, **options), module.generate(ids, 20, **options))


def test_a_static_export_keeps_it_too(tmp_path):
    graph = with_generation(tmp_path / "model", small())
    export(graph, tmp_path / "out", "static", check=False)
    assert StaticModel(tmp_path / "out").generation == LLAMA3


def greedy_of_genai(folder: Path, **options) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=40, **options)
    generator = og.Generator(model, params)
    generator.append_tokens(torch.tensor(PROMPT, dtype=torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)][len(PROMPT) :]


@pytest.mark.parametrize("ends", ["list", "null"])
def test_genai_ends_where_torch_ends(ends, tmp_path):
    """In the middle of the text by an id that only generation_config.json has, or never."""
    graph = small(eos_token_id=None)
    free = graph.module().generate(torch.tensor(PROMPT), 34).tolist()
    end = free[12]
    changes = {"eos_token_id": None if ends == "null" else [127, end], "do_sample": False, "repetition_penalty": 1.0}
    graph = with_generation(tmp_path / "model", graph, **changes)
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    expected = free if ends == "null" else free[: free.index(end)]
    assert graph.module().generate(torch.tensor(PROMPT), 34).tolist() == expected
    written = greedy_of_genai(tmp_path / "out")
    assert written[: len(expected)] == expected and written[len(expected) :] in ([], [end])


def test_genai_uses_the_penalty(tmp_path):
    graph = with_generation(
        tmp_path / "model", small(eos_token_id=None), do_sample=False, eos_token_id=None, repetition_penalty=1.5
    )
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    assert greedy_of_genai(tmp_path / "out") == graph.module().generate(torch.tensor(PROMPT), 34).tolist()


@pytest.mark.parametrize("profile", ["ort", "static"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eos_token_id": (2, 9999), "pad_token_id": 9998}, "eos_token_id 9999, pad_token_id 9998"),
        ({"bos_token_id": 128}, "bos_token_id 128"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(changes, message, profile, tmp_path):
    with pytest.raises(InputError, match=f"ids beyond the vocabulary: found {message}.*128"):
        export(small(**changes), tmp_path / "out", profile, check=False)
    assert not (tmp_path / "out").exists()


def test_a_token_more_than_the_vocabulary_opens_and_is_not_exported(tmp_path):
    """The [PAD] of a fine-tune whose embedding was not resized."""
    larger = tokenizer()
    larger.backend.add_special_tokens(["[PAD]"])
    save(small().replace(tokenizer=larger), tmp_path / "model")
    with pytest.warns(UserWarning, match=r"token '\[PAD\]' 128 beyond vocab_size = 128"):
        graph = load(tmp_path / "model")
    ids = torch.tensor(graph.tokenizer.encode("[PAD]"))
    with pytest.raises(InputError, match="vocabulary"):
        graph.module().generate(ids)
    with pytest.raises(InputError, match=r"\[PAD\]"):
        export(graph, tmp_path / "out", check=False)


def test_ids_beyond_the_vocabulary_open_with_a_warning(tmp_path):
    save(small(eos_token_id=(2, 9999)), tmp_path / "model")
    with pytest.warns(UserWarning, match="eos_token_id 9999 beyond vocab_size = 128"):
        assert load(tmp_path / "model").config.eos_token_id == (2, 9999)


TEMPLATE = "{% for m in messages %}<s>{{m.role}}:{{m.content}}{% endfor %}"
NAMED = {"default": TEMPLATE, "tool_use": "{{ messages }}"}


@pytest.mark.parametrize("template", [TEMPLATE, NAMED], ids=["string", "named"])
def test_genai_applies_the_default_template(template, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    graph = small().replace(tokenizer=tokenizer(chat_template=template))
    export(graph, tmp_path / "out", check=False)
    messages = json.dumps([{"role": "user", "content": "hi"}])
    made = og.Tokenizer(og.Model(str(tmp_path / "out")))
    assert made.apply_chat_template(messages=messages, add_generation_prompt=False) == "<s>user:hi"
    assert read(tmp_path / "out").tokenizer.config["chat_template"] == template


def test_transformers_js_gets_a_list_of_named_templates(tmp_path):
    graph = small().replace(tokenizer=tokenizer(chat_template=NAMED))
    export(graph, tmp_path / "out", "web", check=False)
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"]: entry["template"] for entry in written} == NAMED


def test_a_tokenizer_of_transformers_5_in_genai_and_transformers_4(tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    from transformers import AutoTokenizer

    marked = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False}
    config = {"tokenizer_class": "TokenizersBackend", "model_max_length": 10**30, "bos_token": marked}
    save(small().replace(tokenizer=tokenizer()), tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config))
    export(load(tmp_path / "model"), tmp_path / "out", check=False)
    expected = read(tmp_path / "out").tokenizer.encode("abc <s>")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("abc <s>") == expected
    assert list(og.Tokenizer(og.Model(str(tmp_path / "out"))).encode("abc <s>")) == expected


def test_a_graph_without_the_file_writes_its_ids(tmp_path):
    graph = small()
    export(graph, tmp_path / "out", check=False)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    changed = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=(3, 4)))
    export(changed, tmp_path / "more", check=False)
    assert json.loads((tmp_path / "more/generation_config.json").read_text())["eos_token_id"] == [3, 4]

"""generation_config.json: read as transformers reads it, written back as it was, and followed by `generate`."""

import dataclasses
import json
import warnings

import pytest
import torch
from checkpoint_cases import IDS, as_hf, edit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.hf import model_from_graph
from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph
from tinycompress.model.sampling import Draw, draw_of, ignored_keys

LLAMA3 = {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder of transformers' kind whose config.json ends a text with id 2."""
    path = as_hf(tiny, tmp_path / "model")
    (path / "generation_config.json").unlink()
    edit(path, bos_token_id=1, eos_token_id=2)
    return path


def put(folder, contents) -> None:
    (folder / "generation_config.json").write_text(json.dumps(contents))


def of_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ends_of_transformers(folder) -> tuple[int, ...]:
    """The ids that end a text in transformers; negative ones never match."""
    eos = of_transformers(folder).generation_config.eos_token_id
    values = eos if isinstance(eos, list) else [eos]
    return tuple(value for value in values if value is not None and value >= 0)


def ends(graph: Graph) -> tuple[int, ...]:
    eos = graph.config.eos_token_id
    return eos if isinstance(eos, tuple) else () if eos is None else (eos,)


FILES = {
    "a list": LLAMA3,
    "one": {"eos_token_id": 9},
    "list of one": {"eos_token_id": [9], "pad_token_id": 0},
    "null": {"eos_token_id": None},
    "none": {"temperature": 0.5},
    "negative": {"eos_token_id": -1, "pad_token_id": -1},
    "a negative one among them": {"eos_token_id": [2, -1]},
    "empty": {},
    "beyond the vocabulary": {"eos_token_id": [2, 999]},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:.*(no eos_token_id|beyond vocab_size)")
def test_what_ends_a_text_is_what_transformers_says_and_is_written_back(name, folder, tmp_path):
    put(folder, FILES[name])
    graph = load(folder)
    assert ends(graph) == ends_of_transformers(folder)
    saved = save(graph, tmp_path / "saved")
    assert json.loads((saved / "generation_config.json").read_text()) == FILES[name]
    assert ends(load(saved)) == ends_of_transformers(saved) == ends(graph)
    (saved / "tinycompress.json").unlink()
    assert ends(load(saved)) == ends(graph)


def test_without_the_file_config_json_says_it(folder):
    assert ends(load(folder)) == ends_of_transformers(folder) == (2,)
    assert load(folder).generation is None
    edit(folder, temperature=0.5, do_sample=True, repetition_penalty=1.2)  # as old folders have it
    graph = load(folder)
    assert ends(graph) == (2,)
    assert draw_of(graph.generation, {}) == Draw(0.5, 50, repetition_penalty=1.2)


def test_a_file_without_an_end_is_told(folder):
    put(folder, {"temperature": 0.5})
    with pytest.warns(UserWarning, match=r"generation_config\.json has no eos_token_id.*the 2 of config\.json"):
        load(folder)


@pytest.mark.parametrize("bad", ["2", [2, "x"], True, 2.5, {"a": 1}, [[2]]])
def test_a_bad_id_is_one_clear_error(bad, folder):
    put(folder, {"eos_token_id": bad})
    with pytest.raises(InputError, match=r"eos_token_id in .*generation_config\.json"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\xff"])
def test_a_broken_file_is_named(text, folder):
    (folder / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"generation_config\.json"):
        load(folder)


def test_ids_that_were_changed_since_are_written(folder, tmp_path):
    put(folder, LLAMA3 | {"max_length": 99, "pad_token_id": 0})
    graph = load(folder)
    changed = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=(3, 4), pad_token_id=5))
    written = json.loads((save(changed, tmp_path / "saved") / "generation_config.json").read_text())
    assert written == LLAMA3 | {"max_length": 99, "eos_token_id": [3, 4], "pad_token_id": 5}
    none = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=None))
    assert ends(load(save(none, tmp_path / "none"))) == ends_of_transformers(tmp_path / "none") == ()


def test_a_live_model_and_back(folder):
    put(folder, LLAMA3)
    graph = load(of_transformers(folder))
    assert ends(graph) == (2, 7) and draw_of(graph.generation, {}) == Draw(0.6, 50, 0.9)
    back = model_from_graph(graph).generation_config
    assert back.eos_token_id == [2, 7] and back.temperature == 0.6 and back.do_sample
    assert load(model_from_graph(graph.replace(generation={}))).generation["eos_token_id"] == [2, 7]


def test_options_of_the_caller_come_first():
    assert draw_of(None, {}) == draw_of({}, {}) == Draw()
    assert draw_of({"temperature": 0.6, "top_k": 5}, {}) == Draw(0.0, 5)  # no do_sample: greedy
    assert draw_of({"temperature": 0.6, "top_k": 5}, {"temperature": 0.8}) == Draw(0.8, 5)
    assert draw_of(LLAMA3, {"temperature": 0.0}).temperature == 0
    assert draw_of(LLAMA3, {"top_k": 0, "top_p": 1.0, "min_p": 0.1}) == Draw(0.6, 0, 1.0, 0.1)
    assert draw_of({"do_sample": True, "top_k": None}, {}) == Draw(1.0, 0)
    for stored, options, name in (
        ({"do_sample": 1.5}, {}, "do_sample in generation_config"),
        ({"do_sample": True, "temperature": "x"}, {}, "temperature in generation_config"),
        ({"do_sample": True, "temperature": float("nan")}, {}, "temperature in generation_config"),
        ({"top_p": 1.5}, {}, "top_p in generation_config"),
        ({"repetition_penalty": 0}, {}, "repetition_penalty in generation_config"),
        ({}, {"top_k": 2.5}, "top_k"),
        ({}, {"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(InputError, match=name):
            draw_of(stored, options)


def greedy_of_transformers(folder, prompt, length: int) -> list[int]:
    model = of_transformers(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_greedy_text_with_a_penalty_and_many_ends_is_that_of_transformers(penalty, folder):
    prompt = IDS[:, :8]
    free = load(folder).module().generate(prompt, 40, stop=(), repetition_penalty=penalty).tolist()
    put(folder, {"eos_token_id": [free[20], 127], "repetition_penalty": penalty})
    ours = load(folder).module().generate(prompt, 40, temperature=0).tolist()
    theirs = greedy_of_transformers(folder, prompt, 40)
    assert ours == free[: free.index(free[20])]
    assert theirs == [*ours, free[20]]  # transformers keeps the end itself


SAMPLED = [
    {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 2.0, "min_p": 0.3},
    {"do_sample": True, "top_p": 0.5},
    {"do_sample": True},
]


@pytest.mark.parametrize("values", SAMPLED, ids=str)
def test_tokens_are_drawn_from_the_distribution_of_transformers(values, folder):
    """The probabilities of 20,000 draws, against those that transformers' own processors leave."""
    from transformers import GenerationConfig

    put(folder, values | {"eos_token_id": 2})
    model = of_transformers(folder)
    config = GenerationConfig.from_pretrained(folder)
    config._eos_token_tensor = torch.tensor([2])
    logits = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 3
    processors = model._get_logits_processor(config, input_ids_seq_length=48, device="cpu")
    expected = processors(IDS, logits[None].clone())[0].softmax(-1)
    draw = draw_of(load(folder).generation, {})
    generator = torch.Generator().manual_seed(2)
    drawn = torch.bincount(
        torch.tensor([draw.token(logits, IDS[0].tolist(), generator) for _ in range(20_000)]), minlength=128
    )
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert (drawn / 20_000 - expected).abs().sum() < 0.1


def test_what_is_not_honoured_is_named_once(folder):
    contents = {"num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "typical_p": 0.9, "max_length": 9}
    put(folder, contents | {"eos_token_id": 2, "forced_eos_token_id": None, "min_length": 0})
    graph = load(folder)
    assert ignored_keys(graph.generation, Draw()) == ["num_beams", "no_repeat_ngram_size", "suppress_tokens"]
    assert "typical_p" in ignored_keys(graph.generation, Draw(1.0))
    with pytest.warns(UserWarning, match="num_beams, no_repeat_ngram_size, suppress_tokens not honoured"):
        graph.module().generate(IDS, 2)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            graph.module().generate(IDS, 2)
    assert len(shown) == 1


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 200), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
KEYS = [
    *("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "num_beams", "suppress_tokens", "transformers_version", "x"),
]


def try_mutation(contents, folder):
    """Either an `InputError`, or the ends of transformers where it opens the folder, and a text."""
    put(folder, contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = load(folder)
            text = graph.module().generate(IDS[:, :4], 2, seed=0)
        except InputError:
            return
        assert text.numel() <= 2
        try:
            theirs = ends_of_transformers(folder)
        except Exception:  # transformers refuses what we open
            return
        assert ends(graph) == theirs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_mutated_files_end_in_an_input_error_or_as_in_transformers(contents, folder):
    try_mutation(contents, folder)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_two_thousand_mutated_files(contents, folder):
    try_mutation(contents, folder)

"""Exports in onnxruntime-genai as it is used: families, prompts with and without a beginning, where a text ends, what a
default generator takes of memory."""

import dataclasses
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from exported import ids_of, small
from test_export_families import FAMILIES, family

from tinycompress.checkpoints.checkpoint import load
from tinycompress.errors import InputError
from tinycompress.export import OrtModel, export, prepare, read, verify, write_reference
from tinycompress.export.configs import LARGEST_CACHE, default_length
from tinycompress.export.gate.runtime import RUNTIMES
from tinycompress.graph.config import Config, Layer

og = pytest.importorskip("onnxruntime_genai")
TEXTS = ("Once upon a time", " Once", "", "two  spaces\n\tand a tab, é 模型 🙂", "<s>Once", "The end.</s>")


def written(folder, prompt: list[int], n: int) -> list[int]:
    """What genai's greedy search writes behind the prompt."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + n)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    """The same greedy text as torch, several windows long, and the type that genai knows the family by."""
    graph = family(name)
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    prompt = ids_of(graph, 8)
    expected = graph.module().generate(prompt, 40, stop=()).tolist()
    assert written(tmp_path / "out", prompt[0].tolist(), 40) == expected
    kind = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["type"]
    plain = {"all, layers that differ": "llama", "no RoPE at all": "smollm3"}
    assert kind == plain.get(name, name.partition(",")[0])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_text_ends_where_transformers_ends_it(number, tmp_path):
    """At any of the ids that generation_config.json names, the first of them or not."""
    transformers = pytest.importorskip("transformers")
    graph = small()
    prompt = ids_of(graph, 6)
    free = graph.module().generate(prompt, 24, stop=()).tolist()
    ends = tuple(t for t in range(3, 128) if t not in free)[: number - 1]
    graph = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=(*ends, free[12])))
    export(graph, tmp_path / "out", check=False)
    theirs = graph.to_hf().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=0,
        generation_config=transformers.GenerationConfig(eos_token_id=[*ends, free[12]]),
    )
    expected = theirs[0, 6:].tolist()
    assert expected == free[: free.index(free[12]) + 1]
    assert written(tmp_path / "out", prompt[0].tolist(), 24) == expected[:-1]  # genai 0.18 leaves out the end itself
    assert OrtModel(tmp_path / "out").generate(prompt, 24).tolist() == expected[:-1]


def test_prompts_have_the_ids_of_transformers(shared, tmp_path):
    """With the beginning of text where `add_special_tokens` asks for it (deploy.md), and without where it does not."""
    transformers = pytest.importorskip("transformers")
    graph = load(shared / "models" / "stories260K")
    export(graph, tmp_path / "out", check=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = og.Model(str(tmp_path / "out"))
    for special in (False, True):
        tokenizer = og.Tokenizer(model)
        if special:
            tokenizer.update_options(add_special_tokens="true")
        for text in TEXTS:
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert tokenizer.encode(text).tolist() == expected == graph.tokenizer.encode(text, special)
    assert expected[0] == graph.config.bos_token_id


def test_a_long_context_takes_no_memory_by_default(tmp_path):
    """A generator without a length takes the cache of `max_length`; one that names more gets it, up to the context."""
    llama_3_2_1b = Config(512, 64, 64, (Layer(32, 8, 96),) * 16, max_position=131072)
    assert default_length(llama_3_2_1b) == 4096 == LARGEST_CACHE // (16 * 8 * 64 * 2 * 4)
    assert default_length(llama_3_2_1b, cache_bytes=1) == 4 * 4096
    assert default_length(dataclasses.replace(llama_3_2_1b, layers=(Layer(32, 32, 96),) * 32)) == 2048
    assert default_length(dataclasses.replace(llama_3_2_1b, max_position=1000)) == 1000
    assert default_length(dataclasses.replace(llama_3_2_1b, layers=(Layer(0, 0, 96),))) == 131072
    graph = small(layers=(Layer(16, 16, 32),) * 8, max_position=32768)
    export(graph, tmp_path / "out", check=False)
    model = og.Model(str(tmp_path / "out"))
    default = json.loads((tmp_path / "out" / "genai_config.json").read_text())["search"]["max_length"]
    assert default == 16384
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=default + 1)
    og.Generator(model, params)


def test_a_shorter_context(tmp_path):
    """`context` cuts the rotary tables and what the manifest promises; the gate reads the same graph back."""
    graph = small(max_position=512)
    manifest = export(graph, tmp_path / "out", context=64)
    assert manifest["config"]["max_position"] == 64 and manifest["checks"]["passed"]
    assert verify(tmp_path / "out", graph)["passed"]
    assert read(tmp_path / "out").config.max_position == 64
    with pytest.raises(InputError, match="context: found 513"):
        export(graph, tmp_path / "long", context=513)


def edited(folder, name: str, **changes) -> None:
    """A JSON file of an export with other fields; those of genai_config.json's model."""
    path = folder / name
    data = json.loads(path.read_text())
    (data["model"] if name == "genai_config.json" else data).update(changes)
    path.write_text(json.dumps(data))


def test_the_runtime_check_sees_wrong_ids_ends_and_padding(shared, tmp_path, monkeypatch):
    """Each of them alone, in files that are otherwise right: logits and greedy text are as they were."""
    monkeypatch.setattr(sys, "path", [str(RUNTIMES), *sys.path])
    place = RUNTIMES / "onnxruntime-genai" / "check.py"
    spec = importlib.util.spec_from_file_location("genai_check", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph = load(shared / "models" / "stories260K")
    good = tmp_path / "good"
    export(graph, good, check=False, accuracy_level=0)
    ids = ids_of(graph, 40)
    write_reference(prepare(graph), good, ids=ids, progress=False)
    reference = module.Reference(good)
    assert reference.ends == [2] and reference.texts[0]["special"] == [1, *reference.texts[0]["plain"]]
    assert module.check(good, reference)[1] == []
    wrong = {
        "eos_token_id of genai_config.json is": ("genai_config.json", {"eos_token_id": [2, 7]}),
        "the short row of a padded batch writes": ("genai_config.json", {"pad_token_id": int(ids[0, 3])}),
        "special ids of 'Once upon a time' are": ("tokenizer.json", {"post_processor": None}),
    }
    for message, (name, changes) in wrong.items():
        folder = tmp_path / name.partition(".")[0] / next(iter(changes))
        shutil.copytree(good, folder)
        edited(folder, name, **changes)
        failures = module.check(folder, reference)[1]
        assert failures and all(failure.startswith((message, "special ids of")) for failure in failures), failures
        assert failures[0].startswith(message)
    reference.ends = [reference.greedy[3]]  # which the files do not name
    assert "the text goes on behind an end" in module.check(good, reference)[1]

"""Every kind of file that this library reads from others: a small good one, how it is damaged, and what reads it."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import random_graph
from gguf_files import split
from hostile_damage import (
    Files,
    in_bytes,
    in_cache,
    in_description,
    in_gguf,
    in_headers,
    in_json,
    in_onnx,
    in_recipe,
    in_sentencepiece,
    in_state,
    in_templates,
    in_tokenizer_files,
)
from layout_cases import quantized
from test_sentencepiece import train
from tokenizer_cases import BACKENDS

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.distillation.training_state import latest_state, load_state, save_state
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.model.sampling import draw_of
from tinycompress.recipe.recipe import read_recipe

ROOT = Path(__file__).parents[2]
IDS = torch.arange(8)[None]
TEXT = "<s>Once upon  a time, 123 naïve 漢字</s> it's\n"
SECRET = 777.0  # what the weights outside are made of
CONFIG = Config(400, 32, 8, (Layer(4, 2, 48),) * 2, max_position=64, bos_token_id=0, eos_token_id=1)
KEY = "a run's key"


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Fields:
        count: how many damaged ones the long test reads.
        make: writes good files into an empty folder.
        damage: of the contents of these files, those that are to be changed.
        read: reads the folder as a user would; the second folder is there to be written.
    """

    count: int
    make: Callable[[Path], None]
    damage: Callable[[Files, random.Random], Files]
    read: Callable[[Path, Path], None]


def tokenizer(kind: str = "bytes") -> Tokenizer:
    import tokenizers

    specials = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    return Tokenizer(tokenizers.Tokenizer.from_str(BACKENDS[kind]), specials)


def graph_of(config: Config = CONFIG) -> Graph:
    return random_graph(config).replace(tokenizer=tokenizer())


def as_hf(folder: Path, **options: Any) -> None:
    """A folder that Hugging Face's config alone describes."""
    save(graph_of(), folder, **options)
    (folder / "tinycompress.json").unlink()


def in_shards(folder: Path) -> None:
    as_hf(folder, max_shard_bytes=30_000)


def native(folder: Path) -> None:
    """A folder of `save`, quantized."""
    save(quantized("w4g16-asym", CONFIG).replace(tokenizer=tokenizer()), folder)


def packed(format: str, grid: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = Config(64, 32, 16, (Layer(2, 2, 32),), max_position=64)
        save(quantized(grid, config), folder, format=format)

    return make


def sentencepiece(folder: Path) -> None:
    """A folder whose tokenizer is SentencePiece's tokenizer.model."""
    as_hf(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    config = (folder / "config.json").read_text()
    train(folder, TEXT * 500, vocab_size=300, hard_vocab_limit=False)
    (folder / "config.json").write_text(config)


def vocabulary(folder: Path) -> None:
    """A folder whose tokenizer is vocab.json with merges.txt."""
    as_hf(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


def gguf_file(folder: Path) -> None:
    folder.mkdir()
    save(graph_of(), folder / "m.gguf", format="gguf")


def gguf_parts(folder: Path) -> None:
    gguf_file(folder)
    split(folder / "m.gguf", 2)


def exported(profile: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tinycompress.export import export

        config = Config(128, 64, 16, (Layer(4, 2, 96),), max_position=64, bos_token_id=1, eos_token_id=2)
        export(quantized("w4g32", config), folder, profile, check=False)

    return make


def recipes(folder: Path) -> None:
    folder.mkdir()
    for path in sorted((ROOT / "docs" / "recipes").glob("*.toml")):
        (folder / path.name).write_text(path.read_text())


def teacher_cache(folder: Path) -> None:
    write_cache(random_graph(CONFIG), torch.arange(60).reshape(5, 12), folder, draws=20, shard_tokens=24)


def training_state(folder: Path) -> None:
    save_state(folder, 3, state_tensors(), {"key": KEY, "losses": [1.0, 2.0], "best": None})


def state_tensors() -> dict[str, torch.Tensor]:
    return {"weight.a": torch.ones(4, 6), "exp_avg.a": torch.zeros(4, 6), "weight.b": torch.ones(3)}


def read_model(folder: Path, out: Path) -> None:
    """Loads a folder or a file, reads every weight, and does a little of everything with it."""
    graph = load(next(iter(sorted(folder.glob("*.gguf"))), folder))
    for name in graph.weights:
        check_secret(graph, name)
    with torch.no_grad():
        logits = graph.module()(IDS % graph.config.vocab_size)
    assert logits.shape == (1, IDS.shape[1], graph.config.vocab_size)
    draw_of(graph.generation, {})
    if graph.tokenizer is not None:
        ids = graph.tokenizer.encode(TEXT, add_special_tokens=True)
        graph.tokenizer.decode(ids)
        graph.tokenizer.save(out)


def read_export(folder: Path, out: Path) -> None:
    from tinycompress.export import read
    from tinycompress.export.read import check_sizes, kv_scales, read_manifest

    graph = read(folder)
    for name in graph.weights:
        check_secret(graph, name)
    kv_scales(folder)
    check_sizes(folder, read_manifest(folder))


@functools.cache
def recipe_graph() -> Graph:
    """A graph that every good recipe fits."""
    return graph_of(Config(400, 128, 16, (Layer(8, 4, 512),) * 4, max_position=2048))


def read_a_recipe(folder: Path, out: Path) -> None:
    recipe = read_recipe(folder / "small.toml")
    recipe.foretell(recipe_graph())


def read_cache(folder: Path, out: Path) -> None:
    cache = open_cache(folder)
    target = cache.target(range(cache.windows))
    assert target.ids.min() >= 0 and target.ids.max() < cache.vocab_size
    assert torch.isfinite(target.probs).all() and cache.nbytes >= 0 and cache.fingerprint


def read_state(folder: Path, out: Path) -> None:
    state = latest_state(folder, KEY)
    if state is not None:
        tensors = state_tensors()
        load_state(state, tensors)
        assert not any((tensor == SECRET).any() for tensor in tensors.values())


def check_secret(graph: Graph, name: str) -> None:
    """Reads a weight, which must not be one from outside the folder."""
    weight = graph.weights[name]
    tensor = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    assert not (tensor == SECRET).any(), "weights from outside the folder"


KINDS: Mapping[str, Kind] = {
    "config": Kind(2000, as_hf, in_json("config.json"), read_model),
    "own config": Kind(1000, native, in_description, read_model),
    "generation config": Kind(1000, as_hf, in_json("generation_config.json"), read_model),
    "GPTQ config": Kind(500, packed("gptq", "w4g16"), in_json("config.json", "quantize_config.json"), read_model),
    "AWQ config": Kind(200, packed("awq", "w4g16-asym"), in_json("config.json"), read_model),
    "compressed-tensors config": Kind(300, packed("compressed-tensors", "w4g16"), in_json("config.json"), read_model),
    "tokenizer": Kind(1000, as_hf, in_json("tokenizer.json"), read_model),
    "tokenizer files": Kind(1500, as_hf, in_tokenizer_files, read_model),
    "SentencePiece": Kind(1000, sentencepiece, in_sentencepiece, read_model),
    "vocabulary": Kind(500, vocabulary, in_json("vocab.json"), read_model),
    "merges": Kind(500, vocabulary, in_bytes("merges.txt"), read_model),
    "chat templates": Kind(1000, as_hf, in_templates, read_model),
    "safetensors": Kind(1500, as_hf, in_headers, read_model),
    "packed safetensors": Kind(500, packed("gptq", "w4g16"), in_headers, read_model),
    "index": Kind(1000, in_shards, in_json("index.json"), read_model),
    "GGUF": Kind(1500, gguf_file, in_gguf, read_model),
    "GGUF in parts": Kind(500, gguf_parts, in_gguf, read_model),
    "manifest": Kind(500, exported("ort"), in_json("manifest.json"), read_export),
    "manifest, std": Kind(250, exported("std"), in_json("manifest.json"), read_export),
    "manifest, static": Kind(250, exported("static"), in_json("manifest.json"), read_export),
    "ONNX": Kind(750, exported("ort"), in_onnx, read_export),
    "ONNX, std": Kind(250, exported("std"), in_onnx, read_export),
    "recipe": Kind(1000, recipes, in_recipe, read_a_recipe),
    "teacher cache": Kind(1000, teacher_cache, in_cache, read_cache),
    "training state": Kind(500, training_state, in_state, read_state),
}

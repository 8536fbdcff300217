"""Every kind of file that this library reads from others: a small good one, how it is damaged, and what reads it."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutator
import torch
from conftest import random_graph
from gguf_files import split
from layout_cases import quantized
from test_sentencepiece import train
from tokenizer_cases import BACKENDS

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.distillation.training_state import latest_state, load_state, save_state
from tinycompress.files import seal
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.model.sampling import draw_of
from tinycompress.recipe.recipe import read_recipe

Files = Mapping[str, bytes]
ROOT = Path(__file__).parents[2]
IDS = torch.arange(8)[None]
TEXT = "<s>Once upon  a time, 123 naïve 漢字</s> it's\n"
SECRET = 777.0  # what the weights outside are made of
CONFIG = Config(400, 32, 8, (Layer(4, 2, 48),) * 2, max_position=64, bos_token_id=0, eos_token_id=1)
KEY = "a run's key"
TEMPLATES = (
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ 'x' * 10**12 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}",
    "{% include '/etc/passwd' %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ range(10**9)|list }}",
    "{% import 'os' as os %}",
    "{{",
    "{{ messages }}" * 1000,
)


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


# ---- damage


def in_json(*names: str) -> Callable[[Files, random.Random], Files]:
    """Changes one JSON file of those names, or of those endings."""

    def damage(files: Files, draw: random.Random) -> Files:
        name = draw.choice([name for name in sorted(files) if name.endswith(names)])
        return {name: mutator.json_text(json.loads(files[name]), draw)}

    return damage


def in_bytes(*names: str, head: int | None = None) -> Callable[[Files, random.Random], Files]:
    def damage(files: Files, draw: random.Random) -> Files:
        name = draw.choice([name for name in sorted(files) if name.endswith(names)])
        return {name: mutator.some_bytes(files[name], draw, head)}

    return damage


def in_headers(files: Files, draw: random.Random) -> Files:
    name = draw.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    return {name: mutator.safetensors(files[name], draw)}


def in_description(files: Files, draw: random.Random) -> Files:
    """tinycompress.json with or without the seal that its contents then have."""
    name = "tinycompress.json"
    text = mutator.json_text({**json.loads(files[name])}, draw)
    return {name: resealed(text, draw)}


def resealed(text: bytes, draw: random.Random) -> bytes:
    """A sealed file as somebody hostile would hand it in: three in four times its seal is right again."""
    try:
        data = json.loads(text)
    except ValueError:
        return text
    if not isinstance(data, dict) or draw.random() < 0.25:
        return text
    data.pop("sha256", None)
    try:
        return json.dumps(seal(data)).encode()
    except (ValueError, RecursionError):  # a surrogate has no UTF-8
        return text


def in_tokenizer_files(files: Files, draw: random.Random) -> Files:
    """tokenizer_config.json, and files that older tokenizers have beside it."""
    out: dict[str, bytes] = {}
    good = json.loads(files["tokenizer_config.json"]) | {
        "added_tokens_decoder": {"400": {"content": "<new>", "special": True, "normalized": False}},
        "additional_special_tokens": ["<more>"],
        "add_bos_token": True,
        "add_prefix_space": False,
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    if draw.random() < 0.3:
        good["tokenizer_class"] = draw.choice(["LlamaTokenizer", "Qwen2TokenizerFast", "Evil", "GPT2Tokenizer"])
    out["tokenizer_config.json"] = mutator.json_text(good, draw)
    if draw.random() < 0.3:
        out["added_tokens.json"] = mutator.json_text({"<a>": 400, "<b>": 401}, draw)
    if draw.random() < 0.3:
        out["special_tokens_map.json"] = mutator.json_text({"pad_token": {"content": "<s>", "lstrip": False}}, draw)
    return out


def in_sentencepiece(files: Files, draw: random.Random) -> Files:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(files["tokenizer.model"])
    return {"tokenizer.model": mutator.message(proto, draw)}


def in_templates(files: Files, draw: random.Random) -> Files:
    """Templates that would run away, break out or read files, in every place that a folder may have them."""
    config = json.loads(files["tokenizer_config.json"])
    place = draw.randrange(4)
    template = draw.choice(TEMPLATES)
    if place == 0:
        return {"chat_template.jinja": mutator.some_bytes(template.encode(), draw)}
    if place == 1:
        name = draw.choice(("tool_use", "x" * 100, "default", ".hidden"))
        return {f"additional_chat_templates/{name}.jinja": template.encode()}
    stored: Any = template
    if place == 2:
        name = draw.choice((*mutator.NAMES, *mutator.TEXTS, "default", "rag"))
        stored = [{"name": name, "template": template}, {"name": "default", "template": template}]
    if draw.random() < 0.5:
        stored = mutator.json_value(stored, draw)
    return {"tokenizer_config.json": json.dumps(config | {"chat_template": stored}).encode()}


def in_gguf(files: Files, draw: random.Random) -> Files:
    name = draw.choice(sorted(name for name in files if name.endswith(".gguf")))
    head = files[name].rfind(b".weight") + 40
    return {name: mutator.some_bytes(files[name], draw, head)}


def in_onnx(files: Files, draw: random.Random) -> Files:
    import onnx

    proto = onnx.load_model_from_string(files["model.onnx"])
    return {"model.onnx": mutator.message(proto, draw)}


def in_recipe(files: Files, draw: random.Random) -> Files:
    return {"small.toml": mutator.toml_text(files[draw.choice(sorted(files))].decode(), draw)}


def in_cache(files: Files, draw: random.Random) -> Files:
    """The index, or a shard whose damage the index does not tell."""
    index = json.loads(files["index.json"])
    if draw.random() < 0.5:
        return {"index.json": mutator.json_text(index, draw)}
    shard = draw.choice(index["shards"])
    data = mutator.some_bytes(files[shard["file"]], draw, 60)
    shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {shard["file"]: data, "index.json": json.dumps(index).encode()}


def in_state(files: Files, draw: random.Random) -> Files:
    """state.json, or the tensors with their hashes in it."""
    (state,) = [name for name in files if name.endswith("state.json")]
    about = json.loads(files[state])
    if draw.random() < 0.5:
        return {state: resealed(mutator.json_text(about, draw), draw)}
    names = [name for name in sorted(files) if name.endswith(".safetensors")]
    name = draw.choice(names)
    data = mutator.safetensors(files[name], draw)
    own = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    about["files"][name.rpartition("/")[2]] = own
    return {name: data, state: resealed(json.dumps(about).encode(), draw)}


# ---- reading


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

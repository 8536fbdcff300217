"""How each kind of folder is damaged: from the contents of its files to those that are changed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import mutator

from tinycompress.files import seal

Files = Mapping[str, bytes]
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

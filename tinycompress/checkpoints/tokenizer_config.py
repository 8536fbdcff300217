"""What tokenizer_config.json, special_tokens_map.json and added_tokens.json change in a tokenizer.

A tokenizer.json alone is not what transformers' AutoTokenizer works with. These files add tokens to it (`complete`),
and the class that tokenizer_config.json names, or that the model's type stands for, brings special tokens of its own
and, for Llama's, puts them around a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import read_json

if TYPE_CHECKING:
    import tokenizers

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = "additional_special_tokens"
FAST = "PreTrainedTokenizerFast"  # its tokenizer.json says everything, in transformers 4 and 5 alike
LLAMA = "LlamaTokenizer"
CLASS_TOKENS: dict[str, dict[str, str]] = {  # special tokens that a class has where the files name none
    LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
CLASS_OF_MODEL = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
OF_THE_SOURCE = ("auto_map", "is_local", "merges_file", "name_or_path", "tokenizer_file", "vocab_file")


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the special tokens of the other files, as strings, and those of the class.

    As in transformers special_tokens_map.json wins, unless tokenizer_config.json lists added tokens itself.
    """
    config = _object(folder / "tokenizer_config.json")
    if config.get("added_tokens_decoder") is None:
        for name, value in _object(folder / "special_tokens_map.json").items():
            both = name == MORE and isinstance(value, list)
            config[name] = [*(config.get(name) or []), *value] if both else value
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5's name for them; transformers 4 wants an object here
        del config["extra_special_tokens"]
        config[MORE] = [*(config.get(MORE) or []), *extra]
    where = str(folder / "tokenizer_config.json")
    kind = class_of(folder, config)
    if kind == LLAMA:
        config.setdefault("padding_side", "left")
    defaults = CLASS_TOKENS.get(kind, {})
    for name in NAMED:
        value = config[name] if name in config else defaults.get(name)
        if value is not None:
            config[name] = _content(value, name, where)
    if config.get(MORE) is not None:
        if not isinstance(config[MORE], list):
            raise InputError(f"{MORE} in {where}", repr(config[MORE])[:80], "a list of tokens")
        contents = [_content(value, MORE, where) for value in config[MORE]]
        config[MORE] = list(dict.fromkeys(contents))
    return config


def class_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer's class without "Fast": by tokenizer_config.json, else by config.json, else ""."""
    name = config.get("tokenizer_class")
    if name is None:
        model = _object(folder / "config.json")
        kind = model.get("model_type")
        name = model.get("tokenizer_class") or (CLASS_OF_MODEL.get(kind) if isinstance(kind, str) else None)
    return str(name or "").removesuffix("Fast")


def complete(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Gives a tokenizer what the files beside tokenizer.json add; `config` is what `read_config` gave."""
    from tokenizers import AddedToken

    specials = [config[name] for name in NAMED if config.get(name) is not None] + (config.get(MORE) or [])
    if backend.padding is not None:
        specials.append(str(backend.padding["pad_token"]))
    tokens = _added(backend, config, specials, folder)
    known = {token.content for token in tokens} | {t.content for t in backend.get_added_tokens_decoder().values()}
    tokens += [AddedToken(content, special=True) for content in dict.fromkeys(specials) if content not in known]
    backend.add_tokens(tokens)
    if isinstance(split := config.get("split_special_tokens"), bool):
        backend.encode_special_tokens = split
    kind = class_of(folder, config)
    _set_prefix_space(backend, config.get("add_prefix_space", None if kind == LLAMA else False))
    if kind == LLAMA:
        _add_around(backend, config, str(folder / "tokenizer_config.json"))


def to_write(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json beside the backend's tokenizer.json, which transformers 4 and 5 open with the same ids.

    Whatever class the tokenizer had, its tokenizer.json says it all now, so the class is the one that adds nothing.
    """
    out = {name: value for name, value in config.items() if name not in OF_THE_SOURCE}
    out["tokenizer_class"] = FAST
    if out.get("added_tokens_decoder") is not None:
        out["added_tokens_decoder"] = {
            str(i): {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
            for i, token in sorted(backend.get_added_tokens_decoder().items())
        }
    out.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else token_type_ids, which no Llama takes
    state = _pre_tokenizer(backend)
    if "add_prefix_space" in state:
        out["add_prefix_space"] = state["add_prefix_space"]
    return out


def _added(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: list[str], folder: Path
) -> list[tokenizers.AddedToken]:
    """The tokens of added_tokens_decoder, or else of added_tokens.json, in the order of their ids; an `InputError` for
    an id that is another token's in tokenizer.json."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder")
    if listed is not None:
        where = f"added_tokens_decoder in {folder / 'tokenizer_config.json'}"
        if not isinstance(listed, dict):
            raise InputError(where, repr(listed)[:80], "ids to tokens")
        by_id = {_id(i, where): _flags(token, where) for i, token in listed.items()}
    else:
        where = str(folder / "added_tokens.json")
        contents = {_id(i, where): content for content, i in _object(Path(where)).items()}
        by_id = {i: {"content": content, "normalized": content not in specials} for i, content in contents.items()}
    for i, token in by_id.items():
        taken = backend.id_to_token(i) if i >= 0 else None
        if taken not in (None, token["content"]):
            raise InputError(where, f"id {i} for {token['content']!r}", f"its token in tokenizer.json, {taken!r}")
    tokens = [by_id[i] for i in sorted(by_id)]
    for token in tokens:
        token["special"] = bool(token.get("special")) or token["content"] in specials
    return [AddedToken(token.pop("content"), **token) for token in tokens]


def _flags(token: Any, where: str) -> dict[str, Any]:
    """The content and the flags of a token in JSON; one without `normalized` is normalized unless it is special."""
    if not isinstance(token, dict):
        raise InputError(where, repr(token)[:80], "objects with `content`")
    content = _content(token, "a token", where)
    flags = {flag: token.get(flag, False) for flag in FLAGS if flag != "normalized" or flag in token}
    if bad := [flag for flag, value in flags.items() if not isinstance(value, bool)]:
        raise InputError(where, f"{bad[0]} {token[bad[0]]!r} of {content!r}", "true or false")
    return {"content": content} | flags


def _content(value: Any, name: str, where: str) -> str:
    """The text of a token, which JSON keeps as a string or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise InputError(f"{name} in {where}", repr(value)[:80], "a string, or an object with `content`")
    return check_text(content, f"{name} in {where}")


def check_text(text: str, where: str) -> str:
    """The text; an `InputError` for one with half of a surrogate pair, which JSON can say and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(where, repr(text)[:80], "text that UTF-8 can hold") from None
    return text


def _id(value: Any, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lstrip("+-").isascii() and value.strip().lstrip("+-").isdigit():
        return int(value)
    raise InputError(where, repr(value)[:80], "token ids")


def _set_prefix_space(backend: tokenizers.Tokenizer, wanted: Any) -> None:
    """transformers' `add_prefix_space` overrides that of tokenizer.json, for a splitter that has it."""
    from tokenizers import pre_tokenizers

    state = _pre_tokenizer(backend)
    if not isinstance(wanted, bool) or state.get("add_prefix_space", wanted) == wanted:
        return
    kind = state.pop("type")
    backend.pre_tokenizer = getattr(pre_tokenizers, kind)(**state | {"add_prefix_space": wanted})


def _pre_tokenizer(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The state of how text is split before merging; empty where it is not."""
    if backend.pre_tokenizer is None:
        return {}
    state = json.loads(backend.pre_tokenizer.__getstate__())
    return state if isinstance(state, dict) else {}


def _add_around(backend: tokenizers.Tokenizer, config: Mapping[str, Any], where: str) -> None:
    """What Llama's class puts around a text: bos unless told otherwise, eos only when told so."""
    from tokenizers import processors

    placed: dict[str, str | None] = {}
    for name, default in (("bos_token", True), ("eos_token", False)):
        add = config.get(f"add_{name}", default)
        token = config.get(name)
        if add and token is None:
            raise InputError(f"add_{name} in {where}", repr(add), f"false, or a {name}")
        placed[name] = token if add else None
    before = [] if placed["bos_token"] is None else [placed["bos_token"]]
    after = [] if placed["eos_token"] is None else [placed["eos_token"]]
    single = [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)]
    pair = [*single, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    try:
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"tokens in {where}", str(error), "tokens that stand before and behind a text") from error


def _object(path: Path) -> dict[str, Any]:
    """The contents of a JSON file that may be absent."""
    return read_json(path) if path.exists() else {}

"""The chat templates of a tokenizer: where a folder keeps them, and where each runtime looks.

A folder may have one string or a list of named ones in tokenizer_config.json, or files: chat_template.jinja, and
additional_chat_templates/NAME.jinja; files win, as in transformers. In memory (`config["chat_template"]`) it is a
string, or a dictionary by name where there are more than "default". onnxruntime-genai wants a string in
tokenizer_config.json, transformers.js a string or a list of named ones there, transformers takes any form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text
from .tokenizer_config import check_text

DEFAULT = "default"
FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"


def read_templates(folder: Path, stored: Any) -> str | dict[str, str] | None:
    """The templates of a folder; `stored` is what tokenizer_config.json has under "chat_template"."""
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).exists():
        files[DEFAULT] = folder / FILE
    if files:
        return simplest({name: _text(path) for name, path in files.items()})
    where = f"chat_template in {folder / 'tokenizer_config.json'}"
    if stored is None or isinstance(stored, str):
        return stored if stored is None else check_text(stored, where)
    if isinstance(stored, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= set(entry) for entry in stored):
            raise InputError(where, repr(stored)[:80], "a string, or objects with `name` and `template`")
        stored = {entry["name"]: entry["template"] for entry in stored if isinstance(entry["name"], str)}
    if not isinstance(stored, dict) or not all(isinstance(template, str) for template in stored.values()):
        raise InputError(where, repr(stored)[:80], "a string, or templates by name")
    if bad := [name for name in stored if not re.fullmatch(r"[\w-][\w.-]{0,99}", name, re.ASCII)]:
        raise InputError(where, f"a template named {bad[0]!r}", "names that can name a file")
    return simplest({name: check_text(template, where) for name, template in stored.items()})


def simplest(templates: Mapping[str, str]) -> str | dict[str, str]:
    """A string where "default" is the only one."""
    return templates[DEFAULT] if set(templates) == {DEFAULT} else dict(templates)


def write_templates(folder: Path, stored: Any, named_in_config: bool = False) -> Any:
    """Writes the files of templates that tokenizer_config.json cannot hold as a string; returns what it should hold.

    Args:
        stored: a string, a dictionary by name, or None.
        named_in_config: whether the named ones go into tokenizer_config.json as a list, which transformers.js reads.
    """
    if not isinstance(stored, Mapping):
        return stored
    if named_in_config:
        return [{"name": name, "template": template} for name, template in stored.items()]
    for name, template in stored.items():
        write_text(folder / (FILE if name == DEFAULT else f"{FOLDER}/{name}.jinja"), template)
    return stored.get(DEFAULT)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"not UTF-8 ({error})", "a chat template") from None

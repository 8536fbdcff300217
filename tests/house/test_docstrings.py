"""Docstrings of public dataclasses name every field."""

from __future__ import annotations

import ast
import re

from test_sizes import sources

ITEM = re.compile(r"^    ((?:\w+, )*\w+): ", re.MULTILINE)  # "bos, eos: token ids."


def undocumented(node: ast.ClassDef) -> list[str]:
    """The public fields of a dataclass that no line below `Fields:` of its docstring begins with."""
    listing = (ast.get_docstring(node) or "").partition("Fields:\n")[2]
    documented = {name for names in ITEM.findall(listing) for name in names.split(", ")}
    fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and _is_name(item.target)]
    return [name for name in fields if name not in documented and not name.startswith("_")]


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def public_dataclasses(lines: list[str]) -> list[ast.ClassDef]:
    return [
        node
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_every_field_of_a_public_dataclass_is_documented() -> None:
    missing = {
        f"{path}: {node.name}": undocumented(node)
        for path, lines in sources("tinycompress", "export").items()
        for node in public_dataclasses(lines)
    }
    assert len(missing) > 50
    assert {name: fields for name, fields in missing.items() if fields} == {}


def test_a_field_that_is_not_named_is_found() -> None:
    docstring = '    """One.\n\n    Fields:\n        a, b: two.\n    """'
    (node,) = public_dataclasses(["@dataclass", "class A:", docstring, "    a: int", "    b: int", "    c: int"])
    assert undocumented(node) == ["c"]

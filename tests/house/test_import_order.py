"""The order of the rooms: a module imports from its own room and from rooms before it, and no pass imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# each row may import from the rows above it, and its own room
ORDER = (
    ("errors", "files", "knapsack", "progress"),
    ("graph",),
    ("model",),
    ("checkpoints",),
    ("calibration",),
    ("evaluation",),
    ("quantization", "pruning"),
    ("distillation", "context"),
    ("provenance", "work_folder"),
    ("pipeline",),
    ("recipe",),
    ("export",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, row in enumerate(ORDER) for room in row}
UPWARD = {  # methods of a graph that give or take another form of it
    ("graph.graph", "module"),
    ("graph.graph", "from_hf"),
    ("graph.graph", "to_hf"),
}


def modules() -> dict[str, ast.Module]:
    """Every module by its name without `tinycompress.`, parsed."""
    trees = {}
    for folder, prefix in (("tinycompress", ""), ("export", "export.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "export" and relative.parts[0] == "runtimes":
                continue
            name = prefix + ".".join(relative.with_suffix("").parts)
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, str, int]]:
    """What a module imports of tinycompress: the function it is imported in (or ""), the module, the line."""
    yield from _imports(name, MODULES[name], "")


def _imports(name: str, node: ast.AST, function: str) -> Iterator[tuple[str, str, int]]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function = function or node.name
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("tinycompress."):
                yield function, alias.name.removeprefix("tinycompress."), node.lineno
    if isinstance(node, ast.ImportFrom):
        source = _source(name, node)
        if source is not None:
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                yield function, inner if inner in MODULES else source or inner, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _imports(name, child, function)


def _source(name: str, node: ast.ImportFrom) -> str | None:
    """The module that a `from` names, without `tinycompress.`; None for other packages."""
    if node.level:
        base = name.split(".")[: -node.level]
        return ".".join([*base, *([node.module] if node.module else [])])
    if node.module == "tinycompress":
        return ""
    if node.module and node.module.startswith("tinycompress."):
        return node.module.removeprefix("tinycompress.")
    return None


def is_pass(node: ast.AST) -> bool:
    """A dataclass whose instances are called with a graph."""
    if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return False
    calls = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__call__"]
    return any(len(f.args.args) > 1 and f.args.args[1].arg == "graph" for f in calls)


PASSES = {
    name: [node.name for node in tree.body if is_pass(node) and isinstance(node, ast.ClassDef)]
    for name, tree in MODULES.items()
    if not name.startswith("export")
}
PASSES = {name: classes for name, classes in PASSES.items() if classes}
LEAVES = [name for name in MODULES if name.partition(".")[0] in RANK and name != "__init__"]


@pytest.mark.parametrize("name", LEAVES)
def test_imports_go_down_the_order(name: str) -> None:
    room = name.partition(".")[0]
    wrong = []
    for function, source, line in imports(name):
        other = source.partition(".")[0]
        if (name, function) in UPWARD or other == room or other not in RANK:
            continue
        if RANK[other] >= RANK[room] and not (RANK[other] == RANK[room] == 0):
            wrong.append(f"{name}, line {line}, imports {source}")
    assert wrong == []


def test_every_module_is_in_the_order() -> None:
    assert [name for name in MODULES if name.partition(".")[0] not in {*RANK, "__init__"}] == []


def test_export_imports_the_library_and_no_one_but_the_command_line_imports_export() -> None:
    importers = {name for name in MODULES for _, source, _ in imports(name) if source.partition(".")[0] == "export"}
    assert {name.partition(".")[0] for name in importers} <= {"export", "cli"}


def test_no_pass_imports_another() -> None:
    wrong = []
    for name in PASSES:
        for _, source, line in imports(name):
            if source in PASSES and source != name:
                wrong.append(f"{name}, line {line}, imports {source}, which has {', '.join(PASSES[source])}")
    assert wrong == []


def test_every_pass_is_exported_at_the_top() -> None:
    import tinycompress

    names = {pass_name for classes in PASSES.values() for pass_name in classes if not pass_name.startswith("_")}
    assert len(names) > 10
    assert sorted(names - set(tinycompress.__all__)) == []


def test_every_pass_is_frozen() -> None:
    loose = [
        f"{name}.{node.name}"
        for name in PASSES
        for node in MODULES[name].body
        if isinstance(node, ast.ClassDef) and is_pass(node) and "frozen=True" not in _decorators(node)
    ]
    assert loose == []


def _decorators(node: ast.ClassDef) -> str:
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)

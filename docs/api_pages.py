"""Writes the pages of the API reference as the site is built: one page a room, one section a module, in the listing's order."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOMS = {
    "graph": "What a model is: its shapes, its weights, what reads what, and what is cut together.",
    "model": "The transformer in PyTorch that a graph becomes, and generation.",
    "checkpoints": "Folders and files to graphs, and back.",
    "calibration": "Windows of tokens, and the walk that shows a visitor the inputs of every linear.",
    "quantization": "The passes, and the mathematics that they share.",
    "pruning": "The passes, and how a budget becomes widths.",
    "distillation": "The pass, its losses, its teachers and the training loop.",
    "context": "The passes that stretch a context.",
    "evaluation": "Perplexity, agreement, paired intervals, long contexts.",
    "pipeline": "Passes in order with a work folder, the recipe behind `tinycompress compress`, errors and files.",
    "export": "A graph to a folder that a runtime opens, read back and verified. Imported as `tinycompress.export`.",
}
TOP = ("pipeline", "recipe", "errors", "files", "knapsack")  # modules of the package that belong to no room


def modules(room: str) -> list[str]:
    """The modules of a room by the name they are imported by."""
    if room == "pipeline":
        return [f"tinycompress.{name}" for name in TOP if (ROOT / "tinycompress" / f"{name}.py").exists()]
    folder = ROOT / "export" if room == "export" else ROOT / "tinycompress" / room
    paths = [path for path in sorted(folder.rglob("*.py")) if "runtimes" not in path.parts]
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    return [f"tinycompress.{room}.{name}" for name in names if not name.endswith("__init__") and name != "support"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for room, purpose in ROOMS.items():
        sections = [f"# {room.capitalize()}", purpose]
        sections += [f"::: {name}\n    options:\n      heading_level: 2" for name in modules(room)]
        files.append(File.generated(config, f"api/{room}.md", content="\n\n".join(sections) + "\n"))
    return files


FIELDS = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.MULTILINE)
OF_A_PASS = """::: {}
    options:
      heading_level: 3
      members: false
      show_root_full_path: false
      show_symbol_type_heading: false
      skip_local_inventory: true"""


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """`<!-- fields: tinycompress.….GPTQ -->` on a page becomes that class's signature and fields, from its docstring."""
    return FIELDS.sub(lambda match: OF_A_PASS.format(match[1]), markdown)

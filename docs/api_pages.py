"""Writes the pages of the API reference as the site is built: one page for each room, one section for each module."""

from __future__ import annotations

import ast
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
    "evaluation": "Perplexity, divergence from a reference, questions, paired intervals, long contexts.",
    "recipe": "TOML and options to passes, what they will make and cost, and running them.",
    "pipeline": "Passes in order with a work folder, provenance and model cards, errors and files.",
    "export": "A graph to a folder that a runtime opens, read back and verified. Imported as `tinycompress.export`.",
}
# modules of the package that belong to no room
TOP = ("pipeline", "work_folder", "provenance", "errors", "files", "knapsack", "progress")


def modules(room: str) -> list[str]:
    """The modules of a room by the name they are imported by."""
    if room == "pipeline":
        return [f"tinycompress.{name}" for name in TOP if (ROOT / "tinycompress" / f"{name}.py").exists()]
    folder = ROOT / "export" if room == "export" else ROOT / "tinycompress" / room
    paths = [path for path in folder.rglob("*.py") if "runtimes" not in path.parts]
    paths.sort(key=lambda path: (len(path.parts), path))  # the files of a room before those of its folders
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    return [f"tinycompress.{room}.{name}" for name in names if not name.endswith("__init__") and name != "support"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for room, purpose in ROOMS.items():
        sections = [f"# {room.capitalize()}", purpose]
        sections += [f"::: {name}\n    options:\n      heading_level: 2" for name in modules(room)]
        files.append(File.generated(config, f"api/{room}.md", content="\n\n".join(sections) + "\n"))
    return files


NAMES = "<!-- names -->"


def definition(name: str, places: list[str]) -> tuple[str, str] | None:
    """The first of the modules that defines a name, and what its docstring says there."""
    for module in places:
        source = ROOT / (module.removeprefix("tinycompress.").replace(".", "/") + ".py")
        if not module.startswith("tinycompress.export"):
            source = ROOT / (module.replace(".", "/") + ".py")
        for node in ast.parse(source.read_text(encoding="utf-8")).body if source.exists() else ():
            about = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
            if about and getattr(node, "name", "") == name:
                return module, about
    return None


def found_again(match: re.Match[str]) -> str:
    """A reference to a name of a room, wherever in the room it is defined now."""
    places = [match["module"], *(modules(match["room"]) if match["room"] in ROOMS else ())]
    place = definition(match["name"], places)
    return match[0].replace(match["module"], place[0]) if place else match[0]


def row(name: str, places: list[str]) -> str:
    """A table row for a name that is defined in the first of the modules that has it."""
    place = definition(name, places)
    if place is None:
        return f"| `{name}` | in `{places[0]}` |"
    paragraph = " ".join(place[1].split("\n\n")[0].split())
    sentence = re.sub(r"([\[|])", r"\\\1", re.split(r"(?<=\.) ", paragraph)[0])
    return f"| [`{name}`][{place[0]}.{name}] | {sentence} |"


def names() -> str:
    """What `tinycompress` exports, a table for each room: the name and the first sentence of its docstring."""
    rooms: dict[str, list[str]] = {}
    for statement in ast.parse((ROOT / "tinycompress" / "__init__.py").read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.ImportFrom) or statement.module is None:
            continue
        room = statement.module.split(".")[0]
        places = [f"tinycompress.{statement.module}"] if "." in statement.module or room not in ROOMS else []
        places += modules(room) if room in ROOMS else []
        for alias in statement.names:
            rooms.setdefault(room, []).append(row(alias.name, places))
    tables = [f"## {room.capitalize()}\n\n| name | |\n|---|---|\n" + "\n".join(rows) for room, rows in rooms.items()]
    return "\n\n".join(tables)


REFERENCE = re.compile(r"\b(?P<module>tinycompress\.(?P<room>\w+)(?:\.\w+)*)\.(?P<name>\w+)(?=\]| -->)")
FIELDS = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.MULTILINE)
OF_A_PASS = """::: {}
    options:
      heading_level: 3
      members: false
      show_root_full_path: false
      show_symbol_type_heading: false
      skip_local_inventory: true"""


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """`<!-- fields: tinycompress.….GPTQ -->` on a page becomes that class's signature and fields, from its docstring;
    `<!-- names -->` becomes the tables of `names`."""
    if NAMES in markdown:
        markdown = markdown.replace(NAMES, names())
    markdown = REFERENCE.sub(found_again, markdown)
    return FIELDS.sub(lambda match: OF_A_PASS.format(match[1]), markdown)


INLINE_CODE = re.compile(r"(?<!</span>)(?<!<pre>)<code>([^<]*)</code>")
WHOLE = re.compile(r"(?<![\w-])--[a-z][\w-]*|^[^\s<]{1,19}$")  # an option, or code that is one short word


def on_page_content(html: str, **kwargs: object) -> str:
    """Options in running text, `--quantize`, never break behind their dashes, nor short names within a word."""
    return INLINE_CODE.sub(
        lambda match: "<code>" + WHOLE.sub(r'<span class="whole">\g<0></span>', match[1]) + "</code>", html
    )

"""Code blocks of the README and of the site do what they show; the commands and files that pages name exist.

Python blocks of a page run one after the other in one namespace, in an empty folder. `smollm2-135m` is a small random
model of SmolLM2's form there, token windows are few and short, and training stops after a few steps: what is tested is
that the page's calls exist and fit together. A block that cannot run says why in a comment before it:
`<!-- not run: needs an NPU -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tinycompress
from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPOSITORY = "https://github.com/tinycompress/tinycompress/"
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .{3,} -->\s*\Z")
SPAN = re.compile(r"`(tinycompress (?:\w|-)+ [^`]*)`")
PLACEHOLDER = re.compile(r"…|\.\.\.")
NAMED_FILE = re.compile(r"`((?:tinycompress|export|benchmarks|experiments|tests|docs)/[\w./-]+)`")
SHELL = ("sh", "bash", "console")
WINDOWS = 6
POSITIONS = 128
STRETCHED = 4096
STEPS = 2


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language and text, and whether it is to be run."""

    page: Path
    line: int
    language: str
    code: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        margin = len(match["indent"])
        code = "\n".join(line[margin:] for line in match["code"].splitlines()) + "\n"
        line = text.count("\n", 0, match.start()) + 2
        yield Block(page, line, match["language"], code, NOT_RUN.search(text[: match.start()]) is None)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """The shell lines of a page, continued lines joined, and its inline `tinycompress …` commands."""
    for block in blocks(page):
        if block.language in SHELL and block.runs:
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield block.line, line
    text = page.read_text(encoding="utf-8")
    for match in SPAN.finditer(FENCE.sub("", text)):
        if not PLACEHOLDER.search(match[1]):
            yield 0, match[1]


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and three special ones."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def small_model() -> Graph:
    """Grouped-query attention, a tied head, a context of 1,024: SmolLM2's form in 0.2 million parameters."""
    config = Config(
        vocab_size=320,
        hidden_size=64,
        head_dim=16,
        layers=(Layer(8, 4, 256),) * 2,
        max_position=1024,
        tie_embeddings=True,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    generator = torch.Generator().manual_seed(0)
    norms = {
        name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes(config).items() if "norm" in name
    }
    return Graph.random(config, 0, std=0.1).replace(weights=norms, tokenizer=byte_tokenizer())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The public verbs with a small model, little text and few steps behind them."""
    graph = small_model()
    load, tokens, training, tuning = checkpoint.load, data.tokens, tinycompress.Training, tinycompress.BlockTuning

    def small_load(source: Any, *args: Any, **kwargs: Any) -> Graph:
        return graph if source == "smollm2-135m" else load(source, *args, **kwargs)

    def small_tokens(source: Any, tokenizer: Any, n: int, seq_len: int, **kwargs: Any) -> torch.Tensor:
        if seq_len > STRETCHED:  # a window of a stretched context stays longer than the model's
            return tokens("pydoc", tokenizer, 1, 2 * graph.config.max_position, **kwargs)
        return tokens("pydoc", tokenizer, min(n, WINDOWS), min(seq_len, POSITIONS), **kwargs)

    def small_training(*args: Any, **kwargs: Any) -> Any:
        kwargs["steps"] = STEPS
        kwargs.pop("epochs", None)
        return training(*args, **kwargs | {"batch": 2})

    monkeypatch.setattr(tinycompress, "load", small_load)
    monkeypatch.setattr(tinycompress, "tokens", small_tokens)
    monkeypatch.setattr(tinycompress, "Training", small_training)
    monkeypatch.setattr(tinycompress, "BlockTuning", lambda **kwargs: tuning(**kwargs | {"steps": STEPS}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" and b.runs for b in blocks(page))], ids=name_of
)
def test_python_blocks_run(page: Path, small: None) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(page):
        if block.language != "python" or not block.runs:
            continue
        if "tinycompress.export" in block.code:
            pytest.importorskip("onnxruntime")
        padded = "\n" * (block.line - 1) + block.code  # tracebacks then name the line of the page
        exec(compile(padded, str(page), "exec", dont_inherit=True), namespace)


def check_command(line: str) -> str | None:
    """What is wrong with a shell line, or None."""
    words = shlex.split(line, comments=True)
    while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] == "torchrun"):
        words = words[words.index("-m") :] if words[0] == "torchrun" else words[1:]
    if words[:2] == ["-m", "tinycompress"]:
        words = ["tinycompress", *words[2:]]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if words[1] in targets else f"no target {words[1]} in the Makefile"
    if words[0].endswith("python") and words[1].endswith(".py"):
        return None if (ROOT / words[1]).exists() else f"no file {words[1]}"
    if words[0] != "tinycompress":
        return None
    import typer

    from tinycompress.cli.main import app

    group: Any = typer.main.get_command(app)
    if words[1] not in group.commands:
        return f"no command {words[1]}"
    if "--help" in words:
        return None
    try:
        group.commands[words[1]].make_context(words[1], words[2:])
    except Exception as error:  # a usage error of click, which newer versions of typer carry as a part of themselves
        if hasattr(error, "format_message"):
            return str(error.format_message())
        raise
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    problems = []
    for line, command in commands(page):
        problem = check_command(command)
        if problem and not (line == 0 and problem.startswith("Missing")):  # inline commands may be incomplete
            problems.append(f"line {line}: {command}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = [match[1] for match in NAMED_FILE.finditer(text)]
    links = re.findall(re.escape(REPOSITORY) + r"(?:blob|tree|raw)/main/([^)#\s]+)", text)
    missing = [name for name in [*files, *links] if not (ROOT / name).exists()]
    assert not missing


def test_the_readme_has_no_relative_links() -> None:
    """PyPI shows the README by itself: a relative link leads nowhere there."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not link.startswith("https://")]


def test_blocks_that_are_not_run_say_why() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for comment in re.findall(r"<!-- not run:?(.*?)-->", text):
            assert len(comment.strip()) > 2, name_of(page)


def test_the_layout_in_the_readme_is_the_listing() -> None:
    """Every entry of the README's layout exists, and every folder of the library is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## Layout")[1].split("```text\n")[1].split("```")[0]
    entries: set[str] = set()
    above = ""
    for line in block.splitlines():
        name = line.split()[0]
        above = above if line.startswith(" ") else name
        entries.add(above + name if line.startswith(" ") else name)
    assert not [name for name in entries if not (ROOT / name).exists()]
    folders = [path for top in ("tinycompress", "export") for path in (ROOT / top).iterdir() if path.is_dir()]
    rooms = {f"{path.relative_to(ROOT)}/" for path in folders if not path.name.startswith("__")}
    assert rooms <= entries

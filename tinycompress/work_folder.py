"""The folder of a pipeline (`--work`): what lies in it, how large it is, and what may go.

  <number>-<pass>-<key>              the result of a step, a checkpoint folder like any other
  <number>-<pass>-<key>.unfinished   what a pass that was killed had done (checkpoints/unfinished.py)
  step-<number>                      in the folder or in training/ below it: the state of a training run
  measured-<key>.json                perplexities that were measured
  work.json                          {"format", "tinycompress_version", "steps": those of the last run}

It grows by one checkpoint for each step of each recipe that is run in it, and by what one killed pass had done.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import files
from .checkpoints.unfinished import MARK as UNFINISHED_MARK
from .errors import InputError

MARK = "work.json"
FORMAT = 1
UNFINISHED = ".unfinished"
STEP = re.compile(r"\d{2,}-\w+-[0-9a-f]{16}")
STATE = re.compile(r"step-\d{8}")
MEASURED = re.compile(r"measured-[0-9a-f]{16}\.json")
SAVED = re.compile(r"\d{5}-(kept|live)\.safetensors|\..+\.tmp-[0-9a-f]{8}")  # in an unfinished pass's folder
STEPS = ("step", "unfinished step")  # kinds of parts
TRAINING = "training"  # the folder of a training run that is one step of several


@dataclass(frozen=True)
class Part:
    """Something that this library wrote into a work folder.

    Fields:
        path: where it is.
        kind: "step", "unfinished step", "training state", "measurement" or "list of steps".
        current: whether the last run in the folder would read it, as far as is known.
        bytes: on disk.
    """

    path: Path
    kind: str
    current: bool
    bytes: int


def step_name(number: int, name: str, key: str) -> str:
    """The folder of a step by its number, counted from 1, the name of its pass, and its key."""
    return f"{number:02}-{name}-{key[:16]}"


def unfinished(folder: Path) -> Path:
    """Where a pass keeps what it has done so far, by the folder that its result will be in."""
    return folder.with_name(folder.name + UNFINISHED)


def note_run(work: Path, steps: Sequence[str]) -> None:
    """Writes down the folders of the steps of a run, so that they can be told from those of earlier ones."""
    from . import __version__

    about = {"format": FORMAT, files.VERSION: __version__, "steps": list(steps)}
    if _last_run(work) != about:
        files.write_json(work / MARK, about)


def parts(work: Path) -> list[Part]:
    """What this library wrote into a work folder, by name. Links, and what is changed by others' files, are not its."""
    last = _last_run(work).get("steps")
    found = [_part(path, last) for path in _candidates(work)]
    return [part for part in found if part is not None]


def described(work: Path) -> str:
    """A line that says what is in a work folder, and how large it is."""
    found = parts(work)
    counts = Counter(part.kind for part in found if part.kind in (*STEPS, "training state"))
    shown = [f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in counts.items()]
    line = f"work folder {work}: {', '.join([files.human(sum(part.bytes for part in found)), *shown])}"
    old = [part for part in found if not part.current]
    if old:
        more = files.human(sum(part.bytes for part in old))
        line += f"; {more} of earlier runs (tinycompress clean {work} removes them)"
    return line


def to_clean(work: Path, steps: bool = False, everything: bool = False) -> list[Part]:
    """The parts of a work folder that may go.

    By default those that the last run would not read; with `steps` all steps, whole and unfinished; with `everything`
    measurements and training states too. Raises InputError for a folder that this library did not write.
    """
    if not work.is_dir():
        raise InputError("WORK", f"{work}, which is no folder", "the folder of an earlier --work")
    found = parts(work)
    if not found:
        accepted = "a folder with steps that tinycompress wrote"
        raise InputError("WORK", f"{work}, which holds nothing of a pipeline", accepted)
    if everything:
        return found
    return [part for part in found if part.kind in STEPS and (steps or not part.current)]


def clean(work: Path, going: Sequence[Part]) -> None:
    """Removes parts of a work folder, what dead runs left in it, and the folder itself once it is empty.

    Raises OutputError where a run works in it.
    """
    with files.locked(work):
        files.sweep(work)
        for part in going:
            files.remove(part.path)
    for folder in (work / TRAINING, work):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def _last_run(work: Path) -> dict[str, object]:
    try:
        return dict(files.read_json(work / MARK))
    except InputError:
        return {}


def _candidates(work: Path) -> Iterator[Path]:
    yield from sorted(work.iterdir())
    inner = work / TRAINING
    if inner.is_dir() and not inner.is_symlink():
        yield from sorted(inner.iterdir())


def _part(path: Path, last: object) -> Part | None:
    """What a path in a work folder is; None for what this library did not write."""
    kind = _kind(path)
    if kind is None:
        return None
    old = kind in STEPS and isinstance(last, list) and path.name.removesuffix(UNFINISHED) not in last
    inner = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Part(path, kind, not old, sum(file.stat().st_size for file in inner))


def _kind(path: Path) -> str | None:
    if path.is_symlink():
        return None
    if path.is_file():
        if path.name == MARK:
            return "list of steps"
        return "measurement" if MEASURED.fullmatch(path.name) else None
    if path.name.endswith(UNFINISHED) and STEP.fullmatch(path.name.removesuffix(UNFINISHED)):
        names = [inner.name for inner in path.iterdir()]
        ours = all(name == UNFINISHED_MARK or SAVED.fullmatch(name) for name in names)
        return STEPS[1] if ours else None
    if STEP.fullmatch(path.name) and any(path.iterdir()) and files.not_ours(path) is None:
        return STEPS[0]
    if STATE.fullmatch(path.name) and any(path.iterdir()) and files.not_ours(path) is None:
        return "training state"
    return None

"""The quantization config of another tool: where it lies, under its old names too, and what its fields may say.

  config.json            "quantization_config" (now), "compression_config" (the first compressed-tensors)
  quantize_config.json   AutoGPTQ's and GPTQModel's, alone in their older folders
  quant_config.json      AutoAWQ's, alone in its older folders

Every field is read, is known to change nothing, or is refused: readers of these formats differ in what they do with a
contradiction (of zero points under `sym`, vLLM's kernels ignore them and GPTQModel's use them), so none is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .json_fields import flag, integer

FIELDS = ("quantization_config", "compression_config")
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
ALIASES = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
LOWERED = ("quant_method", "checkpoint_format", "format", "version", "backend", "pack_dtype")
# what two descriptions of one folder have to agree in
AGREED = ("quant_method", "bits", "group_size", "sym", "desc_act", "zero_point", "version", "checkpoint_format")


@dataclass(frozen=True)
class Foreign:
    """Another tool's quantization config.

    Fields:
        settings: its fields, under their newer names.
        file: the file that it was found in, for errors.
        folder: the folder of the weights, for errors.
        grids: what it says of grids, once its format has checked it.
    """

    settings: Mapping[str, Any]
    file: str
    folder: str
    grids: Sequence[StatedGrid] = ()


@dataclass(frozen=True)
class StatedGrid:
    """What a config says of the grid of some linears.

    Fields:
        bits: of an integer.
        group_size: columns that share a scale; None: one scale per row.
        symmetric: whether zero points lie in the middle; None: not said.
        reordered: whether groups follow the order of activations; None: not said.
    """

    bits: int
    group_size: int | None
    symmetric: bool | None = None
    reordered: bool | None = None

    def __str__(self) -> str:
        groups = "one group per row" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits in {groups}"


def find(folder: Path, config: dict[str, Any]) -> Foreign | None:
    """The quantization config of a folder, taken out of the fields of its config.json, or from a file beside it.

    Where there are two, they have to agree in what changes numbers; None where there is none.
    """
    described: list[Foreign] = []
    for field in FIELDS:
        value = config.pop(field, None)
        if value is not None:
            default = "compressed-tensors" if field == "compression_config" else None
            described.append(_foreign(value, folder, f"{field} in {folder / 'config.json'}", default))
    for name, method in BESIDE.items():
        if (folder / name).exists():
            described.append(_foreign(files.read_json(folder / name), folder, str(folder / name), method))
    if not described:
        return None
    first, *others = described
    for other in others:
        _check_agreement(first, other)
    merged: dict[str, Any] = {}
    for known in reversed(described):
        merged |= {key: value for key, value in known.settings.items() if value is not None}
    return dataclasses.replace(first, settings=merged)


def check_known(settings: Mapping[str, Any], read: Collection[str], harmless: Collection[str], where: str) -> None:
    """An `InputError` for a field that is neither read nor known to change nothing, unless it is empty or false."""
    for key in sorted(set(settings) - set(read) - set(harmless)):
        if value := settings[key]:
            accepted = "a config without it: nothing here knows what it changes"
            raise InputError(f"{key} in {where}", repr(value)[:80], accepted)


def check_values(settings: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """An `InputError` for a field with another value than those `accepted` by name; absent and null are accepted."""
    for key, values in accepted.items():
        value = settings.get(key)
        if value is not None and not any(type(value) is type(known) and value == known for known in values):
            raise InputError(f"{key} in {where}", repr(value)[:80], " | ".join(map(_json, values)))


def stated_grid(settings: Mapping[str, Any], where: str) -> StatedGrid:
    """The grid of a GPTQ or AWQ config: `bits`, `group_size` (-1: one group per row), `sym`, `desc_act`."""
    group_size = integer(settings, "group_size", where, low=-1)
    if group_size == 0:
        raise InputError(f"group_size in {where}", 0, "-1 or a positive integer")
    said = {key: flag(settings, key, where) if settings.get(key) is not None else None for key in ("sym", "desc_act")}
    bits = integer(settings, "bits", where, low=2, high=8)
    return StatedGrid(bits, None if group_size < 0 else group_size, said["sym"], said["desc_act"])


def matching(foreign: Foreign, base: str, bits: int, groups: int, K: int) -> list[StatedGrid]:
    """The stated grids that a stored linear `base` of `K` inputs may have: its tensors say its bits and groups.

    An `InputError` where there is none.
    """
    fits = [grid for grid in foreign.grids if grid.bits == bits and groups == _groups(grid, K)]
    if not fits:
        found = f"{bits} bits in {groups} groups of {K} inputs"
        accepted = f"what {foreign.file} says: " + " | ".join(sorted({str(grid) for grid in foreign.grids}))
        raise InputError(f"{base} in {foreign.folder}", found, accepted)
    return fits


def check_symmetry(fits: Collection[StatedGrid], base: str, symmetric: bool, foreign: Foreign) -> None:
    """An `InputError` for zero points that are not in the middle, where every grid that fits promises that they are."""
    if not symmetric and all(grid.symmetric for grid in fits):
        found = f"others than those of the symmetric grid that {foreign.file} promises"
        accepted = "one of the two corrected: readers differ in which they follow"
        raise InputError(f"zero points of {base} in {foreign.folder}", found, accepted)


def check_order(fits: Collection[StatedGrid], base: str, reordered: bool, foreign: Foreign) -> None:
    """An `InputError` for columns in an order of their own, where every grid that fits says that there is none."""
    if reordered and all(grid.reordered is False for grid in fits):
        found = f"another order of columns, of which {foreign.file} says nothing"
        accepted = "one of the two corrected: readers differ in which they follow"
        raise InputError(f"g_idx of {base} in {foreign.folder}", found, accepted)


def _groups(grid: StatedGrid, K: int) -> int:
    """How many groups a row of `K` inputs has."""
    return 1 if grid.group_size is None else -(-K // grid.group_size)


def _foreign(value: Any, folder: Path, where: str, method: str | None) -> Foreign:
    """A config with newer names for its fields and lower-case words; `method` is that of a file that names none."""
    if not isinstance(value, dict):
        raise InputError(where, repr(value)[:80], "an object")
    settings: dict[str, Any] = {}
    for key, field in value.items():
        name = str(ALIASES.get(key, key))
        if settings.get(name) not in (None, field):
            raise InputError(f"{name} in {where}", f"{settings[name]!r} and {field!r}, as {key}", "one of the two")
        settings[name] = field.lower() if name in LOWERED and isinstance(field, str) else field
    if settings.get("quant_method") is None and method is not None:
        settings["quant_method"] = method
    if settings.get("quant_method") == "gptq" and settings.get("checkpoint_format") is None:
        settings["checkpoint_format"] = settings.get("format") or "gptq"  # what every reader takes it to be
    return Foreign(settings, where, str(folder))


def _check_agreement(one: Foreign, other: Foreign) -> None:
    """An `InputError` where two descriptions of a folder differ in what changes numbers."""
    for key in AGREED:
        first, second = (known.settings.get(key) for known in (one, other))
        if None not in (first, second) and first != second:
            raise InputError(f"{key} in {other.file}", repr(second), f"{first!r}, as {one.file} says")


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)

"""The container of a GGUF file: metadata and tensors, of one file or of all the parts that a model was split into.

The gguf package parses it. What is added is what anybody's file needs: every access is checked against the end of the
file, and counts are bounded before anything is made of them, so that a damaged header costs neither time nor memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .json_fields import integer

if TYPE_CHECKING:
    import gguf

MOST_VALUES = 2**21  # of one metadata array: the largest vocabularies have a quarter of a million tokens
MOST_TENSORS = 2**17
MOST_AXES = 4  # of a tensor, in ggml
PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")  # as llama-gguf-split names its files


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds.

    Fields:
        where: the path as it was given, for errors.
        fields: every metadata key with its value: a number, a bool, a string or a list of them.
        tensors: by name; `data` is a view of the file.
    """

    where: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]


def read_gguf(path: Path) -> GgufFile:
    """The file at `path`, with the parts beside it where it is one of several. No tensor is read."""
    where = str(path)
    fields, tensors = _open(path)
    parts = integer(fields, "split.count", where, 1, low=0)
    if parts <= 1:
        return GgufFile(where, fields, tensors)
    paths = _parts(path, parts)
    whole: dict[str, gguf.ReaderTensor] = {}
    for index, part in enumerate(paths):
        own, tensors = _open(part)
        if index == 0:
            fields = own  # the others repeat nothing of the model's metadata
        for key, expected in (("split.count", parts), ("split.no", index)):
            if own.get(key) != expected:
                raise InputError(f"{key} in {part}", repr(own.get(key)), f"{expected}, by its name")
        if twice := set(whole) & set(tensors):
            raise InputError(str(part), f"{min(twice)}, which another part holds too", "each tensor in one part")
        whole |= tensors
    total = integer(fields, "split.tensors.count", str(paths[0]), len(whole), low=0)
    if total != len(whole):
        raise InputError(where, f"{len(whole)} tensors in {parts} parts", f"split.tensors.count, {total}")
    return GgufFile(where, fields, whole)


def _parts(path: Path, parts: int) -> list[Path]:
    """The files of all the parts, each of which must be there."""
    match = PART.fullmatch(path.name)
    if match is None or int(match["parts"]) != parts:
        accepted = f"a name that ends in -00001-of-{parts:05}.gguf, the other parts beside it"
        raise InputError("name of a GGUF file in parts", f"{path}, with split.count {parts}", accepted)
    names = [f"{match['stem']}-{index:05}-of-{parts:05}.gguf" for index in range(1, parts + 1)]
    if missing := [name for name in names if not path.with_name(name).exists()]:
        found = f"no {missing[0]} ({len(missing)} of {parts} parts missing)"
        raise InputError(str(path), found, "all parts in one folder")
    return [path.with_name(name) for name in names]


def _open(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Metadata and tensors of one file."""
    try:
        _check_byte_order(path)
        reader = _reader()(path, "c")  # copy-on-write: tensors may be handed out as views, the file stays as it is
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a .gguf file") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        accepted = "a complete GGUF file, version 2 or 3"
        raise InputError(str(path), f"not GGUF, truncated or corrupt ({error})", accepted) from error


def _check_byte_order(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(8)
    version = int.from_bytes(head[4:], "little")
    if head[:4] == b"GGUF" and version and not version & 0xFFFF:
        remedy = "a little-endian one: gguf-convert-endian FILE little, of the gguf package"
        raise InputError(str(path), "a big-endian GGUF file", remedy)


@cache
def _reader() -> type[gguf.GGUFReader]:
    """The library's reader, bounded."""
    import gguf

    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            # A slice past the end would silently be short: a truncated file would give wrong tensors. A plain array
            # in the place of np.memmap is sliced four times faster.
            self.data = np.asarray(self.data)  # type: ignore[assignment]
            stop = int(offset) + np.dtype(dtype).itemsize * int(count)
            if stop > len(self.data):
                raise ValueError(f"it has {len(self.data)} bytes, and says something is at byte {stop}")
            return self.data[int(offset) : stop].view(dtype)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            # An array of numbers is one view, and one of strings one pass over the bytes, not a view for each value.
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = kinds(self._get(orig_offs, np.uint32)[0])
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            if count > MOST_VALUES or kind == kinds.ARRAY:
                raise ValueError(f"an array of {count} values of type {kind.name}")
            if kind == kinds.STRING:
                strings, stop = self._strings(start, count)
                return stop - orig_offs, strings, list(range(count)), [kinds.ARRAY, kind]
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values], [0], [kinds.ARRAY, kind]

        def _strings(self, offset: int, count: int) -> tuple[list[memoryview], int]:
            view = memoryview(np.asarray(self.data))  # type: ignore[arg-type]
            strings = []
            for _ in range(count):
                start = offset + 8
                offset = start + int.from_bytes(view[offset:start], "little")
                if offset > len(view):
                    raise ValueError(f"it has {len(view)} bytes, and says a string ends at byte {offset}")
                strings.append(view[start:offset])
            return strings, offset

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            if count > MOST_TENSORS:
                raise ValueError(f"{count} tensors")
            return super()._build_tensor_info(offs, count)

        def _get_tensor_info_field(self, orig_offs: int) -> Any:
            field = super()._get_tensor_info_field(orig_offs)
            if not 1 <= len(field.parts[3]) <= MOST_AXES:
                raise ValueError(f"a tensor of {len(field.parts[3])} axes")
            return field

    return Reader

"""An exported folder → the Graph that was exported, bit for bit, memory-mapped.

The manifest says which parameters are packed and on which grid; model.onnx says where each initializer's bytes lie.
Everything read is input: names, offsets and lengths are checked before they become memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinycompress.checkpoints.generation_config import read_generation
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError, need
from tinycompress.files import inside, read_json
from tinycompress.graph.config import EMBEDDING, Config, layer_names, shapes
from tinycompress.graph.graph import Graph, Weights
from tinycompress.graph.quant_tensor import Grid, QuantTensor, unpack

from .dynamic.emit import attention_layers
from .dynamic.forms_standard import nibbles
from .dynamic.kv_cache import scale_names
from .profiles import Profile, profile_of
from .static.read import host_file, static_weights

FORMAT = "tinycompress-onnx-1"
MODEL = "model.onnx"
MANIFEST = "manifest.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """manifest.json, checked to be ours; config and profile are checked by their own constructors."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"format in {path}", repr(manifest.get("format")), FORMAT)
    for key, kind in (
        ("config", dict),
        ("files", dict),
        ("quantized", dict),
        ("history", list),
        ("profile", str),
        ("fingerprint", str),
    ):
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{key} in {path}", repr(manifest.get(key)), f"a {kind.__name__}")
    return manifest


def check_sizes(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """An `InputError` for a file of the manifest that is missing or has another length: cheap, unlike its hash."""
    for name, known in manifest["files"].items():
        path = inside(folder, name)
        expected = known.get("bytes") if isinstance(known, dict) else None
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != expected:
            description = "no such file" if size is None else f"{size} bytes"
            raise InputError(str(path), description, f"{expected} bytes, as exported")


def read(folder: str | Path) -> Graph:
    """The exported graph: its fingerprint equals the manifest's unless a file was changed."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = Config.from_dict(manifest["config"])
    specs = _specs(manifest, folder)
    profile = profile_of(manifest["profile"])
    stored = apart(initializers(folder), config)
    if profile.form == "static":
        return Graph(
            config,
            Weights(static_weights(stored, specs, config)),
            tuple(map(str, manifest["history"])),
            Tokenizer.from_folder(folder),
            read_generation(folder),
        )
    weights = {
        name: _weight(name, shape, stored, specs.get(name), config, profile) for name, shape in shapes(config).items()
    }
    history = tuple(map(str, manifest["history"]))
    return Graph(config, Weights(weights), history, Tokenizer.from_folder(folder), read_generation(folder))


def apart(stored: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Initializers with those of joined linears (`LayerNames.joined`) under their parts' names: views of the rows."""
    out = dict(stored)
    rows = {name: shape[0] for name, shape in shapes(config).items()}
    products = [product for i in range(config.n_layers) for product in layer_names(i).joined.items()]
    for joined, parts in products:
        for suffix in (".weight.packed", ".weight.scales", ".weight.zeros", ".bias"):
            tensor = out.pop(f"{joined}{suffix}", None)
            if tensor is None:
                continue
            lengths = [rows.get(f"{part}.weight", 0) for part in parts]
            if tuple(tensor.shape[:1]) != (sum(lengths),):
                raise InputError(
                    f"{joined}{suffix}",
                    f"shape {tuple(tensor.shape)}",
                    f"{' + '.join(map(str, lengths))} rows by the manifest's config",
                )
            out |= {f"{part}{suffix}": piece for part, piece in zip(parts, tensor.split(lengths))}
    return out


def kv_scales(folder: str | Path) -> dict[str, Tensor]:
    """The scales of an int8 cache by the names of `kv_cache.scale_names`, float32 [1, K, 1, d]; empty for a float
    cache."""
    stored = initializers(folder)
    manifest = read_manifest(folder)
    if not manifest.get("kv"):
        return {}
    config = Config.from_dict(manifest["config"])
    out: dict[str, Tensor] = {}
    for names, i in zip(scale_names(config), attention_layers(config)):
        shape = (1, config.layers[i].n_kv_heads, 1, config.head_dim)
        out |= {name: _get(stored, name, shape, torch.float32) for name in names}
    return out


def model_path(folder: str | Path) -> Path:
    """The file of the model, by the manifest."""
    return inside(folder, read_manifest(folder).get("model", MODEL))


def initializers(folder: str | Path) -> dict[str, Tensor]:
    """Every initializer of the model by name; large ones are memory maps (copy on write: the file never changes). Those
    of four bits come as the bytes they are stored in, uint8 [⌈n / 2⌉]."""
    proto = load_proto(folder)
    where = model_path(folder).parent
    stored: dict[str, Tensor] = {}
    for tensor in proto.graph.initializer:
        try:
            stored[tensor.name] = _tensor(tensor, where)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError) as error:  # a type or a shape that its bytes are not of
            raise InputError(f"initializer {tensor.name!r}", str(error), "one as it was exported") from error
    return stored | host_file(folder)


def load_proto(folder: str | Path) -> Any:
    """The model without its external data."""
    need("onnx", "export")
    import onnx
    from google.protobuf.message import DecodeError

    path = model_path(folder)
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "an exported folder") from None
    except DecodeError as error:
        raise InputError(str(path), f"not an ONNX model ({error})", "the file as it was exported") from error


def _tensor(proto: Any, folder: Path) -> Tensor:
    import onnx

    if proto.data_location != onnx.TensorProto.EXTERNAL:
        array = onnx.numpy_helper.to_array(proto)
        if proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            return nibbles(torch.from_numpy(array.astype(np.int8)))
        return torch.from_numpy(array.copy())
    where = {entry.key: entry.value for entry in proto.external_data}
    path = inside(folder, where.get("location", ""))
    shape = tuple(proto.dims)
    if proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        dtype = np.dtype(np.uint8)
        shape = (-(-int(np.prod(shape, dtype=np.int64)) // 2),)
    else:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if (
        not path.is_file() or path.parent != folder
    ):  # a link is followed, as the runtime does: hub caches are made of them
        raise InputError(f"external data of {proto.name}", str(path), f"a file inside {folder}")
    try:
        offset = int(where.get("offset", 0))
        length = int(where.get("length", nbytes))
    except ValueError:
        raise InputError(f"external data of {proto.name}", where, "an integer offset and length") from None
    if min(shape, default=0) < 0 or length != nbytes or offset < 0 or offset + length > path.stat().st_size:
        found = f"bytes {offset} … {offset + length} of {path.stat().st_size}, shape {shape}"
        raise InputError(
            f"external data of {proto.name}", found, f"{nbytes} bytes inside {path.name} (is it truncated?)"
        )
    return torch.from_numpy(np.memmap(path, dtype, "c", offset, shape))


def _specs(manifest: Mapping[str, Any], folder: Path) -> dict[str, Grid]:
    """The grid of every packed parameter."""
    try:
        return {name: Grid.from_dict(fields) for name, fields in manifest["quantized"].items()}
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"quantized in {folder / MANIFEST}", str(error), "bits, group_size and symmetric by parameter"
        ) from error


def _weight(
    name: str,
    shape: tuple[int, ...],
    stored: Mapping[str, Tensor],
    spec: Grid | None,
    config: Config,
    profile: Profile,
) -> Any:
    if spec is not None:
        unpacker = _packed
        if profile.form == "standard":
            unpacker = _table if name == EMBEDDING else _columns
        return unpacker(name, (shape[0], shape[1]), stored, spec, profile)
    transposed = len(shape) == 2 and name != config.weight_name("model.embed_tokens")  # linears are stored [K, N]
    tensor = _get(stored, name, shape[::-1] if transposed else shape, torch.float32)
    return tensor.T if transposed else tensor


def _packed(
    name: str, shape: tuple[int, int], stored: Mapping[str, Tensor], spec: Grid, profile: Profile
) -> QuantTensor:
    """The inverse of the emitter's `packed`: blocks back to groups, containers back to the grid's own bits."""
    N, K = shape
    group = spec.group(name, shape[1])
    bits = profile.container(spec.bits)
    block = profile.block(name, group, K)
    blocks = -(-K // block)
    repeats = -(-group // block)
    G = K // group
    nbytes = blocks * block * bits // 8
    packed = _get(stored, f"{name}.packed", None, torch.uint8).reshape(-1)
    if len(packed) != N * nbytes:
        raise InputError(f"{name}.packed", f"{len(packed)} bytes", N * nbytes)
    packed = packed.view(N, nbytes)
    scales = _ungroup(f"{name}.scales", _scales(stored, f"{name}.scales", (N, blocks)), repeats)
    zeros = None
    if spec.float_zero:
        zeros = _ungroup(f"{name}.zeros", _get(stored, f"{name}.zeros", (N, blocks), torch.float32), repeats)
    elif not spec.symmetric:
        raw = _get(stored, f"{name}.zeros", (N, -(-blocks * bits // 8)), torch.uint8)
        zeros = _ungroup(f"{name}.zeros", unpack(raw, bits, blocks).contiguous(), repeats)
    if bits != spec.bits or nbytes * 8 != K * bits:  # another container, or a part-filled last block: pack anew
        shift = 2 ** (bits - 1) - spec.zero if spec.symmetric else 0
        q = unpack(packed, bits, K) - shift
        return QuantTensor.from_ints(q, scales, zeros, spec)
    return QuantTensor(packed.view(N, G, -1), scales, zeros, spec, shape)


def _columns(
    name: str, shape: tuple[int, int], stored: Mapping[str, Tensor], spec: Grid, profile: Profile
) -> QuantTensor:
    """The inverse of `forms_standard.dequantized` and `multiplied`: integers [K, N] or [N, K] and their scales back to
    rows."""
    N, K = shape
    G = shape[1] // spec.group(name, shape[1])
    bits = profile.container(spec.bits)
    if profile.weight_rows:
        inner = (N, G, K // G) if G > 1 else (N, K)
        q = _integers(stored, f"{name}.ints", inner, bits, True).reshape(N, K) + spec.zero
        return QuantTensor.from_ints(
            q, _scales(stored, f"{name}.rows.scales", (*inner[:-1], 1)).reshape(N, G), None, spec
        )
    across = (N,) if G == 1 else (G, N)
    q = _integers(stored, f"{name}.ints", (K, N), bits, spec.symmetric) + (spec.zero if spec.symmetric else 0)
    zeros = None
    if not spec.symmetric:
        integers = _integers(stored, f"{name}.columns.zeros", across, bits, False)
        zeros = integers.reshape(G, N).T.to(torch.uint8).contiguous()
    scales = _scales(stored, f"{name}.columns.scales", across).reshape(G, N).T.contiguous()
    return QuantTensor.from_ints(q.T.contiguous(), scales, zeros, spec)


def _table(
    name: str, shape: tuple[int, int], stored: Mapping[str, Tensor], spec: Grid, profile: Profile
) -> QuantTensor:
    """The inverse of `forms_standard.rows`."""
    N, K = shape
    G = shape[1] // spec.group(name, shape[1])
    bits = profile.container(spec.bits)
    packed = _get(stored, f"{name}.packed", (N, -(-K * bits // 8)), torch.uint8)
    scales = _scales(stored, f"{name}.scales", (N, G))
    zeros = None if spec.symmetric else _get(stored, f"{name}.zeros", (N, G), torch.uint8)
    if bits == spec.bits and (K // G) * bits % 8 == 0:
        return QuantTensor(packed.reshape(N, G, -1), scales, zeros, spec, shape)
    return QuantTensor.from_ints(unpack(packed, bits, K), scales, zeros, spec)


def _integers(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...], bits: int, signed: bool) -> Tensor:
    """int16 of `shape` from an initializer of 4 or 8 bits."""
    n = int(np.prod(shape))
    if bits == 8:
        return _get(stored, name, shape, torch.int8 if signed else torch.uint8).to(torch.int16)
    flat = unpack(_get(stored, name, (-(-n // 2),), torch.uint8), 4, n).to(torch.int16)
    return (torch.where(flat > 7, flat - 16, flat) if signed else flat).reshape(shape)


def _scales(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """float32 of scales that are stored as float32 or float16."""
    half = name in stored and stored[name].dtype == torch.float16
    return _get(stored, name, shape, torch.float16 if half else torch.float32).float()


def _ungroup(name: str, values: Tensor, repeats: int) -> Tensor:
    """[N, G · repeats] with each value `repeats` times in a row to [N, G]."""
    first = values[:, ::repeats]
    if not torch.equal(first.repeat_interleave(repeats, 1), values):
        raise InputError(name, "blocks of one group that differ", f"each value {repeats} times, as exported")
    return first.contiguous()


def _get(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    tensor = stored.get(name)
    if tensor is None:
        raise InputError(MODEL, f"no initializer {name}", "every parameter of the manifest's config")
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != tuple(shape)):
        raise InputError(name, f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype} {shape or ''}")
    return tensor

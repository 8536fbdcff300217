"""GGUF files as llama.cpp's converter writes them."""

import gguf
import numpy as np


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter, LlamaModel.permute."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path,
    graph,
    encode=lambda name, array: (array, None),
    metadata=lambda writer: None,
    architecture="llama",
    extra=(),
    ffn=None,
    **options,
):
    """`graph` as llama.cpp's converter writes it; `encode` gives each tensor's data and type (None: by its dtype)."""
    config = graph.config
    first = config.layers[0]
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    uniform = config.uniform
    writer.add_head_count(first.n_heads if uniform else [layer.n_heads for layer in config.layers])
    writer.add_head_count_kv(first.n_kv_heads if uniform else [layer.n_kv_heads for layer in config.layers])
    writer.add_feed_forward_length(ffn or (first.ffn_dim if uniform else [layer.ffn_dim for layer in config.layers]))
    writer.add_key_length(config.head_dim)
    metadata(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for name, weight in graph.weights.items():
        array = weight.numpy()
        for linear, heads in (("q_proj", "n_heads"), ("k_proj", "n_kv_heads")):
            if f".{linear}." in name:
                array = permute(array, getattr(config.layers[int(name.split(".")[2])], heads))
        data, kind = encode(name, np.ascontiguousarray(array))
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(path, parts):
    """The file in `parts` parts, as llama-gguf-split makes them: metadata in the first, tensors in turn."""
    reader = gguf.GGUFReader(path)
    count = len(reader.tensors)
    paths = [path.with_name(f"{path.stem}-{index + 1:05}-of-{parts:05}.gguf") for index in range(parts)]
    for index, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
        if index == 0:
            for name, field in reader.fields.items():
                if not name.startswith(("GGUF.", "general.architecture")):
                    sub_type = field.types[1] if len(field.types) > 1 else None
                    writer.add_key_value(name, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", count)
        for tensor in reader.tensors[index * count // parts : (index + 1) * count // parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return paths

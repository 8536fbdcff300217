"""Folders: what is written opens again (here and in transformers), and bad input is one clear error."""

import dataclasses
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinycompress.checkpoints import hf
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.config import TINYLLAMA_1_1B, Config, Layer, shapes
from tinycompress.graph.graph import Graph, LazyTensor, Weights
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.quantization.grid_search import find_grid, round_to_grid

IDS = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(3))
SMALL = Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
ROPES = {
    "default": (Rope(theta=5000.0), 64),
    "linear": (Rope(type="linear", factor=2.0), 64),
    "dynamic": (Rope(type="dynamic", factor=3.0, original_max_position=32), 96),
    "yarn": (Rope(type="yarn", factor=4.0, original_max_position=16, beta_fast=8.0, attention_factor=1.2), 64),
    "yarn mscale": (
        Rope(type="yarn", factor=4.0, original_max_position=16, mscale=0.7, mscale_all_dim=0.5, truncate=False),
        64,
    ),
    "llama3": (Rope(type="llama3", factor=4.0, original_max_position=16), 64),
    "longrope": (
        Rope(
            type="longrope",
            factor=4.0,
            original_max_position=16,
            short_factor=tuple([1.0] * 8),
            long_factor=tuple(1.0 + i for i in range(8)),
        ),
        64,
    ),
    "longrope short": (
        Rope(
            type="longrope",
            factor=3.0,
            original_max_position=60,
            short_factor=tuple([1.5] * 8),
            long_factor=tuple([2.0] * 8),
        ),
        64,
    ),
}


def quantize(graph: Graph, spec: QuantSpec) -> Graph:
    changed = {}
    for name, weight in graph.weights.items():
        if name.endswith("_proj.weight"):
            scales, zeros = find_grid(name, weight, spec)
            changed[name] = QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
    return graph.replace(weights=changed, by="Quantize()")


def edit(folder, name="config.json", **fields):
    """Changes fields of a JSON file; ... removes one."""
    data = json.loads((folder / name).read_text())
    data = {k: v for k, v in (data | fields).items() if v is not ...}
    (folder / name).write_text(json.dumps(data))


def as_hf(graph, folder):
    """A folder that only Hugging Face's config describes."""
    save(graph, folder)
    (folder / "tinycompress.json").unlink()
    return folder


def transformers_logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("which", ["tiny", "nonuniform"])
def test_round_trip_keeps_every_bit(which, request, tmp_path):
    graph = request.getfixturevalue(which).replace(by="Something(keep=0.5)")
    save(graph, tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.config == graph.config and back.history == ("'Something(keep=0.5)'",)
    assert back.fingerprint() == graph.fingerprint()
    assert torch.equal(back.module()(IDS), graph.module()(IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, tiny, tmp_path):
    graph = tiny.replace(weights={n: w.to(dtype) for n, w in tiny.weights.items()})
    save(graph, tmp_path / "out")
    assert load(tmp_path / "out").fingerprint() == graph.fingerprint()
    wide = load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(wide.weights.entries["model.norm.weight"], LazyTensor)
    assert torch.equal(wide.weights["model.norm.weight"], graph.weights["model.norm.weight"].float())


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("tie", [True, False])
def test_same_logits_in_transformers_for_every_rope(name, tie, tmp_path):
    rope, length = ROPES[name]
    graph = random_graph(dataclasses.replace(SMALL, rope=rope, max_position=length, tie_embeddings=tie))
    folder = as_hf(graph, tmp_path / "out")
    back = load(folder)
    if rope.type == "longrope":  # written out, see hf.rope_to_hf
        rope = dataclasses.replace(rope, attention_factor=rope.attention_scale())
    assert back.config == dataclasses.replace(graph.config, rope=rope)
    ours = back.module()(IDS)
    assert torch.allclose(ours, graph.module()(IDS), atol=1e-6)
    torch.testing.assert_close(transformers_logits(folder), ours, atol=1e-4, rtol=0)
    if name not in ("default", "longrope short"):  # the rope matters at this length: the check above can fail
        assert not torch.allclose(
            ours, random_graph(dataclasses.replace(graph.config, rope=Rope())).module()(IDS), atol=1e-3
        )


@pytest.mark.parametrize(
    "biases", [{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, {"q_proj", "down_proj"}]
)
def test_biases_open_in_transformers(biases, tmp_path):
    graph = random_graph(dataclasses.replace(SMALL, biases=frozenset(biases)))
    save(graph, tmp_path / "out")
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), graph.module()(IDS), atol=1e-4, rtol=0)
    assert load(tmp_path / "out").fingerprint() == graph.fingerprint()


def test_live_models_share_memory(tiny):
    model = tiny.to_hf()
    assert model.lm_head.weight.data_ptr() == tiny.weights["lm_head.weight"].data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny.module()(IDS), atol=1e-4, rtol=0)
    back = Graph.from_hf(model)
    assert back.weights["lm_head.weight"].data_ptr() == tiny.weights["lm_head.weight"].data_ptr()
    assert back.fingerprint() == dataclasses.replace(tiny, config=back.config).fingerprint()


def test_live_model_of_a_tied_partly_biased_graph():
    graph = random_graph(
        dataclasses.replace(SMALL, tie_embeddings=True, biases=frozenset({"v_proj"}), rope=ROPES["llama3"][0])
    )
    model = graph.to_hf()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, graph.module()(IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", ["w4g16", "w3g16-asym", "w8"])
@pytest.mark.parametrize("which", ["tiny", "nonuniform"])
def test_quantized_round_trip(spec, which, request, tmp_path):
    graph = quantize(request.getfixturevalue(which), QuantSpec.parse(spec))
    save(graph, tmp_path / "packed")
    back = load(tmp_path / "packed")
    assert back.fingerprint() == graph.fingerprint()
    assert json.loads((tmp_path / "packed/config.json").read_text())["model_type"] == "tinycompress"
    save(graph, tmp_path / "dense", dense=True)
    dense = load(tmp_path / "dense")
    assert not any(isinstance(w, QuantTensor) for w in dense.weights.values())
    torch.testing.assert_close(dense.module()(IDS), back.module()(IDS), atol=1e-4, rtol=0)
    half = load(tmp_path / "packed", dtype=torch.float64)
    assert half.module()(IDS).dtype == torch.float64


def test_transformers_refuses_what_it_cannot_express(nonuniform, tmp_path):
    save(nonuniform, tmp_path / "out")
    with pytest.raises(ValueError, match="tinycompress"):
        transformers_logits(tmp_path / "out")
    with pytest.raises(InputError, match="layers"):
        nonuniform.to_hf()


def test_shards(tiny, tmp_path):
    save(tiny, tmp_path / "out", max_shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert load(tmp_path / "out").fingerprint() == tiny.fingerprint()
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), tiny.module()(IDS), atol=1e-4, rtol=0)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(InputError, match=files[1]):
        load(tmp_path / "out")


def test_saved_files_are_plain_safetensors_aligned_and_in_hf_names(tiny, tmp_path):
    save(tiny, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert set(stored) == set(shapes(tiny.config))
    with open(tmp_path / "out/model.safetensors", "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    assert length % 8 == 0 and header["__metadata__"] == {"format": "pt"}


def test_saving_reads_one_weight_at_a_time(tiny, tmp_path):
    alive, peak = 0, 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read(weight):
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        return weight.clone().as_subclass(Counted)

    lazy = {n: LazyTensor(tuple(w.shape), w.dtype, lambda w=w: read(w)) for n, w in tiny.weights.items()}
    save(Graph(tiny.config, Weights(lazy)), tmp_path / "out")
    assert peak <= 8  # views of one tensor, never all twenty
    assert load(tmp_path / "out").fingerprint() == tiny.fingerprint()


def test_existing_output_is_kept_unless_overwritten(tiny, nonuniform, tmp_path):
    save(tiny, tmp_path / "out")
    with pytest.raises(InputError, match="overwrite"):
        save(nonuniform, tmp_path / "out")
    opened = load(tmp_path / "out")
    save(nonuniform, tmp_path / "out", overwrite=True)
    assert opened.fingerprint() == tiny.fingerprint()  # its memory map stays valid
    assert load(tmp_path / "out").fingerprint() == nonuniform.fingerprint()
    save(load(tmp_path / "out"), tmp_path / "out", overwrite=True)  # over the files it is mapped from
    assert load(tmp_path / "out").fingerprint() == nonuniform.fingerprint()


def test_too_little_disk_is_said_before_writing(tmp_path):
    huge = Config(vocab_size=2**30, hidden_size=2**20, head_dim=2, layers=(Layer(1, 1, 1),))
    entries = {n: LazyTensor(s, torch.float32, lambda: pytest.fail("read")) for n, s in shapes(huge).items()}
    with pytest.raises(InputError, match=r"bytes free.*at least [\d,]+ bytes"):
        save(Graph(huge, Weights(entries)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_writing_leaves_nothing(tiny, tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    entries = dict(tiny.weights) | {"lm_head.weight": LazyTensor((128, 64), torch.float32, fail)}
    with pytest.raises(InputError, match="disk is full"):
        save(Graph(tiny.config, Weights(entries)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- bad input ----


@pytest.mark.parametrize("name", ["./nothing", "/no/such/place", "~/no/such/place", "nothing", "a/b/c", "smollm3-135m"])
def test_what_looks_like_a_path_never_goes_to_the_hub(name):
    with pytest.raises(InputError, match="does not exist"):
        load(name)


def test_an_unreachable_hub_says_what_was_looked_for():
    code = (
        "import sys; from tinycompress.checkpoints.checkpoint import load\nfrom tinycompress.errors import InputError\n"
        "try: load('no-such-org-here/nothing')\nexcept InputError as error: print(error)"
    )

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert "no such local path, and the hub said" in run.stdout and "no-such-org-here/nothing" in run.stdout, run
    assert "hub" in run.stderr and len(run.stderr.strip().splitlines()) == 1


HOSTILE = [
    ({"model_type": "gpt2"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": "mistral", "sliding_window": 16}, "sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 127}, "embed_tokens.*127"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, "layers.1"),
    ({"num_key_value_heads": 3}, "n_kv_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"intermediate_size": 97}, "shape"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_theta": 0.5}, "theta"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"attention_bias": True}, "bias"),
    ({"bos_token_id": "x"}, "bos_token_id"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "rope_parameters",
    ),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_theta"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "original_max_position",
    ),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
]


@pytest.mark.parametrize("fields, said", HOSTILE, ids=[str(f)[:60] for f, _ in HOSTILE])
def test_a_bad_config_is_one_clear_error(fields, said, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "out")
    edit(folder, **fields)
    with pytest.raises(InputError, match=said) as error:
        load(folder)
    assert (
        str(tmp_path) in str(error.value)
        or "Layer" in str(error.value)
        or "rope." in str(error.value)
        or "Config." in str(error.value)
    )


JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
)
FIELDS = [
    *hf.config_to_hf(SMALL, torch.float32),
    "rope_parameters",
    "sliding_window",
    "original_max_position_embeddings",
]


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        JSON | st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), JSON),
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_refused(fields):
    try:
        config = hf.config_from_hf(hf.config_to_hf(SMALL, torch.float32) | fields, "config.json")
    except InputError:
        return
    assert isinstance(config, Config)


def test_other_spellings_of_the_same_config():
    base = hf.config_to_hf(dataclasses.replace(SMALL, rope=ROPES["yarn"][0]), torch.float32)
    values = base["rope_scaling"] | {"rope_theta": base["rope_theta"]}
    five = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")} | {"rope_parameters": values}
    old = base | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in base["rope_scaling"].items()}}
    expected = hf.config_from_hf(base, "")
    assert hf.config_from_hf(five, "") == hf.config_from_hf(old, "") == expected
    no_head_dim = {k: v for k, v in base.items() if k not in ("head_dim", "num_key_value_heads")}
    read = hf.config_from_hf(no_head_dim, "")
    assert read.head_dim == 16 and read.layers[0].n_kv_heads == 4
    assert hf.config_from_hf(base | {"model_type": "mistral", "sliding_window": None}, "") == expected
    assert hf.config_from_hf(base | {"eos_token_id": [2, 7], "pad_token_id": -1}, "").eos_token_id == (2, 7)


def test_longrope_with_the_original_length_beside(tmp_path):
    rope, _ = ROPES["longrope"]
    data = hf.config_to_hf(dataclasses.replace(SMALL, rope=rope), torch.float32)
    scaling = {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    read = hf.config_from_hf(
        data | {"rope_scaling": scaling}, ""
    ).rope  # as Phi-3 writes it: no factor, no attention factor
    assert read == rope and read.attention_scale() == rope.attention_scale()


def broken(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path)

    return damage


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


DAMAGE = {
    "truncated": (truncate, "model.safetensors"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "missing tensors": (
        broken(lambda t: [t.pop(n) for n in list(t) if "mlp" in n]),
        "mlp.gate_proj.weight.* and 3 more",
    ),
    "missing head": (broken(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "unexpected": (broken(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})), "q_norm"),
    "integers": (broken(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})), "I32.*F32"),
    "bytes": (broken(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.uint8)})), "uint8"),
    "shape": (broken(lambda t: t.update({"model.norm.weight": torch.ones(63)})), "model.norm.weight.*63.*64"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle.*safetensors"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(name, tiny, tmp_path):
    damage, said = DAMAGE[name]
    folder = as_hf(tiny, tmp_path / "out")
    load(folder)
    damage(folder)
    with pytest.raises(InputError, match=said) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "weight_map, said",
    [
        ({"model.norm.weight": "../secret.safetensors"}, "inside"),
        ({"model.norm.weight": "/etc/passwd"}, "inside"),
        ({"model.norm.weight": 3}, "inside"),
        ({"model.norm.weight": "model-2.safetensors"}, "model-2.safetensors"),
        ({"no.such": "model-1.safetensors"}, "no.such"),
        ({}, "weight_map"),
        (["x"], "weight_map"),
    ],
)
def test_a_bad_index_is_one_clear_error(weight_map, said, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=said):
        load(folder)


def test_what_says_nothing_is_ignored_and_mixed_floats_meet(tiny, tmp_path):
    tied = random_graph(dataclasses.replace(tiny.config, tie_embeddings=True))
    folder = as_hf(tied, tmp_path / "out")

    def extra(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = torch.ones(128, 64)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    broken(extra)(folder)
    back = load(folder)
    assert set(back.weights) == set(shapes(tied.config))
    assert {w.dtype for w in back.weights.values()} == {torch.float32}
    back.module()(IDS)


ABOUT = [
    ({"format": 2}, "format"),
    ({"format": ...}, "format"),
    ({"history": [1]}, "history"),
    ({"history": "x"}, "history"),
    ({"config": ...}, "config"),
    ({"config": 3}, "tinycompress.json"),
    ({"config": {}}, "tinycompress.json"),
    ({"quantized": {"model.norm.weight": {"bits": 4}}}, "model.norm.weight"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"bits": 5}}}, "bits"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"width": 5}}}, "width"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"bits": 4}}}, "up_proj.weight.packed"),
    ({"quantized": 5}, "tinycompress.json"),
]


@pytest.mark.parametrize("fields, said", ABOUT, ids=[str(f)[:60] for f, _ in ABOUT])
def test_a_bad_tinycompress_json_is_one_clear_error(fields, said, tiny, tmp_path):
    folder = save(tiny, tmp_path / "out")
    edit(folder, "tinycompress.json", **fields)
    with pytest.raises(InputError, match=said) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("rope", 3), ("rope", {"theta": "x"}), ("layers", [["a", 1, 2]]), ("layers", 3), ("vocab_size", "x")],
)
@pytest.mark.parametrize("more", [{}, {"bos_token_id": 1.5}, {"tie_embeddings": "no"}])
def test_a_bad_config_in_tinycompress_json(field, value, more, tiny, tmp_path):
    folder = save(tiny, tmp_path / "out")
    edit(folder, "tinycompress.json", config=tiny.config.to_dict() | (more or {field: value}))
    with pytest.raises(InputError, match=r"tinycompress\.json"):
        load(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(shared, tmp_path):
    graph = load(shared / "models/stories260K")
    folder = as_hf(graph, tmp_path / "out")
    edit(folder, vocab_size=256)
    broken(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:256].clone()}))(folder)
    with pytest.raises(InputError, match=r"tokenizer\.json.*512.*256"):
        load(folder)


# ---- real models ----


def test_stories260k_as_transformers_reads_it(shared, tmp_path):
    from transformers import AutoModelForCausalLM

    graph = load(shared / "models/stories260K")
    folder = save(graph, tmp_path / "out")
    prompt = torch.tensor(
        [graph.tokenizer.encode("Once upon a time, there was a little girl", add_special_tokens=True)]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, graph.module()(prompt), atol=1e-4, rtol=0)
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
    )[0, prompt.shape[1] :]
    found = graph.module().generate(prompt, 64)
    assert len(found) == 64 and torch.equal(found, expected)
    assert "named Lily. She loved to play outside in the park." in graph.tokenizer.decode(found.tolist())


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save(smollm2, tmp_path / "out")
    prompt = torch.tensor([smollm2.tokenizer.encode("Once upon a time, there was a little girl")])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, smollm2.module()(prompt), atol=1e-4, rtol=0)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)[
        0, prompt.shape[1] :
    ]
    assert torch.equal(smollm2.module().generate(prompt, 64), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tinyllama_opens_in_a_second_without_its_memory(tmp_path):
    """A sparse 2.2 GB bfloat16 file: opened, converted lazily, one row read."""
    config = TINYLLAMA_1_1B
    header, offset = {}, 0
    for name, shape in shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_to_hf(config, torch.bfloat16)))
    code = (
        "import sys, time, torch, safetensors.torch; from tinycompress.checkpoints.checkpoint import load\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        "before = rss(); start = time.process_time(); graph = load(sys.argv[1], dtype=torch.float32)\n"
        "print(time.process_time() - start, rss() - before, graph.config.n_params)\n"
        "norm = graph.weights['model.norm.weight']; print(norm.dtype == torch.float32, rss() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, megabytes, parameters, converted, after = run.stdout.split()
    assert parameters == "1100048384" and converted == "True"
    assert float(seconds) < 1 and float(megabytes) < 50 and float(after) < 50, run.stdout


def test_a_read_is_a_view_of_the_file(tiny, tmp_path):
    graph = load(save(tiny, tmp_path / "out"))
    for name in graph.weights:
        assert isinstance(graph.weights.entries[name], LazyTensor)
        assert graph.weights[name].data_ptr() == graph.weights[name].data_ptr() != 0

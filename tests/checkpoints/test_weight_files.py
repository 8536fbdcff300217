"""Which files of a folder hold the weights: names of older tools, adapters, pickles, indexes that disagree, links."""

import json

import pytest
import torch
from checkpoint_cases import IDS, as_hf, broken
from hub_cache import as_hub_cache
from safetensors.torch import load_file, save_file

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError


def rename(folder, name):
    (folder / "model.safetensors").rename(folder / name)


def shards(folder, *extra):
    """The weights in two files and an index; `extra` is put into both files, the second time one larger."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for i, (file, part) in enumerate(halves.items()):
        save_file({n: tensors[n] for n in part} | {n: tensors[n] + i for n in extra}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_snapshot_of_links_opens(tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    snapshot = as_hub_cache(folder, tmp_path / "single")
    assert torch.equal(load(snapshot).module()(IDS), tiny.module()(IDS))
    save(tiny, tmp_path / "parts", max_shard_bytes=60_000)
    snapshot = as_hub_cache(tmp_path / "parts", tmp_path / "shards")
    assert len(list(snapshot.glob("*.safetensors"))) > 1 and load(snapshot).fingerprint() == tiny.fingerprint()


def test_a_link_to_nothing_is_named(tiny, tmp_path):
    snapshot = as_hub_cache(as_hf(tiny, tmp_path / "m"), tmp_path / "cache")
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: found no such file.*link"):
        load(snapshot)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model.fp16.safetensors"])
def test_the_only_file_is_taken_under_any_name(name, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    rename(folder, name)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")  # the original of a conversion
    assert torch.equal(load(folder).module()(IDS), tiny.module()(IDS))


def test_transformers_names_come_before_others(tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
    assert torch.equal(load(folder).module()(IDS), tiny.module()(IDS))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.safetensors", "b.safetensors"], r"several files of weights: a\.safetensors, b\.safetensors"),
        (["model-00001-of-00002.safetensors"], r"model-00001-of-00002\.safetensors, but no index"),
        (["pytorch_model-00001-of-00002.bin"], r"pytorch_model-00001.*pickle.*never opened.*save_pretrained"),
        (["consolidated.00.pth"], "pickle"),
        ([], "no model.safetensors and no"),
    ],
)
def test_what_is_not_the_one_file_is_refused_by_name(names, message, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    for name in names:
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_refused_with_the_remedy(alone, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    if alone:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    message = r"only an adapter of 'org/base'" if alone else "weights and beside them an adapter"
    with pytest.raises(InputError, match=rf"{message}.*merge_and_unload"):
        load(folder)


def test_an_index_that_tells_less_than_the_shards_hold(tiny, tmp_path):
    folder = shards(as_hf(tiny, tmp_path / "m"))
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["lm_head.weight"]
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load(folder).module()(IDS), tiny.module()(IDS))  # as transformers reads it


def test_a_tensor_in_two_shards_is_refused_unless_both_are_alike(tiny, tmp_path):
    folder = shards(as_hf(tiny, tmp_path / "m"), "model.norm.weight")
    with pytest.raises(InputError, match=r"model\.norm\.weight.*two tensors, the second in b\.safetensors"):
        load(folder)
    alike = load_file(folder / "a.safetensors")
    save_file(alike | {"lm_head.weight": tiny.tensor("lm_head.weight")}, folder / "a.safetensors")
    save_file(
        load_file(folder / "b.safetensors") | {"model.norm.weight": alike["model.norm.weight"]},
        folder / "b.safetensors",
    )
    assert torch.equal(load(folder).module()(IDS), tiny.module()(IDS))


def test_rotary_buffers_are_harmless_and_other_tensors_are_not(tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "m")
    broken(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(folder)
    load(folder)
    broken(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)}))(folder)
    with pytest.raises(InputError, match="sinks"):
        load(folder)

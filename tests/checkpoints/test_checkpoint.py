"""Folders: what is written opens again, here and in transformers, and what cannot be found is said."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import IDS, quantize, transformers_logits
from safetensors.torch import load_file

from tinycompress.checkpoints import hf
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError, OutputError
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph, LazyTensor, Weights
from tinycompress.graph.presets import TINYLLAMA_1_1B
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor


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
    widened = load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(widened.weights.entries["model.norm.weight"], LazyTensor)
    assert torch.equal(widened.weights["model.norm.weight"], graph.weights["model.norm.weight"].float())


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
    with pytest.raises(ValueError, match="trust_remote_code"):
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
    alive = 0
    peak = 0

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
    with pytest.raises(OutputError, match=r"bytes free.*at least [\d,]+ bytes"):
        save(Graph(huge, Weights(entries)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_writing_leaves_nothing(tiny, tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    entries = dict(tiny.weights) | {"lm_head.weight": LazyTensor((128, 64), torch.float32, fail)}
    with pytest.raises(OutputError, match="disk is full"):
        save(Graph(tiny.config, Weights(entries)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
    generated = graph.module().generate(prompt, 64)
    assert len(generated) == 64 and torch.equal(generated, expected)
    assert "named Lily. She loved to play outside in the park." in graph.tokenizer.decode(generated.tolist())


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
    header = {}
    offset = 0
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

"""The code beside a saved folder: any graph in transformers, as its own class computes it."""

import dataclasses

import pytest
import torch

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.hf_code import MODELING
from tinycompress.graph.graph import Graph
from tinycompress.graph.rope import Rope
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.rtn import RTN

IDS = torch.arange(40)[None] * 7 % 128
SHORT, LONG = tuple(1 + i / 10 for i in range(8)), tuple(2 + i / 3 for i in range(8))
ROPES = {
    "yarn": Rope(1e4, "yarn", 4.0, 16),
    "longrope": Rope(1e4, "longrope", 4.0, 16, short_factor=SHORT, long_factor=LONG),
    "dynamic": Rope(1e4, "dynamic", 4.0, 16),
}


@pytest.fixture
def cases(peculiar) -> dict[str, Graph]:
    tied = Graph.random(dataclasses.replace(peculiar.config, tie_embeddings=True), std=0.2)
    stretched = {name: Graph.random(dataclasses.replace(peculiar.config, rope=r), std=0.2) for name, r in ROPES.items()}
    packed = {spec: RTN(spec)(peculiar) for spec in ("w4g16", "w3g16-asym", "w2g16-floatzero", "w8", "w3")}
    table = QuantizeEmbedding("w8g16")(RTN("w4g16")(tied))
    return {"peculiar": peculiar, "tied": tied, **stretched, **packed, "table": table}


def opened(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def test_transformers_computes_the_graph(cases, tmp_path):
    for name, graph in cases.items():
        graph = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=None))
        theirs = opened(save(graph, tmp_path / name))
        module = graph.dense().module()
        expected = module(IDS)
        torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=0, msg=name)
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS), 1)
        mask = (torch.arange(43)[None] >= 3).long()
        left = theirs(padded, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(left, expected, atol=1e-4, rtol=0, msg=f"{name}, padded left")
        if name != "dynamic":  # frequencies that change while keys are kept: transformers and we agree on prompts alone
            ones = torch.ones_like(IDS)
            text = theirs.generate(IDS, attention_mask=ones, max_new_tokens=12, do_sample=False)[0, 40:]
            assert text.tolist() == module.generate(IDS[0], 12).tolist(), name
        unpacked = theirs.unpack()
        assert not any("Packed" in type(part).__name__ for part in unpacked.modules())
        torch.testing.assert_close(unpacked(IDS).logits, expected, atol=1e-4, rtol=0, msg=f"{name}, unpacked")


def test_it_learns_once_it_is_unpacked(cases, tmp_path):
    model = opened(save(cases["table"], tmp_path / "out")).unpack()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_folder_is_still_ours(peculiar, tmp_path):
    """The code is one of the files that are checked, and nothing of it is run when we load."""
    folder = save(peculiar, tmp_path / "out")
    assert (folder / MODELING.name).read_bytes() == MODELING.read_bytes()
    (folder / MODELING.name).write_text("raise SystemExit('run')")
    assert load(folder).fingerprint() == peculiar.fingerprint()


def test_folders_of_transformers_own_classes_have_no_code(tiny, tmp_path):
    assert not (save(tiny, tmp_path / "out") / MODELING.name).exists()

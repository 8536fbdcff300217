"""Two processes on the CPU (gloo, FSDP2): the losses and weights of one process, and one's state continued on two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tinycompress.checkpoints import checkpoint
from tinycompress.distillation import training_loop
from tinycompress.distillation import training_state as train_state
from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.distillation.training import Training
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.rtn import RTN

LAYERS = (Layer(2, 1, 48), Layer(0, 0, 32), Layer(2, 2, 0), Layer(0, 0, 0))
STUDENT = Config(vocab_size=64, hidden_size=32, head_dim=16, layers=LAYERS, max_position=32, tie_embeddings=True)
TEACHER = Config(vocab_size=64, hidden_size=48, head_dim=16, layers=(Layer(3, 1, 48),) * 5, max_position=32)
TRAINING = dict(steps=6, lr=1e-2, batch=4, micro_batch=1, save_every=3, eval_every=2, weight_decay=0.1)

RUN = """
import sys, torch
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.distillation.distributed import process_group, rank, world_size
from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.quantization.rtn import RTN
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.distillation.training import Training
torch.set_num_threads(1)
folder = sys.argv[1]
tokens = torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(0))
with process_group("cpu") as device:
    assert world_size() == 2
    for work in ("new", "continued"):
        pass_ = Distill(tokens, load(folder + "/teacher"), Training(**%r),
                        hidden=(HiddenLoss(last=2), HiddenLoss("relation")), held_out=tokens[:3],
                        work=f"{folder}/{work}", log=f"{folder}/{work}")
        out = pass_(load(folder + "/student"))
        if rank() == 0:
            save(out, f"{folder}/{work}-out")
    packed = RTN(QuantSpec(3, 16))(load(folder + "/student"))
    out = Distill(tokens, load(folder + "/teacher"), Training(**%r), scales=True)(packed)
    if rank() == 0:
        save(out, f"{folder}/scales-out")
"""


def lines(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does_and_continue_its_state(tmp_path, monkeypatch):
    teacher, student = Graph.random(TEACHER, 1, std=0.2), Graph.random(STUDENT, 2, std=0.2)
    checkpoint.save(teacher, tmp_path / "teacher")
    checkpoint.save(student, tmp_path / "student")
    plain = training_loop.save_state

    def save_and_copy(work, step, tensors, about):
        plain(work, step, tensors, about)
        if step == 3:
            shutil.copytree(work, tmp_path / "continued")

    monkeypatch.setattr(training_loop, "save_state", save_and_copy)
    monkeypatch.setattr(train_state, "FILE_BYTES", 4000)
    tokens = torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(0))
    one = Distill(
        tokens,
        teacher,
        Training(**TRAINING),
        hidden=(HiddenLoss(last=2), HiddenLoss("relation")),
        held_out=tokens[:3],
        work=tmp_path / "one",
        log=tmp_path / "one",
    )(student)
    assert len(list((tmp_path / "continued/step-00000003").glob("*.safetensors"))) > 2  # a large state is several files
    script = tmp_path / "run.py"
    script.write_text(RUN % (TRAINING, TRAINING))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {line["step"]: line for line in lines(tmp_path / "one")}
    for work, first in (("new", 0), ("continued", 4)):
        found = {line["step"]: line for line in lines(tmp_path / work)}
        assert max(found) == 6 and all(step in found for step in range(max(first, 3), 7))
        for step, line in found.items():
            assert line.keys() == expected[step].keys()
            for name in {"loss", "grad_norm", "perplexity"} & line.keys():
                assert line[name] == pytest.approx(expected[step][name], rel=1e-4)
        out = checkpoint.load(tmp_path / f"{work}-out")
        for name, weight in one.weights.items():
            torch.testing.assert_close(out.weights[name], weight, rtol=1e-3, atol=1e-4)
    scales = Distill(tokens, teacher, Training(**TRAINING), scales=True)(RTN(QuantSpec(3, 16))(student))
    out = checkpoint.load(tmp_path / "scales-out")
    for name, weight in scales.weights.items():
        ours, theirs = (w.scales if isinstance(w, QuantTensor) else w for w in (out.weights[name], weight))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "one" / "step-00000003").exists()  # only the newest state is kept

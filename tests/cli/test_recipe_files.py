"""Recipes from the command line: the same bytes as the options', again from the folder they made, and the examples."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_cases import CALIBRATE, made, refused, run, tokenizer

from tinycompress.checkpoints import checkpoint
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

__all__ = ["made", "tokenizer"]  # fixtures, for this file too

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.toml"))
SMALL = ("data.samples=4", "data.seq_len=32")
OF_EXAMPLES = {  # what makes them small enough for a test
    "small": ("ScaleRope.context=128",),
    "mixed-bits": ("MixedBits.tokens.samples=4", "MixedBits.tokens.seq_len=32"),
    "autoround": ("AutoRound.tuning.steps=2",),
    "healed": (
        "Distill.tokens.samples=8",
        "Distill.tokens.seq_len=32",
        "Distill.training.steps=2",
        "measure.seq_len=32",
        "Prune.target=params=0.9",
        "Prune.multiple_of=16",
        "GPTQ.spec=w4g16",
    ),
}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def with_settings(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_a_recipe_and_its_options_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    options = ("--prune", "ffn=0.75", "--context", "128", "--quantize", "w4g32", "--quantize-embedding", "w8g32")
    run("compress", made / "uniform", *options, "--tune", *CALIBRATE, "--seed", 3, "-o", tmp_path / "one")
    text = run("inspect", tmp_path / "one", "--recipe")
    assert [line for line in text.splitlines() if line.startswith("name")] == [
        f'name = "{name}"' for name in ("Prune", "ChooseRope", "Rotate", "GPTQ", "QuantizeEmbedding", "Distill")
    ]
    (tmp_path / "again.toml").write_text(text)
    run("compress", "--recipe", tmp_path / "again.toml", "-o", tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    for name in ("config.json", "recipe.toml", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    run("compress", "--recipe", tmp_path / "again.toml", "--set", "data.seed=4", "-o", tmp_path / "three")
    assert weights(tmp_path / "one") != weights(tmp_path / "three")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(made: Path, tmp_path: Path, path: Path) -> None:
    settings = [*SMALL, *OF_EXAMPLES.get(path.stem, ())]
    out = tmp_path / "out"
    run("compress", made / "uniform", "--recipe", path, *with_settings(settings), "-o", out)
    assert (out / ("model.onnx" if path.stem == "healed" else "model.safetensors")).is_file()
    assert "## Measured" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("gptq", ["Rotate", "GPTQ"]),
        ("rtn", ["RTN"]),
        ("hqq", ["HQQ"]),
        ("awq", ["AWQ"]),
        ("autoround", ["RTN", "AutoRound"]),
        ("smoothquant", ["SmoothQuant", "RTN"]),
        ("mixed", ["GPTQ", "MixedBits"]),
    ],
)
def test_every_method_is_an_option(made: Path, tmp_path: Path, method: str, passes: list[str]) -> None:
    quick = ("--set", "AutoRound.tuning.steps=2") if method == "autoround" else ()
    flags = ("--quantize", "w4g32", "--quantize-method", method, "--no-measure", *CALIBRATE, *quick)
    run("compress", made / "uniform", *flags, "-o", tmp_path / "out")
    graph = checkpoint.load(tmp_path / "out")
    assert [step.split("(")[0] for step in graph.history] == passes
    assert isinstance(graph.weights["model.layers.0.mlp.down_proj.weight"], QuantTensor)


def test_plain_gptq_is_two_settings_away(made: Path, tmp_path: Path) -> None:
    plain = with_settings(["GPTQ.propagate=0", "GPTQ.refine=0"])
    run("compress", made / "uniform", "--quantize", "w4g32", "--no-rotate", *plain, *CALIBRATE, "-o", tmp_path / "one")
    recipe = tmp_path / "plain.toml"
    recipe.write_text('[data]\nsamples = 4\nseq_len = 32\n[[pass]]\nname = "GPTQ"\nspec = "w4g32"\n')
    run("compress", made / "uniform", "--recipe", recipe, "-o", tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize("option", ["slice=48", "drop=1", "layers=1"])
def test_other_cuts_are_options(made: Path, tmp_path: Path, option: str) -> None:
    run("compress", made / "uniform", "--prune", option, *CALIBRATE, "-o", tmp_path / "out")
    before, after = checkpoint.load(made / "uniform").config, checkpoint.load(tmp_path / "out").config
    assert after.n_body_params < before.n_body_params


def test_a_typo_is_one_line_with_the_right_name(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'model = "{made / "uniform"}"\n\n[[pass]]\nname = "GPTQ"\nspce = "w4g64"\n')
    error = refused("compress", "--recipe", recipe, output=tmp_path / "out")
    assert error == f"error: {recipe}, line 5: found 'spce', which GPTQ does not have; accepted: spec\n"


def test_what_fits_no_model_names_the_line(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'model = "{made / "uniform"}"\n[[pass]]\nname = "RTN"\nspec = "w4g48"\n')
    error = refused("compress", "--recipe", recipe, output=tmp_path / "out")
    assert f"{recipe}, line 2: found group_size for " in error and "48" in error
    recipe.write_text('[[pass]]\nname = "GPTQ"\n')
    error = refused(
        "compress", made / "uniform", "--recipe", recipe, "--set", "data.text=gone.txt", output=tmp_path / "o"
    )
    assert "gone.txt" in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prune", "ffn=0.5"], ["--prune", "--set"]),
        (["--seed", "1"], ["--seed", "--set"]),
        (["--export", "ort"], ["--export", "--set"]),
    ],
)
def test_options_of_passes_beside_a_recipe_are_refused(
    made: Path, tmp_path: Path, args: Sequence[str], words: Sequence[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[pass]]\nname = "RTN"\n')
    error = refused("compress", made / "uniform", "--recipe", recipe, *args, output=tmp_path / "out")
    assert all(word in error for word in words)


def test_what_a_command_lacks(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[pass]]\nname = "RTN"\n')
    assert "--output" in refused("compress", made / "uniform")
    assert "MODEL" in refused("compress", output=tmp_path / "out")
    assert "model = " in refused("compress", "--recipe", recipe, output=tmp_path / "out")
    assert "no pass Distill" in refused("distill", made / "uniform", "--recipe", recipe, output=tmp_path / "out")
    assert "no recipe" in refused("inspect", made / "uniform", "--recipe")


def test_a_dry_run_writes_nothing_and_foretells_the_bytes(made: Path, tmp_path: Path) -> None:
    options = ("--prune", "params=0.8", "--quantize", "w4g32", "--quantize-embedding", "w8g32", *CALIBRATE)
    out = run("compress", made / "uniform", *options, "--work", tmp_path / "work", "--dry-run")
    assert not list(tmp_path.iterdir())
    for word in ("1. Prune", "2. Rotate", "3. GPTQ", "4. QuantizeEmbedding", "estimated", "disk:", "work"):
        assert word in out
    run("compress", made / "uniform", *options, "-o", tmp_path / "out")
    graph = checkpoint.load(tmp_path / "out")
    assert f"{graph.config.n_params:,}" in out and f"{graph.nbytes / 1000:.4g} kB" in out


def test_a_student_learns_by_a_recipe(made: Path, tmp_path: Path) -> None:
    options = ("--teacher", made / "uniform", "--steps", 2, "--batch", 2, "--seq-len", 16, "--loss", "kl+1:0*ce")
    run("distill", made / "uniform", *options, "--temperature", 2.0, "-o", tmp_path / "one")
    text = run("inspect", tmp_path / "one", "--recipe")
    assert 'name = "Distill"' in text and "in_order = true" in text
    (tmp_path / "again.toml").write_text(text)
    run("distill", "--recipe", tmp_path / "again.toml", "--work", tmp_path / "work", "-o", tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert (tmp_path / "work" / "train.jsonl").is_file()
    assert (tmp_path / "one" / "recipe.toml").read_bytes() == (tmp_path / "two" / "recipe.toml").read_bytes()


# provenance


def test_the_folder_says_how_it_was_made(made: Path, tmp_path: Path) -> None:
    args = ("compress", made / "uniform", "--quantize", "w4g32", *CALIBRATE, "--seed", 5, "-o", tmp_path / "out")
    run(*args)
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["command"].split() == ["tinycompress", *map(str, args)]
    assert set(facts["versions"]) == {"tinycompress", "torch", "python"}
    calibration, measured = facts["data"]
    assert calibration["text"] == "pydoc" and (calibration["windows"], calibration["seq_len"]) == (4, 32)
    assert calibration["seed"] == 5 and len(calibration["sha256"]) == 64 and measured["split"] == "test"
    values = facts["measured"]["perplexity"]
    assert values["before"] > 1 and values["after"] > 1 and values["before"] != values["after"]
    assert facts["seconds"] > 0 and facts["peak_memory"] > 10_000_000
    text = json.dumps(facts)
    assert platform.node() not in text and str(Path.home()) not in text.replace(str(tmp_path), "")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n# base_model: ") and "- gptq\n" in card and "library_name: tinycompress" in card
    assert f"| {values['before']:.4f} | {values['after']:.4f} |" in card and "# license" in card
    assert "4 windows of 32 tokens of pydoc" in card and checkpoint.load(tmp_path / "out").tokenizer


def test_what_was_not_measured_says_so(made: Path, tmp_path: Path) -> None:
    run("compress", made / "uniform", "--quantize", "w4g32", *CALIBRATE, "--no-measure", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["measured"] is None
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_carries_it_on(made: Path, tmp_path: Path) -> None:
    run("compress", made / "uniform", "--quantize", "w4g32", *CALIBRATE, "-o", tmp_path / "small")
    run("export", tmp_path / "small", "-o", tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["provenance"]["recipe"] == (tmp_path / "small" / "recipe.toml").read_text()
    assert run("inspect", tmp_path / "onnx", "--recipe") == run("inspect", tmp_path / "small", "--recipe")
    card = (tmp_path / "onnx" / "README.md").read_text()
    kl = next(check for check in manifest["checks"]["checks"] if check["check"] == "kl")
    assert f"{kl['figure']:.4g}" in card and "perplexity, pydoc" in card
    (tmp_path / "onnx" / "README.md").write_text("license: mine")
    run("verify", tmp_path / "onnx")


def test_the_base_is_carried_through_folders(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: object
) -> None:
    graph = checkpoint.load(made / "uniform")
    load = checkpoint.load

    def known(name: str, *args: object) -> Graph:
        return graph if name == "org/base" else load(name)

    monkeypatch.setattr(checkpoint, "load", known)
    run("compress", "org/base", "--quantize-embedding", "w8g32", "-o", tmp_path / "one")
    run("compress", tmp_path / "one", "--quantize", "w4g32", "--quantize-method", "rtn", "-o", tmp_path / "two")
    for name in ("one", "two"):
        assert (tmp_path / name / "README.md").read_text().startswith("---\nbase_model: org/base\n")


def test_a_finished_run_is_measured_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("compress", made / "uniform", "--quantize", "w4g32", *CALIBRATE, "--work", tmp_path / "work", "-o")
    run(*args, tmp_path / "one")
    monkeypatch.setattr("tinycompress.recipe.run.streamed_perplexity", lambda *_: pytest.fail("measured again"))
    run(*args, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")

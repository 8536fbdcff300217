"""The command line as people type it: other spellings, wrong words, empty values, logs, JSON; and what it costs."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_cases import CALIBRATE, invoke, made, refused, run, tokenizer
from typer.testing import CliRunner

from tinycompress import progress
from tinycompress.cli import evaluate as evaluate_command
from tinycompress.cli.guidance import ELSEWHERE, OPTIONS_ELSEWHERE
from tinycompress.cli.main import COMMANDS, app
from tinycompress.cli.spellings import budget_of, grid_of, positions_of, profile_of, share_of, word_of
from tinycompress.cli.terminal import print_json
from tinycompress.errors import InputError

__all__ = ["made", "tokenizer"]  # fixtures, for this file too


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "model"], ["'quantize'", "tinycompress compress MODEL --quantize w4g64 -o OUT"]),
        (["Prune"], ["--prune params=0.8"]),
        (["comprss"], ["'comprss'; accepted: compress"]),
        (["distil"], ["accepted: distill"]),
        (["zzz"], ["inspect | compress"]),
        (["compress", "m", "--quantise", "w4"], ["'--quantise'; accepted: --quantize"]),
        (["compress", "m", "--quantize_embedding", "w4"], ["accepted: --quantize-embedding"]),
        (["compress", "m", "--bits", "4"], ["accepted: --quantize"]),
        (["inspect", "m", "--xyzzy"], [" inspect --help"]),
        (["inspect"], ["MODEL: found none"]),
        (["compress", "m"], ["--output: found none"]),
        (["eval", "m", "--windows", "x"], ["--windows"]),
        (["eval", "m", "--data", ""], ["--data: found an empty value"]),
        (["compress", "m", "-o", ""], ["-o: found an empty value"]),
        (["compress", "m", "--rope-method", "yarn", "-o", "o"], ["--rope-method: found without --context"]),
        (["compress", "m", "--quantize-method", "rtn", "-o", "o"], ["--quantize-method: found without --quantize"]),
        (["compress", "m", "--context", "4x", "-o", "o"], ["--context: found '4x'", "8k"]),
        (["compress", "m", "--profile", "gguf", "-o", "o"], ["compress --format gguf"]),
        (["inspect", "m", "-q", "-v"], ["--quiet: found given together with --verbose"]),
    ],
)
def test_a_mistyped_line_is_answered_in_one(args: list[str], words: list[str]) -> None:
    error = refused(*args)
    assert all(word in error for word in words) and len(error.splitlines()) == 1, error


def test_hints_name_commands_and_options_that_exist() -> None:
    for hint in ELSEWHERE.values():
        word = hint.split()[1]
        assert word in COMMANDS or word.startswith("--")
    helps = "".join(run(name, "--help") for name in COMMANDS)
    assert all(option in helps for option in OPTIONS_ELSEWHERE.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name: str) -> None:
    text = run(name, "-h")
    assert all(word in text for word in ("-q, --quiet", "-v, --verbose", "--debug", "-V, --version", "-h, --help"))
    assert run(name, "-V") == run("--version") == run("-V")


def test_grids_in_other_words() -> None:
    words = {"W4G32": "w4g32", "int4": "w4g64", "4bit": "w4g64", "4-bit": "w4g64", "INT8": "w8g64", "int4-g32": "w4g32"}
    words |= {"w4g32_asym": "w4g32-asym", "w8": "w8", "4": "w4g64", "q3": "w3g64", "fp8": "fp8", "nf4": "nf4"}
    assert {word: grid_of("--quantize", word) for word in words} == words


def test_numbers_in_other_words() -> None:
    words = {"4k": 4096, "8K": 8192, "16,384": 16384, "131072": 131072, "1M": 1 << 20, "0.5k": 512}
    assert {word: positions_of("--context", word) for word in words} == words
    assert share_of("--warmup", "3%") == 0.03 and share_of("--warmup", "100") == 100
    budgets = {"80%": "params=0.8", "0.8": "params=0.8", "params=80%": "params=0.8", "FFN=75%": "ffn=0.75"}
    budgets |= {"bytes=300 MB": "bytes=300mb", "bytes=2MiB": "bytes=2097152", "bytes=1G": "bytes=1000000000"}
    budgets |= {"params=40%,ffn,heads": "params=0.4,ffn,heads", "layers=20": "layers=20", "8": "8"}
    assert {word: budget_of("--prune", word) for word in budgets} == budgets
    assert word_of("--rope-method", "NTK_by_parts", ["ntk-by-parts"]) == "ntk-by-parts"
    assert word_of("--rope-method", "magic", ["yarn"]) == "magic"
    for wrong in ("", "x", "-3", "1.5", "1"):
        with pytest.raises(InputError, match="--context"):
            positions_of("--context", wrong)


def test_profiles_by_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = {"android": "ort", "Browser": "web", "OpenVINO": "openvino-npu", "snapdragon": "qnn", "ORT": "ort"}
    assert {word: profile_of("--profile", word) for word in words} == words
    assert "note: --profile android is profile ort here" in capsys.readouterr().err
    assert profile_of("--profile", "toaster") == "toaster"


def test_spellings_reach_the_passes(made: Path, tmp_path: Path) -> None:
    args = ("--quantize", "INT4-g32", "--quantize-method", "RTN", "--context", "0.125k", "--rope-method", "YaRN")
    code, out, err = invoke("compress", made / "uniform", *args, "--json", "--no-measure", "-o", tmp_path / "out")
    assert code == 0 and "note: --quantize INT4-g32 is w4g32 here" in err
    result = json.loads(out)
    assert result["after"]["context"] == 128 and result["checks"] is None and result["measured"] is None
    assert result["output"] == str(tmp_path / "out") and result["bytes"] > result["after"]["bytes"]
    quiet = invoke("compress", made / "uniform", *args, "-q", "--no-measure", "-o", tmp_path / "two")
    assert quiet[0] == 0 and quiet[2] == ""


@pytest.mark.parametrize("option", ["--profile", "--export"])
def test_an_export_prints_the_figures_of_its_gate(made: Path, tmp_path: Path, option: str) -> None:
    text = run("compress", made / "mixed", option, "ort", "-o", tmp_path / "onnx")
    assert "prefill" in text and "limit" in text and "\npassed" in text
    out = json.loads(run("export", made / "mixed", "--no-verify", "--json", "-o", tmp_path / "json"))
    assert out["profile"] == "ort" and not out["checks"]
    assert "not checked" in run("export", made / "mixed", "--no-verify", "-o", tmp_path / "unchecked")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"perplexity": math.nan, "all": [math.inf]})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "all": [None]}


@pytest.mark.parametrize("tables", [(), ("--quantize-embedding", "w8g32")])
def test_bytes_are_those_on_disk(made: Path, tmp_path: Path, tables: tuple[str, ...]) -> None:
    whole = tmp_path / "whole"
    grids = ("--quantize", "w4g32", "--quantize-method", "rtn", *tables, "--no-measure", *CALIBRATE)
    run("compress", made / "mixed", *grids, "-o", whole)
    stored = (whole / "model.safetensors").stat().st_size
    args = ("compress", made / "mixed", *grids, "--set", "Prune.multiple_of=32")
    target = stored - 12_000  # about two steps of FFNs
    run(*args, "--prune", f"bytes={target}", "-o", tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    step = 3 * 64 * 32 // 2 * 5 // 4 + 1000  # the bytes of 32 channels of one FFN: widths go in steps
    assert target - step - 0.02 * target <= size <= target


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--context", "1000000000000", "for which this machine has memory"), ("--lora", "4000", "at most 64")],
)
def test_what_the_machine_or_the_model_cannot_hold(
    made: Path, tmp_path: Path, option: str, value: str, words: str
) -> None:
    command = ("compress",) if option == "--context" else ("distill",)
    rest = ("--rope-method", "linear") if option == "--context" else ("--teacher", made / "mixed", "--seq-len", "32")
    error = refused(*command, made / "mixed", option, value, *rest, output=tmp_path / "out")
    assert option in error and words in error


def test_what_nobody_foresaw_is_one_line_and_a_traceback_only_when_asked(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("three\nlines\nlong")

    monkeypatch.setattr(evaluate_command, "open_model", broken)
    result = CliRunner().invoke(app, ["eval", str(made / "mixed")])
    assert (
        result.exit_code == 1
        and len(result.stderr.splitlines()) == 1
        and "TypeError: three lines long" in result.stderr
    )
    assert "Traceback" in CliRunner().invoke(app, ["eval", str(made / "mixed"), "--debug"]).stderr


def test_a_full_disk_is_1_whatever_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(evaluate_command, "open_model", full)
    assert "no space left" in refused("eval", made / "mixed", code=1)


def test_progress_in_a_log_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    stream = io.StringIO()
    for _ in progress.tqdm(range(5), desc="GPTQ", unit="layer", delay=0.01, file=stream):
        time.sleep(0.06)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2 and all(line.startswith("GPTQ: ") and " left" in line for line in lines)
    assert "\r" not in stream.getvalue() and "of 5 layer" in lines[0]
    with progress.progress_bars(False):
        assert progress.tqdm(range(5), file=stream).disable


TORCHLESS = (
    ["--help"],
    ["-V"],
    ["quantize"],
    ["compress", "--help"],
    ["compress", "m", "--quantise", "w4"],
    ["compress", "m", "--context", "4x", "-o", "o"],
    ["compress", "m", "--recipe", "bad.toml", "-o", "o"],
)


def test_answers_to_mistakes_do_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[[pass]]\nname = "GTPQ"\n')
    code = "import sys\nfrom tinycompress.cli import main\nsys.argv = ['tinycompress', *sys.argv[1:]]\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    for args in TORCHLESS:
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False", (args, done.stdout, done.stderr)
        assert done.returncode == (0 if done.stderr == "" else 2)

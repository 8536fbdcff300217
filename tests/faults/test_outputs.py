"""What may be written where: kinds of files, links, places that must stay, and what appears while a run works."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError, OutputError
from tinycompress.files import claim, claim_file, locked, moves, new_file, new_folder, record, sweep, write_json
from tinycompress.files.temporary import MOVING
from tinycompress.graph.graph import Graph
from tinycompress.quantization.rtn import RTN


@pytest.fixture(params=["exchange", "no exchange"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds where the system swaps folders in one step, and where it does not."""
    if request.param == "no exchange":
        monkeypatch.setattr(moves, "_renameat2", lambda: None)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to(os.devnull)


@pytest.mark.parametrize("make", [a_pipe, a_socket, a_link_to_a_device])
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_no_device_pipe_or_socket_is_written(
    make: Callable[[Path], None], suffix: str, tiny: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / f"out{suffix}"
    make(out)
    before = stat.S_IFMT(os.stat(out).st_mode)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"a device|a pipe|a socket"):
            save(tiny, out, overwrite=overwrite, format="gguf" if suffix else "native")
    with pytest.raises(InputError, match=r"a device|a pipe|a socket"):
        write_json(out, {})
    assert stat.S_IFMT(os.stat(out).st_mode) == before and [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(there: bool, tiny: Graph, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big disk"
    elsewhere.mkdir()
    if there:
        (elsewhere / "folder").mkdir()
        (elsewhere / "model.gguf").touch()
    for name in ("folder", "model.gguf"):
        (tmp_path / f"link-{name}").symlink_to(elsewhere / name)
    save(tiny, tmp_path / "link-folder", overwrite=there)
    save(tiny, tmp_path / "link-model.gguf", overwrite=there, format="gguf")
    write_json(tmp_path / "link-folder" / "config.json", {"a": 1})
    assert (tmp_path / "link-folder").is_symlink() and (tmp_path / "link-model.gguf").is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["folder", "model.gguf"]
    assert (elsewhere / "model.gguf").stat().st_size > 0


def test_only_what_the_library_wrote_is_replaced(tiny: Graph, nonuniform: Graph, tmp_path: Path) -> None:
    packed = RTN("w4g32")(tiny)
    for format in ("native", "gptq", "awq", "compressed-tensors"):
        save(packed, tmp_path / format, format=format)
        save(nonuniform, tmp_path / format, overwrite=True)
        assert load(tmp_path / format).fingerprint() == nonuniform.fingerprint()
    out = tmp_path / "native"
    (out / "thesis.txt").write_text("years of work")
    before = record(out)
    with pytest.raises(InputError, match=r"thesis\.txt, not written by tinycompress"):
        save(tiny, out, overwrite=True)
    (tmp_path / "gptq" / "photos").mkdir()
    (tmp_path / "gptq" / "photos" / "a.json").touch()
    with pytest.raises(InputError, match=r"photos/a\.json, not written"):
        save(tiny, tmp_path / "gptq", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="not written by tinycompress"):
        save(tiny, tmp_path / "mine", overwrite=True)
    (tmp_path / "folders" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="not written by tinycompress"):
        save(tiny, tmp_path / "folders", overwrite=True)
    assert record(out) == before


def test_places_that_must_stay(tiny: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tmp_path / "ours"
    save(tiny, ours)
    inner = ours / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for place, words in (("..", "holds the current folder"), ("/", r"the current folder|root")):
        with pytest.raises(InputError, match=words):
            claim(place, overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(ours))
    with pytest.raises(InputError, match="is your home folder"):
        claim(ours, overwrite=True)


def test_apart_from_what_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (tmp_path / "text.txt").touch()
    (model / "weights").symlink_to(tmp_path / "blobs" / "weights")
    others = {"MODEL": str(model), "the work folder": tmp_path / "new work", "the text": str(tmp_path / "text.txt")}
    for place in (model, model / "inner", model / "new", tmp_path, tmp_path / "blobs", tmp_path / "new work" / "out"):
        with pytest.raises(InputError, match=r"which (is|holds|lies in) (MODEL|the work folder|the text)"):
            claim(place, True, others)
    with pytest.raises(InputError, match="which is the text"):
        claim_file(tmp_path / "text.txt", True, others)
    assert claim(tmp_path / "out", True, others | {"a name": "org/name", "nothing": None}).seen is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_kept(overwrite: bool, tiny: Graph, tmp_path: Path) -> None:
    out = tmp_path / "out"
    claimed = claim(out, overwrite)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"kept; the result is in .*out-2"):
        save(tiny, claimed)
    assert (out / "thesis.txt").read_text() == "mine"
    assert load(tmp_path / "out-2").fingerprint() == tiny.fingerprint()
    file = claim_file(tmp_path / "model.gguf", overwrite)
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match=r"the result is in .*model-2\.gguf"):
        save(tiny, file, format="gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-2.gguf", "model.gguf", "out", "out-2"]


def test_what_is_put_into_the_old_folder_meanwhile_is_kept(tiny: Graph, nonuniform: Graph, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(tiny, out)
    claimed = claim(out, True)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="out-2"):
        save(nonuniform, claimed)
    assert (out / "thesis.txt").read_text() == "mine" and load(out).fingerprint() == tiny.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


def test_a_replacement_has_the_permissions_of_what_it_replaces(tiny: Graph, tmp_path: Path) -> None:
    save(tiny, tmp_path / "out")
    (tmp_path / "out").chmod(0o700)
    save(tiny, tmp_path / "out", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_the_current_folder_is_filled_if_it_is_empty(
    tiny: Graph, nonuniform: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    save(tiny, ".")
    assert load(Path.cwd()).fingerprint() == tiny.fingerprint()  # it is the same folder still
    assert not any(path.name.startswith(".") for path in here.iterdir())
    with pytest.raises(InputError, match="is the current folder"):
        save(nonuniform, ".", overwrite=True)


def test_a_mounted_folder_is_filled_and_never_moved(tiny: Graph, nonuniform: Graph, disk: Path) -> None:
    save(tiny, disk)
    assert load(disk).fingerprint() == tiny.fingerprint() and os.path.ismount(disk)
    with pytest.raises(InputError, match="a disk of its own"):
        save(nonuniform, disk, overwrite=True)


def test_a_filled_folder_is_emptied_of_what_a_dead_run_moved(
    tiny: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    save(tiny, ".")
    names = sorted(path.name for path in here.iterdir())
    dead = here / f".{here.name}.tmp-0badcafe"
    dead.mkdir()
    os.rename(names[-1], dead / names[-1])
    write_json(dead / MOVING, names)
    save(tiny, ".")
    assert load(here).fingerprint() == tiny.fingerprint()
    dead.mkdir()
    (dead / MOVING).write_text(f'["{names[0]}", "../{here.name}"]')
    (dead / names[0]).touch()
    sweep(here)
    assert sorted(path.name for path in here.iterdir()) == names  # one was not moved, one is no plain name


def test_dead_runs_are_cleaned_up_and_live_ones_are_not(tiny: Graph, tmp_path: Path) -> None:
    for name in (".out.tmp-0badcafe", ".other.tmp-0badcafe", ".out.tmp-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    old = tmp_path / ".lost.tmp-0badcafe-old"
    save(tiny, old)
    with new_folder(tmp_path / "out") as live:
        sweep(tmp_path, "out")
        assert live.is_dir() and not (tmp_path / ".out.tmp-0badcafe").exists()
        assert (tmp_path / ".other.tmp-0badcafe").is_dir()
    save(tiny, tmp_path / "lost", overwrite=True)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp-notes", "lost", "out"]


def test_a_folder_moved_away_by_a_dead_run_comes_back(tiny: Graph, tmp_path: Path) -> None:
    save(tiny, tmp_path / ".out.tmp-0badcafe-old")
    sweep(tmp_path)
    assert load(tmp_path / "out").fingerprint() == tiny.fingerprint()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from tinycompress.files import locked\nwith locked(sys.argv[1]): print('in')"
    other = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path), locked(tmp_path):
        done = subprocess.run(other, capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr and "OutputError" in done.stderr
    assert subprocess.run(other, capture_output=True, text=True).stdout == "in\n"
    assert not any(tmp_path.iterdir())


def test_bad_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("", "nul\0byte", tmp_path / "file" / "out"):
        with pytest.raises(InputError):
            claim(name)
    with pytest.raises((InputError, OSError)):
        claim(tmp_path / "loop" / "out")
    with pytest.raises(InputError, match="a folder"), new_file(tmp_path, overwrite=True):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"):
        claim(tmp_path / "closed" / "out")


def test_parents_that_were_made_go_with_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert not any(tmp_path.iterdir())

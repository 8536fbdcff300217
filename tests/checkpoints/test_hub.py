"""Models by their names, from a small hub on this machine that speaks huggingface_hub's protocol."""

import os
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_cases import IDS, as_hf
from conftest import random_graph
from hub_server import TOKEN, HubServer, Repository
from safetensors.torch import save_file

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.hub import hub_name
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, and huggingface_hub pointed at it: an empty cache, no token, no patience."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import reset_sessions

    server = HubServer()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 1)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    reset_sessions()
    yield server
    server.close()
    reset_sessions()


@pytest.fixture
def folder(tiny, tmp_path):
    """A Hugging Face folder, with what lies beside the weights in many repositories."""
    folder = as_hf(tiny, tmp_path / "source")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("words")
    (folder / "merges.txt").write_text("a b")
    (folder / "original").mkdir()
    save_file({"x": torch.ones(3)}, folder / "original" / "consolidated.safetensors")
    save_file({"x": torch.ones(3)}, folder / "consolidated.safetensors")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return folder


def logits(name, **options):
    return load(name, **options).module()(IDS)


def snapshot(tmp_path):
    (folder,) = (tmp_path / "hub" / "models--org--model" / "snapshots").iterdir()
    return folder


def test_only_what_is_needed_is_fetched_and_once(hub, folder, tiny, tmp_path, capsys):
    hub.repositories["org/model"] = Repository.of(folder)
    assert torch.equal(logits("org/model"), tiny.module()(IDS))
    assert "not a local path: fetching it" in capsys.readouterr().err
    held = {path.relative_to(snapshot(tmp_path)).as_posix() for path in snapshot(tmp_path).rglob("*") if path.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "merges.txt"}
    assert held == expected | {"additional_chat_templates/tool.jinja"}
    before = hub.fetched()
    assert max(before.values()) == 1
    assert torch.equal(logits("org/model"), tiny.module()(IDS))
    assert hub.fetched() == before  # the listing was asked for again, no file was


def test_without_a_network_the_cache_is_enough(hub, folder, tiny, monkeypatch, capsys):
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    hub.repositories["org/model"] = Repository.of(folder)
    load("org/model")
    load("org/model@old")
    hub.close()
    for name in ("org/model", "org/model@main", "org/model@old"):
        assert torch.equal(logits(name), tiny.module()(IDS))
    assert "the hub cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert torch.equal(logits("org/model"), tiny.module()(IDS))
    assert "cannot be reached" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"'org/other': no such local path, and the hub said: .*offline mode.*cache"):
        load("org/other")


def test_shards_are_those_of_the_index(hub, tiny, tmp_path):
    save(tiny, tmp_path / "source", max_shard_bytes=60_000)
    files = Repository.of(tmp_path / "source")
    files.files["unlisted.safetensors"] = b"x"
    hub.repositories["org/model"] = files
    assert torch.equal(logits("org/model"), tiny.module()(IDS))
    assert not (snapshot(tmp_path) / "unlisted.safetensors").exists()
    shard = next(name for name in files.files if name.startswith("model-00002"))
    hub.repositories["org/less"] = Repository({name: data for name, data in files.files.items() if name != shard})
    with pytest.raises(InputError, match=rf"{shard}, which org/less does not have"):
        load("org/less")


@pytest.mark.parametrize(
    "access, token, message",
    [
        ("private", None, r"'org/model'.*no such repository that the hub shows you.*HF_TOKEN"),
        ("private", "hf_wrong", r"org/model, and the hub refused: .*Invalid credentials.*hf auth login"),
        ("gated", None, r"org/model, which is gated.*accept its terms at http://127.*/org/model, then log in"),
    ],
)
def test_what_is_not_public_says_how_to_get_it(access, token, message, hub, folder, tiny, monkeypatch):
    hub.repositories["org/model"] = Repository.of(folder, access=access)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as error:
        load("org/model")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(logits("org/model"), tiny.module()(IDS))
    assert not any(path.startswith("/cdn/") for path in hub.authorized)  # another host: it gets no token


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/nothing", r"'org/nothing': no such local path, and no such repository"),
        ("org/model@v2", r"org/model, which has no revision 'v2'"),
        ("org/model:none.gguf", r"none\.gguf; GGUF files there: none"),
        ("org--x/model", r"org--x/model, which could not be fetched: .*"),
    ],
)
def test_what_is_not_there_is_named(name, message, hub, folder):
    hub.repositories["org/model"] = Repository.of(folder)
    with pytest.raises(InputError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_file_that_the_listing_has_and_the_hub_has_not(hub, folder):
    hub.repositories["org/model"] = Repository.of(folder, faults={"generation_config.json": "missing"})
    with pytest.raises(InputError, match=r"org/model, which could not be fetched: .*Entry Not Found"):
        load("org/model")


def test_only_pickles_are_refused_before_anything_is_fetched(hub, folder):
    (folder / "model.safetensors").unlink()
    (folder / "consolidated.safetensors").unlink()
    hub.repositories["org/model"] = Repository.of(folder)
    with pytest.raises(InputError, match=r"org/model.*pytorch_model\.bin, a pickle.*never opened.*safetensors"):
        load("org/model")
    assert not hub.fetched()


def test_an_adapter_is_refused_before_its_weights_are_fetched(hub, folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    hub.repositories["org/model"] = Repository.of(folder)
    with pytest.raises(InputError, match=r"an adapter \(adapter_config\.json, of 'org/base'\)"):
        load("org/model")
    assert "model.safetensors" not in hub.fetched()


def test_a_cut_download_does_not_load_and_goes_on_where_it_stopped(hub, folder, tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.repositories["org/model"] = Repository.of(folder, faults={"model.safetensors": "cut"})
    with pytest.raises(InputError, match=r"org/model, which could not be fetched.*goes on where this one stopped"):
        load("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is there is not taken for a model
    reset_sessions()
    with pytest.raises(InputError, match="no such local path"):
        load("org/model")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load(snapshot(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
    (half,) = (tmp_path / "hub" / "models--org--model" / "blobs").glob("*.incomplete")
    assert half.stat().st_size > 0
    assert torch.equal(logits("org/model"), tiny.module()(IDS))  # the server cuts what is asked for from its start
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("fault", ["stall", "busy"])
def test_a_hub_that_does_not_answer_is_an_error_soon(fault, hub, folder):
    hub.repositories["org/model"] = Repository.of(folder, faults={"listing": fault})
    start = time.monotonic()
    with pytest.raises(InputError, match=r"'org/model': no such local path, and the hub said: .*(timed out|503)"):
        load("org/model")
    assert time.monotonic() - start < 5


def test_weights_that_never_come_are_an_error(hub, folder):
    hub.repositories["org/model"] = Repository.of(folder, faults={"model.safetensors": "stall"})
    with pytest.raises(InputError, match=r"org/model, which could not be fetched: .*timed out"):
        load("org/model")


def test_a_hub_that_refuses_connections(hub, folder):
    hub.close()
    with pytest.raises(InputError, match=r"'org/model': no such local path, and the hub said"):
        load("org/model")


# ---- GGUF


def gguf(folder, names, grid_seed=0):
    """A repository of GGUF files, each another model."""
    config = Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
    graphs = {name: random_graph(config, seed) for seed, name in enumerate(names, grid_seed)}
    for name, graph in graphs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(graph, folder / name, format="gguf")
    return graphs


def test_gguf_files_are_chosen_by_name(hub, tmp_path):
    graphs = gguf(tmp_path / "source", ["m-Q4.gguf", "m-Q8.gguf", "big/m-F16.gguf"])
    hub.repositories["org/model-GGUF"] = Repository.of(tmp_path / "source")
    with pytest.raises(InputError, match=r"org/model-GGUF; .*: big/m-F16\.gguf, m-Q4\.gguf, m-Q8\.gguf.*:FILE"):
        load("org/model-GGUF")
    with pytest.raises(InputError, match=r"m-Q5\.gguf; .*m-Q4\.gguf"):
        load("org/model-GGUF:m-Q5.gguf")
    for name, graph in graphs.items():
        loaded = load(f"org/model-GGUF@main:{name}")
        assert torch.equal(loaded.module()(IDS), graph.module()(IDS))
    assert len(hub.fetched()) == 3
    hub.close()
    load("org/model-GGUF:m-Q8.gguf")


def test_the_only_gguf_file_needs_no_name(hub, tmp_path):
    (graph,) = gguf(tmp_path / "source", ["m.gguf"]).values()
    hub.repositories["org/model"] = Repository.of(tmp_path / "source")
    assert torch.equal(logits("org/model"), graph.module()(IDS))


def test_all_parts_of_a_split_file_are_fetched(hub, tmp_path):
    parts = {f"m-0000{i}-of-00002.gguf": bytes([i]) * 40 for i in (1, 2)}
    hub.repositories["org/model"] = Repository(dict(parts))
    from tinycompress.checkpoints.hub import fetch

    path = fetch(hub_name("org/model"))
    assert path.name == "m-00001-of-00002.gguf" and len(list(path.parent.iterdir())) == 2
    del hub.repositories["org/model"].files["m-00002-of-00002.gguf"]
    with pytest.raises(InputError, match=r"no m-00002-of-00002\.gguf in org/model"):
        fetch(hub_name("org/model"))


# ---- names


@pytest.mark.parametrize(
    "name, parts",
    [
        ("org/model", ("org/model", "main", None)),
        ("org/model@v1.0", ("org/model", "v1.0", None)),
        ("org/model@refs/pr/3:a/b.gguf", ("org/model", "refs/pr/3", "a/b.gguf")),
        ("org/model:x.gguf", ("org/model", "main", "x.gguf")),
        ("org", None),
        ("a/b/c", None),
        ("org/model:x.bin", None),
        ("org/model@", None),
    ],
)
def test_names_are_taken_apart(name, parts):
    taken = hub_name(name)
    assert (taken and (taken.repository, taken.revision, taken.file)) == parts


def test_a_revision_is_said_once():
    assert hub_name("org/model", "v1").revision == "v1"
    assert hub_name("org/model@v1", "v1").revision == "v1"
    with pytest.raises(InputError, match=r"revision: found 'v2', and 'v1' in org/model@v1"):
        hub_name("org/model@v1", "v2")


def test_a_revision_outside_of_the_cache_is_refused(hub, folder):
    hub.repositories["org/model"] = Repository.of(folder)
    with pytest.raises(InputError, match=r"no revision '\.\./\.\./x'"):
        load("org/model@../../x")


def test_compress_from_a_name_on_the_command_line(hub, shared, tmp_path):
    """The environment variables are the library's own, so this runs in a process that has read them."""
    graph = load(shared / "models" / "stories260K")
    save(graph, tmp_path / "source")
    (tmp_path / "source" / "tinycompress.json").unlink()
    hub.repositories["TinyLlama/TinyLlama-1.1B-Chat-v1.0"] = Repository.of(tmp_path / "source", access="private")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    environment["HF_HUB_OFFLINE"] = "0"
    compress = [sys.executable, "-m", "tinycompress", "compress", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    compress += ["--quantize", "w4", "--quantize-method", "rtn", "-o", str(tmp_path / "out")]
    run = subprocess.run(compress, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert hub.fetched()  # from this hub
    assert "fetching it from the Hugging Face hub" in run.stderr
    loaded = load(tmp_path / "out")
    assert loaded.history and loaded.tokenizer is not None

"""A model by its name on a hub: the files of it that are needed, fetched into huggingface_hub's cache.

  org/model              its safetensors, or its only GGUF file
  org/model@revision     of a branch, tag or commit
  org/model:file.gguf    one GGUF file of several

The small files come first and the weights last, and a branch points to what was fetched only when all of it is there:
so what the cache gives without a network is whole. The library resumes a download that was cut. Tokens and the
variables HF_HUB_OFFLINE, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT are the library's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .. import files
from ..errors import InputError
from .weight_files import INDEX_ENDING, refuse_adapter, shards_of, weight_file

SMALL = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
TEMPLATES = "additional_chat_templates/*.jinja"
NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<file>[^:\s]+\.gguf))?")
FIRST_PART = re.compile(r"(?P<stem>.*)-00001-of-(?P<parts>\d{5})\.gguf")
LATER_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
LOG_IN = "log in: `hf auth login`, or the variable HF_TOKEN"


@dataclass(frozen=True)
class HubName:
    """A name on a hub, taken apart.

    Fields:
        repository: owner and name.
        revision: a branch, tag or commit.
        file: a GGUF file of the repository, or None.
    """

    repository: str
    revision: str
    file: str | None


def hub_name(name: str, revision: str | None = None) -> HubName | None:
    """`name` taken apart, or None if it has not the form of a hub's; `revision` where the name itself says none."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    if revision and match["revision"] not in (None, revision):
        raise InputError("revision", f"{revision!r}, and {match['revision']!r} in {name}", "one of the two")
    return HubName(match["repository"], match["revision"] or revision or "main", match["file"])


def fetch(name: HubName) -> Path:
    """The folder of a model, or its GGUF file, in the hub's cache: fetched where it is not there in this revision.

    Where the hub cannot be reached, or HF_HUB_OFFLINE is set, the copy in the cache is taken. An `InputError` says what
    the hub refuses, and what it takes to get it.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    print(f"{name.repository} is not a local path: fetching it from the Hugging Face hub", file=sys.stderr)
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=timeout)
    except _errors() as error:
        if not _unreachable(error):
            raise _explained(error, name) from error
        return _cached(name, error)
    if info.sha is None:
        raise InputError("model", f"{name.repository}: the hub names no commit", "a hub that does (see HF_ENDPOINT)")

    def get(file: str) -> Path:
        try:
            return Path(hf_hub_download(name.repository, file, revision=info.sha, etag_timeout=timeout))
        except _errors() as error:
            raise _explained(error, name) from error

    model = _fetch_files(name, {sibling.rfilename for sibling in info.siblings or ()}, get)
    _note(name.revision, info.sha, model)
    return model


def _fetch_files(name: HubName, names: set[str], get: Callable[[str], Path]) -> Path:
    """Gets what is needed of the file `names`, weights last; the folder or the GGUF file."""
    file = _gguf_file(name, names)
    if file is not None:
        paths = [get(part) for part in _parts(name, file, names)]
        return paths[0]
    top = {file for file in names if "/" not in file}
    main = weight_file(top, name.repository)
    small = [file for file in top if any(fnmatchcase(file, pattern) for pattern in SMALL)]
    small += [file for file in names if fnmatchcase(file, TEMPLATES)]
    if not {"config.json", "tinycompress.json"} & top:
        raise InputError("model", f"{name.repository}, which has no config.json", "a repository of transformers' form")
    fetched = {file: get(file) for file in sorted(small)}
    folder = fetched["config.json" if "config.json" in fetched else "tinycompress.json"].parent
    refuse_adapter(folder, top)
    for file in shards_of(folder, main) if main.endswith(INDEX_ENDING) else [main]:
        if file not in names:
            raise InputError(main, f"{file}, which {name.repository} does not have", "shards of the repository")
        get(file)
    return folder


def _gguf_file(name: HubName, names: set[str]) -> str | None:
    """The GGUF file that is meant, its first part if it is split; None where a repository has safetensors."""
    if name.file is None and any(file.endswith(".safetensors") for file in names):
        return None
    choices = sorted(file for file in names if file.endswith(".gguf") and not _is_later(file))
    if not choices and name.file is None:
        return None
    wanted = [file for file in choices if name.file in (None, file)]
    if len(wanted) != 1:
        listed = ", ".join(choices) or "none"
        accepted = f"{name.repository}:FILE with one of them"
        raise InputError("model", f"{name.file or name.repository}; GGUF files there: {listed}", accepted)
    return wanted[0]


def _is_later(file: str) -> bool:
    return LATER_PART.fullmatch(file) is not None and FIRST_PART.fullmatch(file) is None


def _parts(name: HubName, file: str, names: set[str]) -> Iterator[str]:
    """A GGUF file, or all parts of one that is split."""
    match = FIRST_PART.fullmatch(file)
    parts = int(match["parts"]) if match else 1
    for i in range(1, parts + 1):
        part = f"{match['stem']}-{i:05d}-of-{parts:05d}.gguf" if match else file
        if part not in names:
            raise InputError("model", f"no {part} in {name.repository}", "a repository with every part of the file")
        yield part


def _note(revision: str, commit: str, model: Path) -> None:
    """Lets the cache's `revision` point to the commit, as the library does."""
    home = next(folder for folder in model.parents if folder.name == "snapshots").parent
    reference = files.inside(home / "refs", revision)
    if revision != commit and (not reference.is_file() or reference.read_text(encoding="utf-8") != commit):
        files.write_text(reference, commit)


def _cached(name: HubName, error: Exception) -> Path:
    """The copy in the cache; `error` is why the hub was not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    except _errors():
        found = f"{name.repository!r}: no such local path, and the hub said: {_line(error)}"
        raise InputError("model", found, "a connection to the hub, or a model that its cache holds") from error
    if not isinstance(error, OfflineModeIsEnabled):
        print(f"the hub cannot be reached ({_line(error)}): the copy in the cache is taken", file=sys.stderr)
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists()}
    file = _gguf_file(name, held)
    if file is None:
        return folder
    paths = [folder / part for part in _parts(name, file, held)]
    return paths[0]


def _errors() -> tuple[type[Exception], ...]:
    """What the library raises. Its own errors and those of requests, of its versions 0.x, are OSError or ValueError,
    its download in chunks has RuntimeError; versions 1.x use httpx."""
    try:
        import httpx
    except ImportError:
        return OSError, ValueError, RuntimeError
    return OSError, ValueError, RuntimeError, httpx.HTTPError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__


def _unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer, or none of its own."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _explained(error: Exception, name: HubName) -> InputError:
    """What the hub refused, in one line with the remedy."""
    from huggingface_hub import constants, errors

    repository = name.repository
    remedies: dict[type[BaseException], tuple[str, str]] = {  # the first that fits, so that the special come first
        errors.GatedRepoError: (
            f"{repository}, which is gated",
            f"a user who has been granted access: accept its terms at {constants.ENDPOINT}/{repository}, then {LOG_IN}",
        ),
        errors.RepositoryNotFoundError: (
            f"{repository!r}: no such local path, and no such repository that the hub shows you",
            f"the name of a repository; for a private one {LOG_IN}",
        ),
        errors.RevisionNotFoundError: (
            f"{repository}, which has no revision {name.revision!r}",
            "a branch, a tag or a commit",
        ),
    }
    for cause in _chain(error):
        for kind, (found, accepted) in remedies.items():
            if isinstance(cause, kind):
                return InputError("model", found, accepted)
        response = getattr(cause, "response", None)
        if response is not None and response.status_code in (401, 403):
            return InputError(
                "model", f"{repository}, and the hub refused: {_line(cause)}", f"a user who may: {LOG_IN}"
            )
    found = f"{repository}, which could not be fetched: {_line(error)}"
    return InputError("model", found, "a connection that holds (the next try goes on where this one stopped)")


def _line(error: BaseException) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split())[:300]

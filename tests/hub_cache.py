"""A folder as the cache of a hub holds it: links in snapshots/<commit> to files in blobs/ that are named by hash."""

import hashlib
import os
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"  # forty hexadecimal digits


def as_hub_cache(folder: Path, cache: Path, repository: str = "org/model") -> Path:
    """The snapshot of the files in `folder`: every one a relative link, as huggingface_hub makes them."""
    home = cache / ("models--" + repository.replace("/", "--"))
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / COMMIT
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot

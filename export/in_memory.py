"""A model that is changed in memory and given to ONNX Runtime as bytes, its weights still in their files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinycompress.files import inside

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


def in_memory(proto: Any, folder: Path, options: Any) -> bytes:
    """The bytes of a model whose external data lies in `folder`; `options` of the session get the place of that data.

    Of a model given as bytes the runtime refuses data that a link leads out of the folder, and a hub's cache is made of
    such links (of a file it follows them). So the option names the folder that the data itself lies in, and the model
    the names there. `proto` is changed.
    """
    locations = [
        entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    ]
    files = {entry.value: inside(folder, entry.value).resolve() for entry in locations}
    folders = [file.parent for file in files.values()] or [folder.resolve()]
    root = Path(os.path.commonpath(folders))
    for entry in locations:
        entry.value = files[entry.value].relative_to(root).as_posix()
    options.add_session_config_entry(FOLDER_OPTION, str(root))
    return proto.SerializeToString()

"""Export: a Graph to a folder that a runtime opens, read back and verified. The runtimes are imported when used."""

from tinycompress.export.emit import emit, prepare
from tinycompress.export.profiles import ORT, PROFILES, Profile
from tinycompress.export.read import read
from tinycompress.export.session import OrtCache, OrtModel
from tinycompress.export.verify import GateError, summary, verify
from tinycompress.export.write import export

__all__ = ["ORT", "PROFILES", "GateError", "OrtCache", "OrtModel", "Profile", "emit", "export", "prepare", "read", "summary", "verify"]

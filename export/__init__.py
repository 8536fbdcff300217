"""Export: a Graph to a folder that a runtime opens, read back and verified. The runtimes are imported when used."""

from tinycompress.export.emit import emit, prepare
from tinycompress.export.kv_cache import cache_scales
from tinycompress.export.profiles import ORT, PROFILES, Profile
from tinycompress.export.read import kv_scales, read
from tinycompress.export.reference import write_reference
from tinycompress.export.runtime import run_check
from tinycompress.export.session import OrtCache, OrtModel
from tinycompress.export.static_forms import check_static
from tinycompress.export.static_model import StaticModel
from tinycompress.export.static_write import StaticChoices
from tinycompress.export.verify import GateError, summary, verify
from tinycompress.export.write import export

__all__ = [
    "ORT",
    "PROFILES",
    "GateError",
    "OrtCache",
    "OrtModel",
    "Profile",
    "StaticChoices",
    "StaticModel",
    "cache_scales",
    "check_static",
    "emit",
    "export",
    "kv_scales",
    "prepare",
    "read",
    "run_check",
    "summary",
    "verify",
    "write_reference",
]

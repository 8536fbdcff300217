"""Export: a Graph to a folder that a runtime opens, read back and verified. The runtimes are imported when used."""

from .dynamic.emit import emit, prepare
from .dynamic.kv_cache import cache_scales
from .dynamic.session import OrtCache, OrtModel
from .gate.reference import write_reference
from .gate.runtime import run_check
from .gate.verify import GateError, summary, verify
from .profiles import ORT, PROFILES, Profile
from .read import kv_scales, read
from .static.forms import check_static
from .static.model import StaticModel
from .static.write import StaticChoices
from .write import export

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

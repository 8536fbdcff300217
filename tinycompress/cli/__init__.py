"""The `tinycompress` command."""

from .main import main as main

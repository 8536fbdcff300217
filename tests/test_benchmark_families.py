"""The check behind the table of docs/models.md works, packed formats of a family included."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from families import FAMILIES, check, table


@pytest.mark.parametrize("family", ["qwen3"])
def test_a_family_is_checked(family, tmp_path):
    pytest.importorskip("transformers")
    row = check(family, tmp_path, None)
    assert row["greedy"] == 64
    assert row["packed"] == ["gptq", "awq", "compressed-tensors"]
    assert max(row["reads"], row["writes"], row["exported"], row["gguf"]["read back"]) < 1e-4
    assert f"`{family}`" in table({family: row}) and family in FAMILIES

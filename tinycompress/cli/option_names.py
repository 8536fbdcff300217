"""Errors of the library name fields of passes; whoever types a command knows options: one in the other's words."""

from __future__ import annotations

import re

from ..errors import InputError

OPTIONS = {  # fields of the library, as its errors spell them, by the option that sets them
    "overwrite=True": "--overwrite",
    "Prune.target": "--prune",
    "Prune.keep": "--prune",
    "Prune.axes": "--prune",
    "ScaleRope.context": "--context",
    "ScaleRope.method": "--rope-method",
    "ChooseRope.tokens": "--calibration",
    "QuantizeEmbedding.spec": "--quantize-embedding",
    "Distill.teacher_context": "--teacher-context",
    "Distill.teacher": "--teacher",
    "Distill.losses": "--loss",
    "Distill.hidden": "--hidden",
    "Distill.fake_quant": "--fake-quant",
    "Distill.grid": "--grid",
    "Distill.scales": "--scales",
    "Distill.stable_embedding": "--stable-embedding",
    "Distill.on_policy": "--on-policy",
    "Loss.kind": "--loss",
    "Loss.weight": "--loss",
    "Loss.temperature": "--temperature",
    "HiddenLoss.kind": "--hidden",
    "HiddenLoss.weight": "--hidden",
    "HiddenLoss.heads": "--relation-heads",
    "LoRA.rank": "--lora",
    "max_new_tokens": "--max-new-tokens",
}
SAME_NAME = re.compile(r"\b(?:Training|Options|Data)\.([a-z_]+)")  # their fields have the names of their options
FIELDS = re.compile("|".join(rf"\b{re.escape(field)}(?![\w=])" for field in sorted(OPTIONS, key=len, reverse=True)))


def in_options(error: Exception) -> str:
    """The text of an error of the library, its fields as options of the command line."""
    text = str(error)
    if not isinstance(error, InputError) or hasattr(error, "mistakes"):  # a recipe has the words of the library
        return text
    text = FIELDS.sub(lambda match: OPTIONS[match[0]], text)
    return SAME_NAME.sub(lambda match: "--" + match[1].replace("_", "-"), text)

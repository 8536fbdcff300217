"""Values as people type them: other cases and other tools' words, sizes and shares, to the library's own form.

What was changed beyond its case is said in a note. What is not known is handed on as it is: the library refuses it,
and says what it accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import InputError
from .terminal import note

GROUP = 64  # of grids that are named by their bits alone
BITS = re.compile(r"(?:u?int|q|nf|fp|)-?_?(\d)(?:[-_ ]?bits?)?(?:[-_ ]?g(\d+)|-(\d+)g)?")
COUNTS = {"": 1, "k": 1000, "m": 10**6, "b": 10**9}
POSITIONS = {"": 1, "k": 1024, "m": 1 << 20}
BYTES = {"k": 10**3, "m": 10**6, "g": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
PROFILES = {  # what people call a runtime or a device: the profile that is for it
    "onnx onnxruntime onnxruntime-genai genai ort-genai optimum cpu desktop server": "ort",
    "android ios mobile phone ort-mobile raspberry raspberry-pi": "ort",
    "browser webgpu wasm javascript js transformers.js transformersjs onnxruntime-web": "web",
    "standard plain": "std",
    "openvino intel intel-npu npuw": "openvino-npu",
    "qualcomm snapdragon hexagon htp": "qnn",
    "rknn rockchip rk3588": "static",
}
ABOUT_PROFILES = {
    "ort": "ONNX Runtime; on phones add --mobile for model.ort, and take qnn for Qualcomm's NPU",
    "openvino-npu": "profile std is for OpenVINO on CPUs and GPUs",
    "static": "fixed shapes",
}
NO_PROFILE = {
    "gguf llama.cpp llamacpp ollama lmstudio": "compress --format gguf -o OUT.gguf",
    "vllm sglang": "compress --format compressed-tensors",
    "npu": "a profile for one: openvino-npu (Intel), qnn (Qualcomm) or static (RKNN and others)",
}


def grid_of(option: str, text: str | None) -> str | None:
    """A grid in the library's words: `W4G32` is w4g32, `int4` and `4bit` are w4g64."""
    if text is None:
        return None
    word = filled(option, text).lower().replace("_", "-")
    match = BITS.fullmatch(word)
    if match is None or word.startswith(("nf", "fp")):
        return word if word.startswith("w") else text
    grid = f"w{match[1]}g{match[2] or match[3] or GROUP}"
    note(f"{option} {text} is {grid} here: {match[1]} bits in groups of {match[2] or match[3] or GROUP}")
    return grid


def number_of(option: str, text: str | None, units: dict[str, int], at_least: int = 1) -> int | None:
    """A whole number, with a unit behind it or without: `4k`, `8K`, `16,384`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", filled(option, text).lower().replace(",", "").replace("_", ""))
    value = float(match[1]) * units[match[2]] if match and match[2] in units else 0.5
    if value != int(value) or value < at_least:
        accepted = f"a whole number of at least {at_least}, such as 8192 or 8k"
        raise InputError(option, repr(text), accepted)
    return int(value)


def positions_of(option: str, text: str | None, at_least: int = 2) -> int | None:
    """Positions or tokens of a window: `4k` is 4096."""
    return number_of(option, text, POSITIONS, at_least)


def share_of(option: str, text: str) -> float:
    """A number, or a share in percent: `3%` is 0.03."""
    word = filled(option, text)
    try:
        return float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        raise InputError(option, repr(text), "a number such as 0.03, or 3%") from None


def budget_of(option: str, text: str | None) -> str | None:
    """A budget of --prune: `80%` is params=0.8, `ffn=75%` is ffn=0.75, `bytes=300 MiB` are so many bytes."""
    if text is None:
        return None
    word = filled(option, text).lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?%|0?\.\d+", word):
        note(f"{option} {text} is params={share_of(option, word):g} here: the share of the parameters that is kept")
        word = f"params={word}"
    key, equals, rest = word.partition("=")
    amount, *axes = rest.split(",")
    if re.fullmatch(r"\d+(\.\d+)?%", amount):
        amount = repr(share_of(option, amount))
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg](?:ib)?)", amount)
    if key == "bytes" and size:
        amount = str(round(float(size[1]) * BYTES[size[2]]))
    return ",".join([f"{key}{equals}{amount}", *axes])


def word_of(option: str, text: str, names: Iterable[str]) -> str:
    """The one of `names` that a text is but for case, hyphens and underscores; else the text."""
    same = {_plain(name): name for name in names}
    return same.get(_plain(filled(option, text)), text)


def profile_of(option: str, text: str | None) -> str | None:
    """The profile of an export for what people call its runtime or its device: `android` is ort."""
    if text is None:
        return None
    word = filled(option, text).lower().replace("_", "-")
    for words, remedy in NO_PROFILE.items():
        if word in words.split():
            raise InputError(option, repr(text), remedy)
    for words, profile in PROFILES.items():
        if word in words.split():
            about = f" ({ABOUT_PROFILES[profile]})" if profile in ABOUT_PROFILES else ""
            note(f"{option} {text} is profile {profile} here{about}")
            return profile
    return word


def refuse_alone(option: str, value: object, partner: str, given: object) -> None:
    """An `InputError` for an option that says nothing without its partner."""
    if value is not None and given is None:
        raise InputError(option, f"without {partner}", f"both, for {option} says how {partner} is done")


def filled(option: str, text: str) -> str:
    """The text without blanks around it; an `InputError` for one that is empty."""
    if not text.strip():
        raise InputError(option, "an empty value", "a value, or leave the option out")
    return text.strip()


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")

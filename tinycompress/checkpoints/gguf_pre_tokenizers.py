"""How text is cut into words before byte-level BPE merges inside them: `tokenizer.ggml.pre` of a GGUF file.

llama.cpp knows each way by a name (src/llama-vocab.cpp), or by several, for a model's authors chose theirs. A way is a
list of patterns: each cuts the pieces that the one before has left, into its matches and what lies between them. The
patterns here are those of the models' tokenizer.json, which llama.cpp spells out where its own engine cannot run them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
DIGIT = r"\p{N}"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_BLANKS}"
SEED_CODER = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
MINICPM = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_SYMBOLS}|{_BLANKS}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_CASED = (  # letters that have a case, as DeepSeek lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_IDEOGRAPHS = "[一-龥ࠀ-一가-\ud7ff]+"
DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _IDEOGRAPHS, r"\p{N}+")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, DIGIT)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Way:
    """One way of cutting.

    Fields:
        patterns: in order.
        names: llama.cpp's; the first is the one that is written.
        add_bos: whether a text begins with the token BOS where the file does not say.
        whole_words: whether a word that is a token is taken whole, before any merge.
    """

    patterns: tuple[str, ...]
    names: tuple[str, ...]
    add_bos: bool = False
    whole_words: bool = False


_LLAMA3_NAMES = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
_GPT2_NAMES = """
gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum modern-bert exaone4 jina-es jina-de
jina-v2-es jina-v2-de
"""
WAYS = (
    Way((LLAMA3,), tuple(_LLAMA3_NAMES.split()), add_bos=True, whole_words=True),
    Way((LLAMA3,), ("smaug-bpe", "dbrx")),
    Way((QWEN2,), ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open")),
    Way((TEKKEN,), ("tekken",), add_bos=True, whole_words=True),
    Way((DIGIT, GPT2), ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    Way((GPT2,), tuple(_GPT2_NAMES.split())),
    Way((SEED_CODER,), ("seed-coder",)),
    Way((r"\p{N}{1,3}", MINICPM), ("minicpm5",), whole_words=True),
    Way(DEEPSEEK_LLM, ("deepseek-llm",)),
    Way(DEEPSEEK_CODER, ("deepseek-coder",)),
    Way(DEEPSEEK_V3, ("deepseek-v3",)),
    Way(DEFAULT, ("default",)),
)
BY_NAME: Mapping[str, Way] = {name: way for way in WAYS for name in way.names}
MARKS: Mapping[str, tuple[int, str]] = {  # a token by whose id a vocabulary is known
    "llama-bpe": (128000, "<|begin_of_text|>"),
    "qwen2": (151643, "<|endoftext|>"),
    "gpt-2": (50256, "<|endoftext|>"),
    "smollm": (3, "<repo_name>"),
    "tekken": (3, "[INST]"),
    "deepseek-llm": (100000, "<｜begin▁of▁sentence｜>"),
    "deepseek-coder": (32013, "<｜begin▁of▁sentence｜>"),
    "deepseek-v3": (0, "<｜begin▁of▁sentence｜>"),
}


def way_of(name: Any, tokens: Sequence[str], where: str) -> Way:
    """The way that a file names; where it names none, the one by which its vocabulary is known, or llama.cpp's default
    with a warning."""
    if name is None:
        known = [way for way, (index, token) in MARKS.items() if index < len(tokens) and tokens[index] == token]
        if not known:
            guess = "text is cut as llama.cpp then does, by 'default', and may get other tokens than the model knows"
            warnings.warn(f"{where}: no tokenizer.ggml.pre, and a vocabulary that is not known: {guess}", stacklevel=2)
        return BY_NAME[known[0] if known else "default"]
    if not isinstance(name, str) or name not in BY_NAME:
        raise InputError(f"tokenizer.ggml.pre in {where}", repr(name), " | ".join(BY_NAME))
    return BY_NAME[name]


def steps_of(way: Way, prefix: bool) -> pre_tokenizers.PreTokenizer:
    """The way in Hugging Face's terms; `prefix`: whether a space is put before the text."""
    from tokenizers import Regex, pre_tokenizers

    last = way.patterns[-1] == GPT2
    steps: list[Any] = []
    for pattern in way.patterns[: -1 if last else None]:
        if pattern == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=last))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def name_of(pre_tokenizer: Mapping[str, Any] | None, whole_words: bool) -> str:
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json; an `InputError` where it has none."""
    steps: list[Any] = [] if pre_tokenizer is None else list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    ways = [way for way in WAYS if way.patterns == patterns]
    if steps and steps[-1]["type"] == "ByteLevel" and ways:
        return next((way for way in ways if way.whole_words == whole_words), ways[0]).names[0]
    kinds = [step["type"] for step in steps]
    names = " | ".join(way.names[0] for way in WAYS)
    raise InputError("tokenizer for GGUF", f"text split by {kinds or 'nothing'}", names)


def _patterns(step: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The patterns of one step; None stands for what no pattern here says."""
    if step["type"] == "ByteLevel":
        return (GPT2,) if step.get("use_regex", True) else ()
    if step["type"] == "Digits":
        return (DIGIT if step.get("individual_digits") else None,)
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (step["pattern"].get("Regex"),)
    return (None,)

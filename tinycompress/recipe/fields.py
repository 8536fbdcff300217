"""The keys of every table of a recipe, and what each takes: enough to check names and kinds of values without torch.

The classes of the passes say the same; a test holds the two together (tests/recipe/test_fields.py). A field takes a
tuple of kinds, any of which will do: `int`, `float`, `bool`, `str`, or one of the kinds below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of value that needs more than its type to be read.

    Fields:
        name: of the kind.
        accepted: how a message describes it.
    """

    name: str
    accepted: str


@dataclass(frozen=True)
class Table:
    """A table whose keys are the fields of a dataclass.

    Fields:
        name: of the class, which is a key of `FIELDS`.
    """

    name: str


@dataclass(frozen=True)
class Listed:
    """An array of any length.

    Fields:
        item: the kinds of each value.
    """

    item: Kinds


@dataclass(frozen=True)
class Fixed:
    """An array of so many values.

    Fields:
        items: the kinds of each of them.
    """

    items: tuple[Kinds, ...]


@dataclass(frozen=True)
class Mapped:
    """A table of any keys.

    Fields:
        item: the kinds of each value.
    """

    item: Kinds


Kinds = tuple["type | Kind | Table | Listed | Fixed | Mapped", ...]

WINDOWS = Kind("windows", "a text, or a table such as { samples = 8, seq_len = 512 }")
MODEL = Kind("model", '"model" (the one that the recipe starts from), or the name of another')
GRID = Kind("grid", 'a grid such as "w4g64"')
QUANTIZER = Kind("quantizer", 'a pass without its spec, such as { name = "GPTQ" }')
GRIDS: Kinds = (str, GRID, Mapped((str, GRID)))  # one for all linears, or one for each
ANY_TEXT: dict[str, Kinds] = {"tokens": (WINDOWS,)}
DEVICE: dict[str, Kinds] = {"device": (str,)}

PASSES: dict[str, Mapping[str, Kinds]] = {
    "AWQ": ANY_TEXT | {"spec": GRIDS, "quantize": (bool,), "gqa": (bool,), "clip": (bool,)} | DEVICE,
    "GPTQ": ANY_TEXT
    | {
        "spec": GRIDS,
        "order": (str,),
        "damping": (float,),
        "propagate": (float,),
        "correction": (str,),
        "stream": (bool,),
        "refine": (int,),
        "balance": (bool,),
        "tuning": (Table("BlockTuning"),),
        "head": (bool,),
    }
    | DEVICE,
    "HQQ": {"spec": GRIDS, "head": (bool,)} | DEVICE,
    "RTN": {"spec": GRIDS, "head": (bool,)} | DEVICE,
    "AutoRound": ANY_TEXT | {"reference": (MODEL,), "tuning": (Table("BlockTuning"),)} | DEVICE,
    "ChooseRope": ANY_TEXT | {"methods": (Listed((str,)),)} | DEVICE,
    "Distill": ANY_TEXT
    | {
        "teacher": (MODEL,),
        "training": (Table("Training"),),
        "losses": (Listed((Table("Loss"),)),),
        "hidden": (Listed((Table("HiddenLoss"),)),),
        "held_out": (Listed((str,)),),
        "lora": (Table("LoRA"),),
        "fake_quant": (GRID, Mapped((GRID,))),
        "grid": (str,),
        "scales": (bool,),
        "stable_embedding": (bool,),
        "on_policy": (float,),
        "teacher_context": (int,),
        "trainable": (Listed((str,)),),
    }
    | DEVICE,
    "Drop": ANY_TEXT | {"count": (int,), "parts": (str,)} | DEVICE,
    "LongRope": ANY_TEXT
    | {
        "population": (int,),
        "generations": (int,),
        "short": (str,),
        "attention_factor": (float,),
        "seed": (int,),
    }
    | DEVICE,
    "MixedBits": ANY_TEXT
    | {
        "quantizer": (QUANTIZER,),
        "bytes": (int,),
        "bits": (float,),
        "choices": (Listed((str, GRID)),),
        "seed": (int,),
    }
    | DEVICE,
    "Prune": ANY_TEXT
    | {
        "target": (str,),
        "keep": (Mapped((float,)),),
        "axes": (Listed((str,)),),
        "criterion": (str,),
        "allocation": (str,),
        "refit": (bool, str),
        "multiple_of": (int,),
        "floors": (Mapped((float,)),),
        "sublayers": (bool,),
        "uneven_kv": (bool,),
        "layout": (str,),
        "stored": (Mapped((str,)),),
        "probe": (int,),
        "damping": (float,),
        "propagate": (float,),
        "gradients": (bool,),
        "one_shot": (bool,),
        "seed": (int,),
    }
    | DEVICE,
    "PruneFFN": ANY_TEXT
    | {"keep": (float, Listed((float,))), "multiple_of": (int,), "refit": (bool,), "damping": (float,)}
    | DEVICE,
    "QuantizeEmbedding": {"spec": (str, GRID), "head": (bool,), "head_spec": (str, GRID)} | DEVICE,
    "Rotate": {"kind": (str,), "residual": (bool,), "heads": (bool,), "seed": (int,)} | DEVICE,
    "ScaleRope": {"context": (int,), "method": (str,)} | DEVICE,
    "Slice": ANY_TEXT | {"hidden": (int,)} | DEVICE,
    "SmoothQuant": ANY_TEXT | {"alpha": (float,), "writers": (bool,)} | DEVICE,
}
FIELDS: dict[str, Mapping[str, Kinds]] = PASSES | {
    "Training": {
        "steps": (int,),
        "epochs": (float,),
        "tokens": (int,),
        "lr": (float,),
        "warmup": (float,),
        "floor": (float,),
        "weight_decay": (float,),
        "clip": (float,),
        "betas": (Fixed(((float,), (float,))),),
        "batch": (int,),
        "micro_batch": (int,),
        "seed": (int,),
        "precision": (str,),
        "checkpointing": (bool,),
        "eval_every": (int,),
        "save_every": (int,),
        "patience": (int,),
    },
    "LoRA": {"rank": (int,), "alpha": (float,), "targets": (Listed((str,)),)},
    "Loss": {
        "kind": (str,),
        "weight": (float, Table("Ramp")),
        "temperature": (float,),
        "beta": (float,),
        "alpha": (float,),
    },
    "HiddenLoss": {
        "kind": (str,),
        "weight": (float, Table("Ramp")),
        "layers": (Listed((Fixed(((int,), (int,))),)),),
        "last": (int,),
        "heads": (int,),
    },
    "Ramp": {"start": (float,), "end": (float,), "shape": (str,), "begin": (float,), "finish": (float,)},
    "BlockTuning": {
        "steps": (int,),
        "batch": (int,),
        "rate": (float,),
        "scale_rate": (float,),
        "norms": (bool,),
        "propagate": (float,),
        "seed": (int,),
    },
    "Data": {
        "text": (str,),
        "samples": (int,),
        "seq_len": (int,),
        "seed": (int,),
        "split": (str,),
        "in_order": (bool,),
    },
    "Export": {
        "profile": (str,),
        "dtype": (str,),
        "scales": (str,),
        "accuracy_level": (int,),
        "kv": (str,),
        "mobile": (bool,),
        "check": (bool,),
        "context": (int,),
        "calibration": (str,),
        "ranges": (str,),
        "attention_bits": (int,),
        "rotate": (bool,),
        "epcontext": (str,),
    },
}
REQUIRED = {  # keys without a default; windows and a teacher are seen to otherwise
    "AutoRound": ("reference",),
    "Distill": ("training",),
    "Drop": ("count",),
    "MixedBits": ("quantizer",),
    "Ramp": ("start", "end"),
    "ScaleRope": ("context",),
    "Slice": ("hidden",),
}
# fields that hold functions, or say where a run keeps its files and not what it makes
ONLY_IN_PYTHON = ("work", "log", "stop", "journal", "token_weights", "rounding", "progress")

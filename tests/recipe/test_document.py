"""Recipes as text: what is wrong is told all at once, by line, with the right name; what is written reads back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random

import pytest

from tinycompress.errors import InputError
from tinycompress.recipe import Recipe, read_recipe
from tinycompress.recipe.document import lines_of, override, parse_document, to_toml
from tinycompress.recipe.mistakes import RecipeError

GPTQ = '[[pass]]\nname = "GPTQ"\nspec = "w4g64"\n'


def told(text: str, *settings: str) -> list[str]:
    """The mistakes of a recipe, one line each."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(*override(*_swapped(text, settings)))
    return [f"{where}: found {found}; accepted: {accepted}" for where, found, accepted in caught.value.mistakes]


def _swapped(text: str, settings: tuple[str, ...]):
    document, source = parse_document(text, "r.toml")
    return document, settings, source


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ('[[pass]]\nname = "GPTQ"\nspce = "w4g64"\n', 3, "'spce', which GPTQ does not have; accepted: spec"),
        ('[[pass]]\nname = "gtpq"\n', 2, "'gtpq', no pass; accepted: GPTQ"),
        ('modle = "x"\n', 1, "'modle', which a recipe does not have; accepted: model"),
        ("[dta]\nsamples = 8\n", 1, "'dta', which a recipe does not have; accepted: data"),
        ("[data]\nsample = 8\n", 2, "'sample', which [data] does not have; accepted: samples"),
        ("[data]\nsamples = 0\n", 2, "Data.samples 0; accepted: a number of windows"),
        ('[data]\nsamples = "8"\n', 2, "'8'; accepted: a whole number"),
        ('[pass]\nname = "RTN"\n', 1, "[pass], one table; accepted: [[pass]]"),
        ('[[pass]]\nspec = "w4"\n', 1, 'a pass without a name; accepted: name = "…"'),
        ('[[pass]]\nname = "RTN"\nspec = "int4"\n', 3, "accepted: w<bits>"),
        ('[[pass]]\nname = "RTN"\nspec = 4\n', 3, 'found 4; accepted: text in quotes or a grid such as "w4g64"'),
        ('[[pass]]\nname = "RTN"\nspec = { grid = "w4", serach = "mse" }\n', 3, "accepted: search"),
        ('[[pass]]\nname = "Drop"\n', 1, "Drop without count; accepted: count = …"),
        ('[[pass]]\nname = "AutoRound"\n', 1, "AutoRound without reference"),
        ('[[pass]]\nname = "ChooseRope"\n', 1, "tokens = { samples = 1, seq_len = 16384 }"),
        ('[[pass]]\nname = "Distill"\nteacher = "model"\ntraining = { step = 9 }\n', 4, "accepted: steps"),
        ('[[pass]]\nname = "Distill"\nteacher = "model"\n[pass.training]\nstep = 9\n', 5, "accepted: steps"),
        ('[[pass]]\nname = "Distill"\nlosses = "kl+x*ce"\ntraining = { steps = 9 }\n', 3, "kinds joined by +"),
        ('[[pass]]\nname = "Prune"\ntarget = "params=0.8"\nkeep = 3\n', 4, "found 3; accepted: a table"),
        ('[[pass]]\nname = "LongRope"\njournal = "x"\ntokens = { seq_len = 64 }\n', 3, "which belongs to a run"),
        ('[[pass]]\nname = "MixedBits"\nbits = 4\nquantizer = { name = "GPQT" }\n', 4, "accepted: GPTQ"),
        ('format = "gptqq"\n', 1, "accepted: gptq"),
        ('format = "awq"\n[export]\nprofile = "ort"\n', 1, "together with [export]"),
    ],
)
def test_a_mistake_is_one_line(text: str, line: int, found: str) -> None:
    (message,) = told(text)
    assert message.startswith(f"r.toml, line {line}: found ") and found in message


def test_all_mistakes_come_together_in_the_order_of_the_lines() -> None:
    text = (
        'modle = "x"\n[[pass]]\nname = "GPTQ"\nspce = "w4g64"\norder = "atc"\ndamping = 2\n[[pass]]\nname = "Slise"\n'
    )
    lines = [message.split(":")[0] for message in told(text)]
    assert lines == [f"r.toml, line {number}" for number in (1, 4, 5, 6, 8)]
    with pytest.raises(RecipeError, match=r"^r\.toml: 5 mistakes\n  r\.toml, line 1: "):
        Recipe.of(*parse_document(text, "r.toml"))


def test_what_depends_on_a_mistyped_key_is_not_a_mistake_too() -> None:
    assert len(told('[[pass]]\nname = "Prune"\ntargt = "params=0.8"\n')) == 1
    text = '[[pass]]\nname = "Prune"\ntargt = "params=0.8"\ncriterion = "x"\ndamping = 7\n'
    assert len(told(text)) == 3  # and what it is meant to be is there for the other checks


@pytest.mark.parametrize("text", ["model = ", "[[pass]\n", "a = 1\na = 2\n", "x = " + "[" * 4000, "\0", 'a = "\n'])
def test_what_is_no_toml(text: str) -> None:
    with pytest.raises(InputError, match=r"^r\.toml"):
        parse_document(text, "r.toml")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_text("#" * (1 << 21))
    for name, found in (("none", "no such file"), (".", "a folder"), ("bytes", "UTF-8"), ("long", "characters")):
        with pytest.raises(InputError, match=found):
            read_recipe(tmp_path / name)


def test_the_line_of_every_key() -> None:
    text = (
        'model = "m"\n\n[data]\nsamples = 1\n[[pass]]\nname = "A"\n[[pass]]\n"name" = "B"\nx.y = 1\n[pass.z]\nw = 2\n'
    )
    assert lines_of(text) == {
        ("model",): 1,
        ("data",): 3,
        ("data", "samples"): 4,
        ("pass", 0): 5,
        ("pass", 0, "name"): 6,
        ("pass", 1): 7,
        ("pass", 1, "name"): 8,
        ("pass", 1, "x"): 9,
        ("pass", 1, "x", "y"): 9,
        ("pass", 1, "z"): 10,
        ("pass", 1, "z", "w"): 11,
    }


def test_what_is_written_reads_back() -> None:
    document = {
        "model": 'a "quoted"\\ name\n\t\x7f ü 🙂',
        "measure": False,
        "data": {"samples": 3, "a b": 0.5},
        "pass": [{"name": "A", "x": {"y": [1, 2.0, {"z": "w"}], "model.layers.0": "w4"}}, {"n": [], "small": 1e-7}],
        "export": {},
    }
    assert tomllib.loads(to_toml(document)) == document


def test_settings_reach_what_they_name() -> None:
    text = GPTQ + GPTQ + '[[pass]]\nname = "Distill"\nteacher = "model"\ntraining = { steps = 1 }\n'
    settings = ("GPTQ.2.damping=0.05", "1.order=gar", "distill.training.lr=1e-3", "data.text=wikitext2", "model=m")
    out, source = override(*_swapped(text, settings))
    assert [step.get("damping") for step in out["pass"]] == [None, 0.05, None]
    assert out["pass"][0]["order"] == "gar" and out["pass"][2]["training"] == {"steps": 1, "lr": 1e-3}
    assert out["data"] == {"text": "wikitext2"} and out["model"] == "m"
    Recipe.of(out, source)
    assert "data" not in parse_document(text, "r.toml")[0]  # the document itself stays


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("GTPQ.damping=1", "found 'GTPQ'; accepted: GPTQ"),
        ("GPTQ.damping=0.1", "GPTQ, which is there 2 times; accepted: GPTQ.1.damping | GPTQ.2.damping"),
        ("GPTQ.3.damping=0.1", "GPTQ.3 of 2"),
        ("9.damping=0.1", "pass 9 of 2"),
        ("1.dampin=0.1", "'dampin', which GPTQ does not have; accepted: damping"),
        ("1.damping=7", "GPTQ.damping 7.0; accepted: a fraction"),
        ("1.damping=much", "found 'much'; accepted: a number"),
        ("1.spec.x.y=1", "a place inside a value that is no table"),
        ("damping", "accepted: pass.key=value"),
    ],
)
def test_a_mistaken_setting_is_named(setting: str, found: str) -> None:
    (message,) = told(GPTQ + GPTQ, setting)
    assert message.startswith(f"--set {setting}: found ") and found in message


def test_no_mutation_ends_in_anything_but_an_error_of_the_library() -> None:
    examples = [path.read_text() for path in sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.toml"))]
    random = Random(0)
    pieces = [
        "=",
        "[",
        "]",
        '"',
        "\n",
        "{",
        "}",
        ".",
        "-",
        "9" * 30,
        "nan",
        "true",
        "[[pass]]\n",
        "name",
        "\0",
        "é",
        "[]",
    ]
    checked = 0
    for _ in range(600):
        text = random.choice(examples)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(text))
            text = text[:at] + random.choice(pieces) + text[at + random.randint(0, 12) :]
        try:
            Recipe.of(*parse_document(text, "r.toml"))
        except InputError:
            checked += 1
    assert checked > 300

"""What `compress` and `distill` share: the recipe that a command names or its options make, run and written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import check_export, check_positions, open_model
from .terminal import print_json
from .writing import gate_lines, write_export

if TYPE_CHECKING:
    from ..files import Claim, Target
    from ..graph.graph import Graph
    from ..recipe.foretell import Foretold
    from ..recipe.recipe import Recipe
    from ..recipe.run import Made

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE", help="Do what this TOML file says, in place of the options of the passes."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.KEY=VALUE",
        help="Change one value of the recipe, such as GPTQ.damping=0.05, 2.seed=1 (the second pass) or data.samples=8; "
        "may be given several times.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the shapes behind every pass and what it will cost, roughly; write nothing."),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Measure perplexity before and after, for the model card.  [default: where passes read text]",
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="With --work: start again, without what is kept there of this very run.")
]
READ = ("model", "teacher", "of", "cache", "text", "held_out", "calibration")  # keys of a recipe that name places
ALONGSIDE = (
    "model",
    "student",
    "output",
    "work",
    "log",
    "fresh",
    "overwrite",
    "dry_run",
    "recipe",
    "settings",
    "invocation",
)
EVERYWHERE = ("as_json", "quiet", "verbose", "debug", "version")


def typed(invocation: typer.Context) -> str:
    """The command as it was typed."""
    return shlex.join(["tinycompress", *(invocation.find_root().obj or [])])


def file_recipe(invocation: typer.Context, file: Path, settings: Sequence[str], model: str | None) -> Recipe:
    """The recipe of --recipe; MODEL stands for the model that it names. Options of the passes are refused
    beside it."""
    from ..recipe.checking import check_names
    from ..recipe.document import override, read_document

    for name in invocation.params:
        source = invocation.get_parameter_source(name)
        if name not in (*ALONGSIDE, *EVERYWHERE) and source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise InputError(option, f"given together with --recipe {file}", "--set PASS.KEY=VALUE, to change a value")
    document, source_of = read_document(file)
    if model is not None:
        document["model"] = model
    changed = override(document, settings, source_of)
    check_names(*changed)  # before torch is imported
    from ..recipe.recipe import Recipe

    recipe = Recipe.of(*changed)
    if recipe.model is None:
        raise InputError(f"model in {file}", "none", 'a line such as model = "smollm2-135m", or MODEL in the command')
    return recipe


def option_recipe(document: dict[str, Any], settings: Sequence[str]) -> Recipe:
    """The recipe that options make, with --set upon it."""
    from ..recipe.document import Source, override
    from ..recipe.recipe import Recipe

    return Recipe.of(*override(document, settings, Source()))


def check_fresh(fresh: bool, work: Path | None) -> None:
    """An `InputError` for --fresh where nothing is kept."""
    if fresh and work is None:
        raise InputError("--fresh", "without --work", "--work FOLDER, whose steps it makes again")


def check(recipe: Recipe, graph: Graph) -> list[Foretold]:
    """What the passes will make of a graph; an `InputError` for what they, or the format to write, will refuse."""
    from ..checkpoints.format_check import check_plan
    from ..recipe.foretell import Foretold

    steps = recipe.foretell(graph)
    last = steps[-1].graph if steps else Foretold("", graph).graph
    check_positions(last.config, "--context")
    specs = {name: spec for step in steps for name, spec in step.specs.items()}
    if recipe.export is not None or recipe.format == "gguf":
        from ..checkpoints.vocabulary import check_vocabulary

        check_vocabulary(graph)
    if recipe.export is not None:
        check_export(last, specs, recipe.export.profile)
    if recipe.format not in ("native", "dense"):
        check_plan(recipe.format, last)
    return steps


def claim_output(
    output: Path | None, overwrite: bool, format: str, dry_run: bool, apart_from: Mapping[str, Target | None]
) -> Claim | None:
    """The claim on the output, apart from what is read and kept (see `files.claim`); None for a dry run."""
    from ..files import claim

    if dry_run:
        return None
    if output is None:
        raise InputError("--output", "none", "-o OUT, or --dry-run, which writes nothing")
    if format != "gguf":
        return claim(output, overwrite, apart_from)
    from ..checkpoints.gguf_writer import claim_gguf

    return claim_gguf(output, overwrite, apart_from)


def places_in(recipe: Recipe) -> dict[str, str]:
    """The models, texts and caches that a recipe reads, by what they are called there."""
    return dict(_places(recipe.document, ""))


def _places(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and key in READ:
        yield f"the recipe's {key} {value}", value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _places(inner, name)
    if isinstance(value, list):
        for inner in value:
            yield from _places(inner, key)


def run(recipe: Recipe, graph: Graph, work: Path | None, command: str, **options: Any) -> Made:
    """Runs a checked recipe. Errors of a file's recipe name the file, not options."""
    from ..recipe.mistakes import RecipeError
    from ..recipe.run import run_recipe

    try:
        return run_recipe(recipe, graph, work, open=open_model, command=command, **options)
    except RecipeError:
        raise
    except InputError as error:
        if not recipe.source.name:
            raise _with_remedy(error, recipe) from None
        found = f"{error.field} {error.found}"
        raise RecipeError(recipe.source.name, [(recipe.source.name, found, error.accepted)]) from error


def _with_remedy(error: InputError, recipe: Recipe) -> InputError:
    """The error; where a text is too short to measure a long context on, with the option that needs none."""
    chooses = any(step["name"] == "ChooseRope" for step in recipe.document.get("pass", []))
    if not (chooses and error.field.startswith("tokens in ")):
        return error
    accepted = f"{error.accepted}; or name a --rope-method, which needs no text"
    return InputError(error.field, error.found, accepted)


def write(made: Made, recipe: Recipe, output: Claim, as_json: bool = False, **more: Any) -> None:
    """Saves or exports what was made, with how it was made, and prints it against what was there before.

    more: what else the JSON says.
    """
    from ..checkpoints.checkpoint import save
    from ..evaluation import report
    from ..provenance import beside

    manifest = None
    if recipe.export is not None:
        manifest = write_export(made.graph, output, recipe.export, made.provenance)
    else:
        dense = recipe.format == "dense"
        layout = "native" if dense else recipe.format
        texts = beside(made.provenance, made.graph)
        save(made.graph, output, dense=dense, format=layout, beside=texts)
    written = report.folder_bytes(output.path)
    measured = made.provenance["measured"]
    if as_json:
        result = {
            "output": str(output.path),
            "bytes": written,
            "before": _figures(made.before),
            "after": _figures(made.graph),
            "history": list(made.graph.history),
            "measured": measured,
            "checks": manifest and manifest["checks"],
        }
        return print_json(result | more)
    report.print_comparison(made.before, made.graph, written)
    if manifest is not None:
        print("\n".join(gate_lines(manifest)))
    if measured:
        values = measured["perplexity"]
        print(f"perplexity on {measured['text']}: {values['before']:.3f} → {values['after']:.3f}")


def _figures(graph: Graph) -> dict[str, int]:
    config = graph.config
    sizes = {"parameters": config.n_params, "non_embedding_parameters": config.n_body_params}
    return sizes | {"bytes": graph.nbytes, "context": config.max_position}

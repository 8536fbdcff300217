"""`tinycompress clean`: remove what a work folder no longer needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

A_WORK: Any = typer.Argument(metavar="WORK", help="The folder of an earlier --work.")


def clean(
    work: Annotated[Path, A_WORK],
    steps: Annotated[
        bool, typer.Option("--steps", help="Remove every step, those of the last run and unfinished ones included.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove training states and measured perplexities too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove from a work folder the steps that its last run would not read. Only what tinycompress wrote is touched.

    \b
    Examples:
      tinycompress clean run --dry-run
      tinycompress clean run --all
    """
    from ..files import human
    from ..work_folder import clean as remove
    from ..work_folder import to_clean

    if steps and everything:
        raise InputError("--steps", "given together with --all", "one of the two (--all removes steps too)")
    going = to_clean(work, steps, everything)
    for part in going:
        print(f"{human(part.bytes):>10}  {part.kind}  {part.path}")
    print(f"{'would free' if dry_run else 'freed'} {human(sum(part.bytes for part in going))}")
    if not dry_run:
        remove(work, going)

"""``cfvit demo``: the newcomer's first command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(help="folder for the pictures")] = Path("demo"),
    epochs: Annotated[int | None, Parameter(validator=Number(gte=1), help="shorter or longer training")] = None,
) -> None:
    """Train on handwritten digits, compare with the plain ViT, classify two photos: some minutes on a CPU."""
    from cfvit.cli.digits_demo import run_demo

    run_demo(out, epochs)

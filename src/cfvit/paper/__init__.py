"""The paper's tables and figures. This file is read without torch, for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """How studies are made: by runs that are trained, or of networks that are there.

    Attributes:
        model: train nothing: a saved folder, .pth or bundled name; for fig1a and fig1b also a timm ViT
        runs: for table3, fig5 or all: train nothing, set the runs in this folder, of any methods, side by side
        plain: for table2 of a model, or with --runs: the plain ViT to compare with, a file of weights or a timm ViT
        calibration_data: with --plain: images that eta is chosen on; --data is only scored
        part: with --plain: files that name a class on each line, for rows of the classes of each
        out: folder for tables, pictures and runs
        speed: whether table2, or --runs, measures images per second
    """

    model: str | None = None
    runs: Path | None = None
    plain: str | None = None
    calibration_data: str | None = None
    part: tuple[Path, ...] = ()
    out: Path = Path("reproduction")
    speed: bool = True

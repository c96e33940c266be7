"""``cfvit models``, ``convert`` and ``cost``: which models there are, and what they would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import NormFloat

from cfvit.cli.application import app, print_json, print_line, print_table, say
from cfvit.cli.parameters import Flag, Json, read_options
from cfvit.errors import CfvitError, UsageError
from cfvit.files import atomic_write, markdown_table
from cfvit.modeling.config import Grid, ModelConfig, read_grid

COSTED_BACKBONES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "lvvit_tiny_patch16_224",
    "lvvit_small_patch16_224",
    "lvvit_medium_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_large_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_small_patch14_224",
    "vit_base_patch16_rope_224",
)


@app.command
def convert(source: Path, folder: Path, /, *, to: Literal["cfvit", "timm"] = "cfvit", overwrite: Flag = False) -> None:
    """Turn one of the authors' checkpoints, or a folder of transformers, into a saved folder; or a model into timm's.

    The source is only read. Both stages of a model of transformers begin with its weights. The coarse stage is of use
    only after training; recipe.yaml in the folder has the fields for it.

    With --to timm the folder gets the plain ViT of a coarse-to-fine model, as timm.create_model("local-dir:FOLDER")
    and transformers' pipeline("image-classification", "FOLDER") read it.

    Args:
        source: one of the authors' .pth files, or a folder of transformers' ViT, DeiT or DINOv2; with --to timm any
            model, also a saved folder or a bundled name
        folder: where to write config.json and model.safetensors
        to: timm: write the plain ViT alone
        overwrite: replace a model that is there
    """
    import yaml

    from cfvit.checkpoints import CONFIG_FILE, load, load_authors_checkpoint, load_transformers, save

    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise CfvitError(f"{folder} already holds a model: choose another folder or add --overwrite")
    if to == "timm":
        from cfvit.methods.base import create_method
        from cfvit.methods.plain import backbone_of

        plain = backbone_of(load(source))
        create_method("plain").save(plain, folder)
        say(f"the plain ViT of {source} is in {folder}, for timm and transformers")
        return
    if not source.exists():
        raise CfvitError(f"no file {source}: name one of the authors' .pth files, or a folder of transformers")
    model = load_transformers(source) if source.is_dir() else load_authors_checkpoint(source)
    save(model, folder)
    say(f"{model.config.backbone}, coarse grid {model.config.coarse_grid}, is in {folder}")
    if source.is_dir():
        sides = "x".join(map(str, model.image_size))
        fields = {
            "backbone": model.config.backbone,
            "timm_kwargs": dict(model.config.timm_kwargs),
            "coarse_grid": list(model.config.grid),
            "initial_weights": str(source.absolute()),
        }
        with atomic_write(folder / "recipe.yaml") as file:
            file.write_text(yaml.safe_dump(fields, sort_keys=False))
        say(f"both stages begin with the plain ViT of {source}: {sides} pixels, {model.config.num_classes} classes")
        say(
            "the coarse stage is of use only after training: "
            f"cfvit train --recipe adapt --config {folder / 'recipe.yaml'} --data PHOTOS --out RUN"
        )


@app.command
def models() -> None:
    """List the bundled models with their size and cost."""
    from cfvit.checkpoints import bundled_models, load
    from cfvit.modeling.cost import count_macs

    rows = []
    for name in bundled_models():
        model = load(name)
        macs = count_macs(model)
        eta = "-" if model.threshold is None else f"{model.threshold:.2f}"
        costs = (f"{cost / 1e9:.2f}" for cost in (macs.coarse, macs.both, macs.backbone))
        size = "x".join(map(str, model.image_size))
        rows.append([name, model.config.backbone, str(model.config.num_classes), size, eta, *costs])
    print_table(("name", "backbone", "classes", "image", "eta", "GMACs coarse", "both", "plain"), rows)


@app.command
def cost(
    backbones: Annotated[
        tuple[str, ...], Parameter(help="timm's names, or lvvit_...; by default a selection", show_default=False)
    ] = COSTED_BACKBONES,
    /,
    *,
    coarse_grid: str = "7",
    fine_share: tuple[NormFloat, ...] | None = None,
    method: str | None = None,
    method_options: dict[str, str] | None = None,
    json: Json = False,
) -> None:
    """Tell what backbones would cost in two stages, before any training: parameters and GMACs of an image.

    The output is a Markdown table; nothing is downloaded or computed, only counted. With --method: what an image costs
    at each operating point of that method, cheapest first, and at the last one as gmacs.

    Args:
        coarse_grid: side of the coarse grid in cells, or ROWSxCOLUMNS
        fine_share: shares of images that go on, to give the mean cost for (default: 0.24 0.5)
        method: tell what this method of cfvit train would cost instead
        method_options: options of the method; by default those of its paper
    """
    import torch

    from cfvit.modeling.cost import count_macs
    from cfvit.modeling.model import create_model

    grid = read_grid(coarse_grid)
    if method is None and method_options:
        raise UsageError("--method-options belong to a --method: give it, or leave them out")
    if method is not None and fine_share is not None:
        raise UsageError("--fine-share is not for --method, which tells what each operating point costs: leave it out")
    if method is not None:
        _print_cost_of_method(backbones, grid, method, read_options(method_options or {}), json)
        return
    fine_share = (0.24, 0.5) if fine_share is None else fine_share
    shares = [f"{share:.0%} hard" for share in fine_share]
    columns = ["backbone", "pixels", "parameters, M", "plain", "coarse", "both", *shares]
    rows = []
    for name in backbones:
        with torch.device("meta"):
            model = create_model(name, coarse_grid=grid)
        macs, size = count_macs(model), "x".join(map(str, model.image_size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        costs = [macs.backbone, macs.coarse, macs.both, *(macs.expected(share) for share in fine_share)]
        if json:
            figures = dict(zip(columns[3:], costs, strict=True))
            print_json(backbone=name, pixels=model.image_size, parameters=parameters, macs=figures)
        rows.append([name, size, f"{parameters / 1e6:.1f}", *(f"{cost / 1e9:.2f}" for cost in costs)])
    if not json:
        for line in markdown_table(columns, rows):
            print_line(line)


def _print_cost_of_method(
    backbones: tuple[str, ...], grid: Grid, method: str, options: dict[str, Any], json: bool
) -> None:
    import torch

    from cfvit.methods.base import create_method

    chosen, plain, rows = create_method(method, options=options), create_method("plain"), []
    for name in backbones:
        config = ModelConfig(backbone=name, coarse_grid=grid)
        try:
            with torch.device("meta"):
                macs, (whole,) = chosen.macs(chosen.build(config)), plain.macs(plain.build(config)).values()
        except UsageError as error:
            if len(backbones) == 1:
                raise
            say(f"{name} is left out: {error}")
            continue
        points = {point: count / 1e9 for point, count in macs.items()}
        if json:
            most = max(points.values())
            print_json(method=method, backbone=name, gmacs=most, backbone_gmacs=whole / 1e9, points=points)
        for point, gmacs in points.items():
            rows.append([name, chosen.title, point, f"{gmacs:.2f}", f"{whole / 1e9:.2f}"])
    if not json:
        columns = ["backbone", "method", "operating point", "GMACs", "plain"]
        for line in markdown_table(columns, rows):
            print_line(line)

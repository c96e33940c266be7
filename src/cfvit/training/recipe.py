"""Recipes: everything that a training run depends on, as one typed, frozen configuration.

A recipe is chosen by name, changed by a YAML file, then by flags of the command line. The result
is written beside the model as ``recipe.yaml``, from which the run can be repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field

from cfvit.errors import UsageError
from cfvit.modeling.config import ModelConfig, Number, Objective, configuration, field_help

Precision = Literal["auto", "float32", "bfloat16", "float16"]

Sources = Annotated[
    tuple[str, ...],
    Field(strict=False),
    BeforeValidator(lambda value: (value,) * bool(value) if isinstance(value, str) else value),
]
"""One or several sources of images; a single one may be given as text."""

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]


@configuration
class Recipe(ModelConfig, Objective):
    """The DeiT recipe with the coarse-to-fine losses: the paper's training from scratch.

    Defaults follow DeiT (Touvron et al., 2021) and CF-ViT's section "Implementation": 300 epochs,
    of which the first 200 split all cells, batch 1024.
    """

    data: Sources = Field(
        default=(),
        description="what to train on: image folder, tar, or timm data set (hfds/..., torch/...). Without labels "
        "(--recipe adapt) any folder or tar of photos, or several; PATH@N takes at most N photos of each folder",
    )
    val_data: str | None = Field(
        default=None, description="labelled data to validate on; by default DATA's own validation split, if it has one"
    )
    holdout: Number = Field(
        default=0.05, ge=0, le=0.99, description="share of the training images kept out, to choose eta on"
    )
    method: str = Field(
        default="cf_vit",
        description="what is trained: cf_vit, plain (the ViT itself), coarse_only, literal, or another way to make a "
        "ViT cheaper: cascade, cf_evit, dvt, dynamicvit, evit, evo_vit, ia_red2, msdnet, ps_vit, ranet, sit, tome",
    )
    method_options: Annotated[Mapping[str, Any], BeforeValidator(lambda value: value or {})] = Field(
        default_factory=dict,
        description="what the method alone can be told, as in --method dynamicvit --method-options.keep-rate 0.6",
    )
    initial_weights: str | None = Field(
        default=None,
        description="start from these: 'timm', a file or folder of backbone weights, or a cfvit model; "
        "FILE#state_dict_ema chooses averaged weights, FILE#ROWSxCOLUMNS gives the grid of the positions",
    )
    backbone: str = Field(default="deit_small_patch16_224", description="timm ViT with a class token, or an lvvit")

    epochs: Count = Field(default=300, description="passes over the training images")
    all_cells_share: Share = Field(
        default=2 / 3, description="share of the epochs, the first ones, in which all cells are split"
    )
    batch_size: Count = Field(default=128, description="images per process and step, before accumulation")
    accumulate: Count = Field(default=1, description="batches whose gradients are added up for one step")
    drop_path_rate: Number = Field(default=0.1, ge=0, le=0.99, description="stochastic depth")

    optimizer: str = Field(default="adamw", description="timm's name of the optimiser")
    lr_base: NotNegative = Field(
        default=5e-4, description="learning rate at lr_base_size images a step; scaled in proportion"
    )
    lr_base_size: Count = Field(default=512, description="images a step for which lr_base is meant")
    min_lr: NotNegative = Field(default=1e-5, description="learning rate at the end")
    warmup_lr: NotNegative = Field(default=1e-6, description="learning rate at the start of the warm-up")
    warmup_epochs: NotNegative = Field(default=5.0, description="epochs of linear warm-up")
    added_lr_scale: NotNegative = Field(
        default=1.0, description="learning rate of weights that a method adds to the ViT, as a multiple of the others'"
    )
    added_only_epochs: int = Field(default=0, ge=0, description="epochs, the first ones, in which only those learn")
    weight_decay: NotNegative = Field(
        default=0.05, description="weight decay; none on positions, class token, norms and biases"
    )
    clip_grad: NotNegative = Field(default=0.0, description="largest norm of the gradient; 0 for no limit")
    ema_decay: Share = Field(default=0.9999, description="decay of the averaged weights, warmed up; 0 for none")
    initial_share: Share = Field(
        default=0.0,
        description="the model that is scored and saved is this share of the weights that the run starts from, and "
        "the rest of those that it came to: keeps what the photos do not show (WiSE-FT, Wortsman et al., 2022)",
    )

    crop_scale_min: Number = Field(
        default=0.08, ge=0.001, le=1, description="least share of the image in a training crop"
    )
    auto_augment: str = Field(default="rand-m9-mstd0.5-inc1", description="timm's augmentation policy, or none")
    color_jitter: NotNegative = Field(default=0.3, description="colour jitter, used where there is no policy")
    hflip: Share = Field(default=0.5, description="probability of a horizontal flip")
    crop_pct: Number | None = Field(
        default=None,
        ge=0.01,
        le=1,
        description="share of the image that evaluation sees; by default that of the weights or the backbone",
    )
    train_interpolation: str = Field(default="bicubic", description="how training crops are resized")
    random_erasing: Share = Field(default=0.25, description="probability of random erasing")
    mixup: NotNegative = Field(default=0.8, description="alpha of mixup; 0 for none")
    cutmix: NotNegative = Field(default=1.0, description="alpha of cutmix; 0 for none")
    mix_probability: Share = Field(default=1.0, description="share of the batches that are mixed, if any are")
    repeated_augmentation: Count = Field(
        default=3, description="each image appears this many times in an epoch; the epoch is shortened accordingly"
    )

    token_labels: str | None = Field(
        default=None, description="folder of label maps by which an lvvit learns at each token"
    )
    teacher: str | None = Field(
        default=None,
        description="trained timm model, or a folder of one, to learn from; with --recipe adapt by default the plain "
        "ViT that the run starts from. Without teacher weights above 0 it labels each token of an lvvit",
    )
    teacher_weights: str | None = Field(
        default=None, description="the teacher's weights, a file; by default timm's own"
    )
    mix_token: bool = Field(
        default=False, description="with token labels: exchange a box of tokens between images (MixToken)"
    )

    threshold_max_drop: Number = Field(
        default=0.5, ge=0, le=100, description="points of accuracy that the chosen eta may lose on the hold-out"
    )
    precision: Precision = Field(default="auto", description="auto: bfloat16 on GPUs that have it, float32 elsewhere")
    compile: bool = Field(default=False, description="torch.compile the network")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="fixes every random choice")
    workers: int = Field(default=2, ge=0, description="processes that load images")
    hold_decoded: bool = Field(
        default=False, description="decode each image once and keep its pixels in a temporary file"
    )
    eval_batch_size: Count = Field(default=128, description="images per batch in evaluation")
    eval_interval: Count = Field(default=1, description="epochs between evaluations")
    log_interval: Count = Field(default=50, description="steps between lines of the log")
    checkpoint_interval: Count = Field(
        default=500, description="steps between checkpoints, besides one after each epoch"
    )

    follows: ClassVar[frozenset[str]] = frozenset({"num_classes"})
    """Fields of `ModelConfig` that a run takes from its data or its teacher."""

    reserved: ClassVar[frozenset[str]] = ModelConfig.reserved | {"drop_path_rate"}

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        Objective.__post_init__(self)
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise UsageError(
                f"batch_size is {self.batch_size}: mixup and cutmix pair the images, "
                "give an even number or set both to 0"
            )
        if self.teacher_weights and not self.teacher:
            raise UsageError("teacher_weights are given without a teacher: add --teacher NAME")
        if self.uses_labels and len(self.data) > 1:
            raise UsageError(f"data has {len(self.data)} sources: labelled data is one, only photos may be more")
        if not self.learns_from_tokens:
            if self.mix_token:
                raise UsageError(
                    "mix_token is on without token labels: add --token-labels FOLDER or --teacher NAME, "
                    "or give --no-mix-token"
                )
            return
        if self.token_labels and self.teacher:
            raise UsageError("token_labels and teacher are both given: labels come from one of them")
        if self.mixup or self.cutmix:
            raise UsageError("mixup and cutmix move pixels away from their token labels: set both to 0, use mix_token")
        if (self.label_weight, self.coarse_label_weight, self.coarse_fine_weight) != (1, 0, 1):
            raise UsageError(
                "token labels have a loss of their own: leave label_weight, coarse_label_weight and coarse_fine_weight "
                "as they are, or leave out token_labels and teacher"
            )

    @property
    def uses_labels(self) -> bool:
        """Whether the loss needs a label of each image; else the data is any photos."""
        return self.label_weight > 0 or self.coarse_label_weight > 0

    @property
    def learns_from_tokens(self) -> bool:
        """Whether each token has a label of its own."""
        return bool(self.token_labels or (self.teacher and not self.uses_teacher))

    def model_config(self, num_classes: int) -> ModelConfig:
        """The model that is trained."""
        own = {f.name: getattr(self, f.name) for f in fields(ModelConfig)}
        timm_kwargs = {**self.timm_kwargs, "drop_path_rate": self.drop_path_rate}
        return ModelConfig(**own | {"num_classes": num_classes, "timm_kwargs": timm_kwargs})

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with some fields changed.

        Raises:
            UsageError: an unknown field, with the nearest known one; a value of another type or out of range.
        """
        return dataclasses.replace(self, **{str(name): value for name, value in changes.items()})

    def to_yaml(self) -> str:
        """All fields, each with what it is for."""
        help_of = field_help(type(self))

        def on_one_line(value: Any) -> str:
            return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()

        return "".join(f"{name}: {on_one_line(value)}  # {help_of[name]}\n" for name, value in self.to_dict().items())

    def to_dict(self) -> dict[str, Any]:
        """The fields that can be chosen, in plain values."""
        values = {name: getattr(self, name) for name in field_help(type(self)) if name not in self.follows}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


DEIT = Recipe()
"""The paper's recipe for DeiT on ImageNet: 300 epochs, batch 1024 over all processes.

Command: ``torchrun --nproc-per-node 8 -m cfvit train --data IMAGENET --out RUN --recipe deit``.
The paper reports 80.8% top-1 at eta 1 for DeiT-S (Table 2). Reproduced: no, not yet run here.
"""

FINETUNE = Recipe(
    initial_weights="timm",
    epochs=30,
    all_cells_share=1 / 3,
    lr_base=1e-4,
    warmup_epochs=1.0,
    crop_scale_min=0.25,
    mixup=0.2,
    cutmix=0.5,
    ema_decay=0.999,
    repeated_augmentation=1,
)
"""A trained ViT made coarse-to-fine, on its own or on new data, in a tenth of the epochs.

Command: ``cfvit train --recipe finetune --data DATA --out RUN --backbone deit_small_patch16_224``
(``--initial-weights FILE`` for weights at hand). Reproduced: no score on ImageNet yet.
"""

_LIGHTLY_AUGMENTED: dict[str, Any] = {
    "auto_augment": "none",
    "random_erasing": 0.0,
    "repeated_augmentation": 1,
    "train_interpolation": "bilinear",
    "drop_path_rate": 0.0,
}
"""For short runs: nothing but crops, flips and mixing."""

ADAPT = Recipe(
    **_LIGHTLY_AUGMENTED,
    backbone="deit_tiny_patch16_224",
    label_weight=0.0,
    coarse_fine_weight=0.0,
    fine_teacher_weight=2.0,
    coarse_teacher_weight=1.0,
    label_smoothing=0.0,
    epochs=7,
    all_cells_share=0.0,
    batch_size=64,
    lr_base=1.5e-4,
    lr_base_size=64,
    min_lr=1e-6,
    warmup_epochs=0.2,
    weight_decay=0.0,
    ema_decay=0.999,
    initial_share=0.3,
    crop_scale_min=0.35,
    color_jitter=0.0,
    mix_probability=0.7,
)
"""A trained ViT made coarse-to-fine on photos without labels: both stages learn its answers.

Command: ``cfvit train --recipe adapt --data PHOTOS --backbone deit_tiny_patch16_224 --initial-weights FILE --out RUN``.
DeiT-T of ImageNet on some 8,000 photos, under three hours on one or two CPU threads: even with the plain network at 53%
fewer MACs on all images, 3.6 points below it on classes with few photos. Reproduced: partly, one run; see ``results/``.
"""

LVVIT = Recipe(
    backbone="lvvit_small_patch16_224",
    lr_base=1.6e-3,
    lr_base_size=1024,
    ema_decay=0.99992,
    mixup=0.0,
    cutmix=0.0,
    repeated_augmentation=1,
)
"""LV-ViT with token labels on ImageNet: 300 epochs, batch 1024 over all processes.

Command: ``torchrun --nproc-per-node 8 -m cfvit train --data IMAGENET --out RUN --recipe lvvit
--token-labels MAPS --mix-token`` (or ``--teacher NAME``). The paper reports 83.6% top-1 at eta 1 for LV-ViT-S
(Table 2). Reproduced: no, not yet run at that scale; ``results/`` has a short run on Imagenette.
"""

IMAGENETTE = Recipe(
    **_LIGHTLY_AUGMENTED,
    backbone="deit_tiny_patch16_224",
    coarse_grid=4,
    epochs=24,
    all_cells_share=0.25,
    batch_size=64,
    optimizer="muon",
    lr_base=1e-3,
    lr_base_size=64,
    warmup_epochs=1.0,
    clip_grad=1.0,
    ema_decay=0.999,
    crop_scale_min=0.3,
    mixup=0.2,
    cutmix=0.5,
)
"""Imagenette (ten classes, 9,469 images) from scratch on a CPU: small images, Muon, light augmentation.

Begun on small images and ended at 224 pixels, 49 epochs and some three hours of two cores; ``results/``
has the commands. Scores on ``val.tar`` beside the plain DeiT-T of the same training, 83.2% top-1: 83.8% with 64%
fewer MACs, and 84.8% at eta 1 (the paper's DeiT-S on ImageNet: even with 61% fewer, and a point gained). Learnt: 10
epochs on 3 x 3 cells of 96-pixel images leave the coarse stage sure of few images, and save 23%. ``results/`` has the
table, and the command for a GPU, which was not run. Reproduced: yes on ten classes, by one run each.
"""

DIGITS = Recipe(
    **_LIGHTLY_AUGMENTED,
    backbone="test_vit",
    timm_kwargs={"patch_size": 8},
    coarse_grid=3,
    epochs=24,
    all_cells_share=0.25,
    batch_size=32,
    optimizer="muon",
    lr_base=4e-3,
    lr_base_size=32,
    warmup_epochs=1.0,
    ema_decay=0.99,
    crop_scale_min=0.7,
    hflip=0.0,
    crop_pct=1.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.05,
    holdout=0.2,
    workers=0,
)
"""scikit-learn's handwritten digits, for ``cfvit demo`` and the tests: about a minute on two CPU cores."""

RECIPES: dict[str, Recipe] = {
    "deit": DEIT,
    "finetune": FINETUNE,
    "adapt": ADAPT,
    "lvvit": LVVIT,
    "imagenette": IMAGENETTE,
    "digits": DIGITS,
}


def load_recipe(name: str, config: Path | None = None) -> Recipe:
    """The recipe ``name``, changed by a YAML file.

    Raises:
        UsageError: unknown recipe, unreadable file, unknown field or bad value.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}: choose among {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if config is not None:
        try:
            content = yaml.safe_load(config.read_text())
        except OSError as error:
            raise UsageError(f"cannot read {config}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{config} is not YAML ({reason}): write one 'field: value' per line") from error
        if not isinstance(content or {}, dict):
            raise UsageError(f"{config} holds a {type(content).__name__}: write one 'field: value' per line")
        recipe = recipe.replace(content or {})
    return recipe


def read_value(text: str) -> Any:
    """A word of the command line as YAML would read it: a number, true, false, null, or the word itself."""
    try:
        return float(text) if not text.lstrip("+-").isdecimal() else int(text)
    except ValueError:
        return yaml.safe_load(text)

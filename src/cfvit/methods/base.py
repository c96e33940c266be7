"""The seam of methods: what can be trained, scored, timed, compared and saved by one harness.

A method is a class in a file of this package, a new one in a file of its own. Training, evaluation, benchmark and the
paper's tables know it by its name and speak to this protocol alone.
"""

from __future__ import annotations

import copy
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.files import atomic_write
from cfvit.modeling.backbones import load_strictly
from cfvit.modeling.config import ModelConfig, Objective, configuration
from cfvit.modeling.cost import macs_of
from cfvit.modeling.exit import Exit
from cfvit.modeling.losses import answer_loss
from cfvit.modeling.weights import WEIGHTS_FILE, require_finite, write_weights


@dataclass(frozen=True)
class TokenLabels:
    """A label for each place of the images of a batch, pooled to both grids."""

    fine: Tensor  # ``[B, 4N, classes]``
    coarse: Tensor  # ``[B, N, classes]``
    columns: int  # of the coarse grid
    mixed: Tensor | None  # ``[N]``, the cells that MixToken exchanges with the mirror image's; None without


@dataclass(frozen=True)
class Batch:
    """What a training step knows of a batch."""

    images: Tensor  # normalised and augmented, ``[B, 3, S, S]``
    target: Tensor | None  # class indices ``[B]`` or probabilities ``[B, classes]``; None without labels
    # a trained network's logits for the same images, ``[B, classes]``; None without a teacher
    teacher: Tensor | None = None
    token_labels: TokenLabels | None = None  # of an LV-ViT that learns at each token


def count_points(network: Any, points: Callable[[Any], dict[str, Callable[[Tensor], Any]]]) -> dict[str, int]:
    """What an image costs at each operating point, counted on a copy of the network without data."""
    meta = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    image = next(meta.parameters()).new_empty(1, 3, *network.image_size)
    return {name: macs_of(partial(answer, image)) for name, answer in points(meta).items()}


@configuration
class Options:
    """Settings of one method alone: a method adds its own as fields, with the values of its paper as defaults."""


class TrainingModule(nn.Module):
    """A function of networks and of a batch's tensors as one module, which can be compiled and distributed.

    Args:
        run: from the parts and then the arguments of a call to what the call returns.
        parts: the network, and others that take part in its training, such as a teacher.
    """

    def __init__(self, run: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)

    def forward(self, *inputs: Any) -> Any:
        return self.run(*self.parts, *inputs)


EXIT_FILE = "exit.json"
"""What a network with an exit knows of it, beside its weights."""


class Method(ABC):
    """A way of answering images by a ViT.

    Args:
        objective: what its training minimises.
        options: values for fields of `options_class`, by name.

    Raises:
        UsageError: an objective that the method has no use for, an option that it lacks or a value out of range.
    """

    name: ClassVar[str]
    """As recipes and the command line spell it."""
    title: ClassVar[str]
    """As tables spell it; by default the name."""
    engines: ClassVar[tuple[Any, ...] | None] = None
    """The only engines that its speed is measured in; None for any."""
    options_class: ClassVar[type[Any]] = Options
    ignored: ClassVar[frozenset[str]] = ModelConfig.of_fine_stage
    """Fields of the model's configuration that have no effect with it."""

    def __init__(self, objective: Objective, options: Mapping[str, Any] | None = None) -> None:
        self.objective = objective
        self.options: Any = self.options_class(**(options or {}))

    @abstractmethod
    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """A new network, an ``nn.Module`` with ``data_config``, ``class_names`` and ``image_size``.

        Args:
            weights: where trained weights come from, as of `cfvit.checkpoints.initialise`; None for
                random ones by torch's generator.
            class_names: by class index; trained weights of other classes are a warning.
        """

    def is_added(self, name: str) -> bool:
        """Whether a weight of the network is of a part that begins untrained, whatever weights the run starts from."""
        return False

    def forward(self, network: Any, images: Tensor) -> Any:
        """What a training step computes of images ``[B, 3, S, S]``, and what `loss` reads of it."""
        return network(images)

    def training_module(self, network: Any) -> nn.Module:
        """`forward` of a network as a module."""
        return TrainingModule(self.forward, network)

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        """The loss on a batch, a scalar; by default that of the one answer which `forward` gives.

        Args:
            module: what `training_module` gave, perhaps compiled and distributed.
            split: share of cells that are split in this phase; a method without cells ignores it.
        """
        return self.answer_loss(module(batch.images), batch)

    def answer_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of one answer: cross entropy with the label, divergence from the teacher."""
        if batch.token_labels is not None:
            raise UsageError(f"token labels train both stages: choose --method cf_vit, not {self.name}")
        if self.objective.label_weight == self.objective.fine_teacher_weight == 0:
            raise UsageError(f"{self.name} has one answer, which learns nothing: give --label-weight above 0")
        return answer_loss(logits, batch.target, batch.teacher, self.objective)

    @abstractmethod
    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        """The operating points by name, cheapest first: each is from images ``[B, 3, S, S]`` to logits."""

    def answers(self, network: Any, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[B, classes]`` at each operating point."""
        return {name: answer(images) for name, answer in self.points(network).items()}

    def macs(self, network: Any) -> dict[str, int]:
        """What an image costs at each operating point, in multiply-accumulates."""
        return count_points(network, self.points)

    def engine(self, network: Any, compile: bool | None = None) -> Any:
        """The `cfvit.inference.engines.Engine` of a network with an exit between two stages; None for others.

        Args:
            compile: as of `cfvit.Predictor`.
        """
        return None

    @property
    def has_exits(self) -> bool:
        """Whether images exit at one operating point or another."""
        return type(self).exits is not Method.exits

    def exits(self, network: Any, logits: dict[str, Tensor]) -> Tensor | None:
        """The number of the operating point at which each image exits, ``[n]``; None for a network without exits.

        Args:
            logits: as `answers` gives them.
        """
        return None

    def choose_exit(self, network: Any, logits: dict[str, Tensor], labels: Tensor, max_drop: float) -> dict[str, float]:
        """Sets when the network exits early, if it does, and returns what was chosen.

        Args:
            logits: of the hold-out, as `answers` gives them.
            labels: class indices: the labels, or without any a teacher's answers.
            max_drop: percentage points that may be lost against the dearest operating point.
        """
        return {}

    def load(self, network: Any, folder: Path) -> Any:
        """The network with the weights that `save` wrote into it as `build` gave it, in evaluation mode.

        Raises:
            CfvitError: a folder that is damaged or holds another network.
        """
        try:
            weights = load_file(folder / WEIGHTS_FILE)
            if hasattr(network, "exit"):
                network.exit = Exit(**json.loads((folder / EXIT_FILE).read_text()))
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise CfvitError(f"{folder} is damaged ({first_line(error)}): remove it to train it again") from error
        require_finite(weights, str(folder / WEIGHTS_FILE))
        load_strictly(network, weights, f"{folder} does not fit its recipe")
        return network.eval()

    def save(self, network: Any, folder: Path) -> None:
        """Writes the network into a folder that `load` reads; a method may choose a format that others read as well."""
        if hasattr(network, "exit"):  # first: what is killed in between has no weights, and is no run
            with atomic_write(folder / EXIT_FILE) as file:
                file.write_text(json.dumps(asdict(network.exit)) + "\n")
        write_weights(network, folder / WEIGHTS_FILE, method=self.name)


METHODS: dict[str, type[Method]] = {}
"""The methods of the files that are imported, by name; see `known_methods`."""

Class = TypeVar("Class", bound=type[Method])


def register(name: str) -> Callable[[Class], Class]:
    """A class decorator that makes a method known by a name."""

    def known(cls: Class) -> Class:
        cls.name, METHODS[name] = name, cls
        cls.title = vars(cls).get("title", name)
        return cls

    return known


def known_methods() -> dict[str, type[Method]]:
    """All methods, by name: those of the files of this package, and others that are registered."""
    import cfvit.methods

    for module in pkgutil.iter_modules(cfvit.methods.__path__):
        import_module(f"cfvit.methods.{module.name}")
    return dict(sorted(METHODS.items()))


def create_method(name: str, objective: Objective | None = None, options: Mapping[str, Any] | None = None) -> Method:
    """The method of a name, by default with the paper's objective and with the settings of its own paper.

    Raises:
        UsageError: there is none of that name, or it has no such option.
    """
    methods = known_methods()
    if name not in methods:
        raise UsageError(f"there is no method {name!r}: choose among {', '.join(sorted(methods))}")
    return methods[name](Objective() if objective is None else objective, options)

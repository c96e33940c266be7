"""Recipes: what overrides what, what is refused, and that the written YAML says it all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

from cfvit.errors import UsageError
from cfvit.training.recipe import RECIPES, Recipe, load_recipe, read_value


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_their_own_yaml(name: str, yaml_file: Callable[[str], Path]) -> None:
    recipe = load_recipe(name)
    other = "finetune" if name == "deit" else "deit"
    assert load_recipe(other) != recipe
    assert load_recipe(other, yaml_file(recipe.to_yaml())) == recipe


def test_yaml_holds_awkward_values(yaml_file: Callable[[str], Path]) -> None:
    recipe = Recipe(
        data=("/a folder: with # signs, 'quotes' and é, " + "and a long name " * 10,),
        val_data="null",
        timm_kwargs={"patch_size": 4, "init_values": 1e-5, "act_layer": "gelu"},
        lr_base=1e-10,
        threshold_max_drop=1.0,
    )
    text = recipe.to_yaml()
    assert len(text.splitlines()) == len(fields(Recipe)) - 1, "num_classes follows from the data"
    assert load_recipe("deit", yaml_file(text)) == recipe


def test_yaml_holds_the_papers_variants(yaml_file: Callable[[str], Path]) -> None:
    """Among them ``none``, which is a word and not nothing."""
    changes = {"selection": "random", "feature_reuse": "none", "coarse_label_weight": 1.0, "method": "coarse_only"}
    recipe = Recipe().replace(changes)
    loaded = load_recipe("digits", yaml_file(recipe.to_yaml()))
    assert loaded == recipe
    assert {name: getattr(loaded, name) for name in changes} == changes


def test_print_recipe_shows_the_papers_variants(
    cfvit_main: Callable[..., Outcome], yaml_file: Callable[[str], Path]
) -> None:
    words = {"selection": "negative", "feature_reuse": "none", "coarse_label_weight": "1", "method": "coarse_only"}
    flags = [part for name, word in words.items() for part in (f"--{name.replace('_', '-')}", word)]
    outcome = cfvit_main("train", "--recipe", "digits", "--print-recipe", *flags)
    assert outcome.status == 0, outcome.err
    printed = load_recipe("deit", yaml_file("\n".join(outcome.out)))
    assert printed == RECIPES["digits"].replace(words)


def test_numbers_are_taken_as_yaml_writes_them(yaml_file: Callable[[str], Path]) -> None:
    recipe = load_recipe("deit", yaml_file("lr_base: 1e-3\nmin_lr: 0\nwarmup_epochs: 2\n"))
    assert (recipe.lr_base, recipe.min_lr, recipe.warmup_epochs) == (1e-3, 0.0, 2.0)
    assert isinstance(recipe.min_lr, float)


def test_none_is_a_value_where_it_is_allowed(yaml_file: Callable[[str], Path]) -> None:
    recipe = load_recipe("finetune", yaml_file("initial_weights: null\ntimm_kwargs:\n"))
    assert RECIPES["finetune"].initial_weights == "timm"
    assert recipe.initial_weights is None
    assert recipe.timm_kwargs == {}


def test_empty_yaml_changes_nothing(yaml_file: Callable[[str], Path]) -> None:
    assert load_recipe("digits", yaml_file("# nothing yet\n")) == RECIPES["digits"]


def test_mistyped_fields_are_recognised(fails: Callable[..., Any]) -> None:
    with fails("no field 'batchsize': did you mean 'batch_size'", UsageError):
        RECIPES["deit"].replace({"batchsize": 8})
    with fails("no field 'zzz': choose among data, val_data", UsageError):
        RECIPES["deit"].replace({"zzz": 8})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", "ten", "give a whole number"),
        ("epochs", 3.5, "give a whole number"),
        ("epochs", True, "give a whole number"),
        ("epochs", None, "give a whole number"),
        ("lr_base", "fast", "give a number"),
        ("lr_base", False, "give a number"),
        ("compile", 1, "give true or false"),
        ("backbone", 5, "give text"),
        ("precision", "float8", "give .*bfloat16"),
        ("selection", "best", "give one of attention, negative, random"),
        ("feature_reuse", None, "give one of mlp, linear, none, class_token, uninformative"),
        ("timm_kwargs", 4, "give names with values"),
    ],
)
def test_values_of_another_type_are_refused(name: str, value: Any, allowed: str, fails: Callable[..., Any]) -> None:
    with fails(f"{name} is {value!r}: {allowed}", UsageError):
        RECIPES["deit"].replace({name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "at least 1"),
        ("holdout", 1.0, "at most 0.99"),
        ("informative_ratio", 1.5, "at most 1"),
        ("lr_base", float("nan"), "a finite number"),
        ("lr_base", float("inf"), "a finite number"),
        ("label_weight", float("inf"), "a finite number"),
        ("warmup_epochs", -1.0, "at least 0"),
        ("seed", -1, "at least 0"),
        ("crop_pct", 0.0, "at least 0.01"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float, allowed: str, fails: Callable[..., Any]) -> None:
    with fails(f"{name} is {value}: give {allowed}", UsageError):
        RECIPES["deit"].replace({name: value})


def test_unknown_recipe(fails: Callable[..., Any]) -> None:
    with fails("no recipe 'diet': choose among deit, finetune", UsageError):
        load_recipe("diet")


def test_configurations_that_are_no_recipe(
    yaml_file: Callable[[str], Path], tmp_path: Path, fails: Callable[..., Any]
) -> None:
    with fails("cannot read .*absent.yaml: No such file", UsageError):
        load_recipe("deit", tmp_path / "absent.yaml")
    with fails("is not YAML", UsageError):
        load_recipe("deit", yaml_file("epochs: [1,\nbatch_size: 2"))
    with fails("holds a list", UsageError):
        load_recipe("deit", yaml_file("- epochs\n"))
    binary = yaml_file("")
    binary.write_bytes(b"\xff\xfe\x00binary")
    with fails("is not YAML", UsageError):
        load_recipe("deit", binary)
    with fails("no field '1'", UsageError):
        load_recipe("deit", yaml_file("1: 2\n"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"coarse_grid": 0}, "coarse_grid is 0: give a whole number of at least 1, or ROWSxCOLUMNS such as 5x8"),
        ({"coarse_grid": "5x"}, "coarse_grid is '5x': give a whole number of at least 1"),
        ({"coarse_grid": "5x8x2"}, "coarse_grid is '5x8x2'"),
        ({"teacher_weights": "file"}, "teacher_weights are given without a teacher: add --teacher NAME"),
        ({"mix_token": True}, "mix_token is on without token labels"),
        ({"token_labels": "maps", "teacher": "resnet18", "mixup": 0, "cutmix": 0}, "both given"),
        ({"token_labels": "maps"}, "mixup and cutmix move pixels"),
        ({"teacher": "resnet18", "mixup": 0, "cutmix": 0, "coarse_fine_weight": 0.0}, "leave out token_labels and"),
        ({"data": ("a", "b")}, "data has 2 sources: labelled data is one, only photos may be more"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Recipe().replace(changes)


def test_grids() -> None:
    assert Recipe().grid == (7, 7)
    assert Recipe().replace({"coarse_grid": "5x8"}).grid == (5, 8)
    assert Recipe().replace({"coarse_grid": "9"}).grid == (9, 9)


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("true", True), ("8", 8), ("1e-5", 1e-5), ("0.1", 0.1), ("null", None), ("none", "none")],
)
def test_words_of_the_command_line(text: str, value: Any) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)

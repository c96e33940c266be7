"""Images that the model was trained on are found among those to calibrate on, and refused."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from calibrations import Cli, error, run_calibrate

from cfvit.calibration.calibrated import read_calibration
from cfvit.data import open_data, split_holdout
from cfvit.evaluation.calibrate import NOT_COMPARED, shared_images
from cfvit.training.recipe import DIGITS, RECIPES


def test_training_images_are_refused(cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours / "val", tmp_path / "data"))
    shutil.copy(colours / "train" / "red" / "3.png", data / "red" / "renamed.png")
    shutil.copy(colours / "train" / "green" / "7.png", data / "blue" / "elsewhere.png")
    message = error(run_calibrate(cfvit_main, model, data, "--max-drop", 1, "--train-data", colours), 1)
    expected = "2 of 35 images are among the training images, blue/elsewhere.png first, which is "
    expected += f"{colours}/train/green/7.png there: "
    assert message.startswith(expected)
    assert not (model / "calibration.json").exists()
    outcome = run_calibrate(cfvit_main, model, colours, "--max-drop", 1, "--train-data", colours)
    assert (outcome.status, outcome.err) == (0, [f"written to {model / 'calibration.json'}"])


def test_whether_training_images_were_looked_for_is_among_the_warnings(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    for flags, said in (((), True), (("--train-data", colours), False)):
        (line,) = run_calibrate(cfvit_main, model, colours, "--max-drop", 1, "--json", *flags).out
        assert (NOT_COMPARED in json.loads(line)["warnings"]) is said
        assert (NOT_COMPARED in read_calibration(model).warnings) is said


def test_the_recipe_tells_the_training_images_but_for_the_hold_out(
    cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = DIGITS.replace({"data": str(colours), "holdout": 0.2, "seed": 3})
    (model / "recipe.yaml").write_text(recipe.to_yaml())
    source = open_data(str(colours), "train")
    kept, held = split_holdout(source, 0.2, 3)
    for name, indices in (("kept", kept[:1]), ("held", held)):
        data = Path(shutil.copytree(colours / "val", tmp_path / name))
        for index in indices:
            shutil.copy(colours / "train" / source.name(index), data / "red" / f"copy{index}.png")
        outcome = run_calibrate(cfvit_main, model, data, "--max-drop", 1)
        if name == "kept":
            assert f"1 image is among the training images, red/copy{kept[0]}.png first" in error(outcome, 1)
        else:
            assert (outcome.status, f"warning: {NOT_COMPARED}" in outcome.out) == (0, False)


def test_photos_without_labels_are_looked_for_as_well(
    cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path
) -> None:
    """Those of an adaptation, which its recipe or --train-data names."""
    photos, data = tmp_path / "photos", Path(shutil.copytree(colours / "val", tmp_path / "data"))
    (photos / "of 2026").mkdir(parents=True)
    for name in ("3", "4"):
        shutil.copy(colours / "train" / "red" / f"{name}.png", photos / "of 2026" / f"photo {name}.png")
    shutil.copy(colours / "train" / "red" / "3.png", data / "red" / "renamed.png")
    assert "red/renamed.png" in error(
        run_calibrate(cfvit_main, model, data, "--max-drop", 1, "--train-data", photos), 1
    )
    recipe = RECIPES["adapt"].replace({"data": [f"{photos}@9", str(photos)], "holdout": 0.0})
    (model / "recipe.yaml").write_text(recipe.to_yaml())
    assert "red/renamed.png" in error(run_calibrate(cfvit_main, model, data, "--max-drop", 1), 1)


def test_a_recipe_whose_data_is_gone_tells_nothing(cfvit_main: Cli, model: Path, colours: Path) -> None:
    for recipe in (DIGITS, RECIPES["adapt"]):
        (model / "recipe.yaml").write_text(recipe.replace({"data": "gone"}).to_yaml())
        outcome = run_calibrate(cfvit_main, model, colours, "--max-drop", 1)
        assert (outcome.status, f"warning: {NOT_COMPARED}" in outcome.out) == (0, True)


def test_a_recipe_that_cannot_be_read_is_an_error_unless_the_images_are_named(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    (model / "recipe.yaml").write_text("epoch: 3\n")
    message = error(run_calibrate(cfvit_main, model, colours, "--max-drop", 1), 1)
    assert "recipe.yaml does not tell the training images" in message
    assert message.endswith("name them with --train-data")
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1, "--train-data", colours).status == 0


def test_shared_images_are_found_in_a_tar_and_unreadable_ones_left_out(colours: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(colours / "train", arcname=".")
    data = Path(shutil.copytree(colours / "val", tmp_path / "data"))
    shutil.copy(colours / "train" / "red" / "3.png", data / "green" / "x.png")
    (data / "red" / "0.png").unlink()
    (data / "red" / "0.png").symlink_to("nowhere.png")
    ours, theirs = open_data(str(data), "validation"), open_data(str(packed), "train")
    ((mine, other),) = shared_images(ours, theirs, range(len(theirs)))
    assert (ours.name(mine), theirs.name(other)) == ("green/x.png", "red/3.png")
    assert shared_images(ours, theirs, [i for i in range(len(theirs)) if i != other]) == []

"""Answers in a file: the same whatever stops the run in between, and each image's once over all shards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import Outcome

from cfvit import load, save
from cfvit.checkpoints import weights_digest
from cfvit.cli import main
from cfvit.deploy.batch import model_digest, shard_of
from cfvit.errors import UsageError
from cfvit.inference.engines.exported import ExportedModel, Quantised, TwoStageScores

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def photos(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images in two folders, and two that cannot be read. Only to be read."""
    folder = tmp_path_factory.mktemp("photos")
    for colour in ("blue", "red"):
        shutil.copytree(colours / "val" / colour, folder / colour)
    for name in ("3.png", "7.png"):
        (folder / "red" / name).write_text("no image")
    return folder


@pytest.fixture(scope="module")
def command(photos: Path, colour_model: Path) -> list[Any]:
    """In parts of 5 images; the output is to be added."""
    return ["predict", photos, "--model", colour_model, "--batch-size", 4, "--part-size", 5, "--output"]


@pytest.fixture(scope="module")
def undisturbed(command: list[Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a run that nothing stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "answers.jsonl"
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in [*command, output]])
    assert exit_.value.code == 1
    return output.read_text()


def test_the_file_has_the_lines_of_json(photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli) -> None:
    given = ("predict", photos, "--model", colour_model)
    printed = cfvit_main(*given, "--json").out
    assert cfvit_main(*given, "--output", tmp_path / "answers.jsonl").status == 1
    assert (tmp_path / "answers.jsonl").read_text().splitlines() == printed
    assert Counter("error" in json.loads(line) for line in printed) == {False: 20, True: 2}


def test_it_is_summed_up_and_leaves_nothing_else(command: list[Any], tmp_path: Path, cfvit_main: Cli) -> None:
    outcome = cfvit_main(*command, tmp_path / "answers.jsonl")
    assert outcome.status == 1
    assert outcome.out == []
    assert outcome.err[0] == "22 images"
    assert "2 of 22 images have no answer" in outcome.err[1]
    assert outcome.err[2].startswith("20 images: ")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_parquet_has_the_same_rows(command: list[Any], undisturbed: str, tmp_path: Path, cfvit_main: Cli) -> None:
    assert cfvit_main(*command, tmp_path / "answers.parquet").status == 1
    table = pyarrow.parquet.read_table(tmp_path / "answers.parquet")
    assert table.column_names == ["path", "label", "confidence", "stage", "gmacs", "error"]
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    assert rows == [json.loads(line) for line in undisturbed.splitlines()]


def test_names_that_are_no_text_are_escaped_in_parquet(
    photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.png")
    shutil.copy(photos / "red" / "0.png", odd)
    output = tmp_path / "answers.parquet"
    assert cfvit_main("predict", odd, "--model", colour_model, "--output", output).status == 0
    assert pyarrow.parquet.read_table(output)["path"].to_pylist() == [str(tmp_path / r"\udcff.png")]


# Shards


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_part_the_images_whatever_their_order(count: int) -> None:
    paths = [Path(f"photos/{number}.jpg") for number in range(1000)]
    shards = [list(shard_of(paths[:: 1 if number % 2 else -1], f"{number}/{count}")) for number in range(1, count + 1)]
    assert Counter(path for shard in shards for path in shard) == Counter(paths)
    assert all(abs(len(shard) - 1000 / count) < 100 for shard in shards)


def test_an_image_that_one_machine_does_not_see_moves_no_other() -> None:
    paths = [Path(f"photos/{number}.jpg") for number in range(100)]
    for number in (1, 2, 3):
        whole = list(shard_of(paths, f"{number}/3"))
        assert list(shard_of(paths[1:], f"{number}/3")) == [path for path in whole if path != paths[0]]


def test_the_shards_of_a_folder_are_its_answers(
    command: list[Any], undisturbed: str, tmp_path: Path, cfvit_main: Cli
) -> None:
    lines = []
    for number in (1, 2, 3):
        output = tmp_path / f"{number}.jsonl"
        cfvit_main(*command, output, "--shard", f"{number}/3")
        lines += output.read_text().splitlines()
    rows, expected = (
        sorted(map(json.loads, given), key=itemgetter("path")) for given in (lines, undisturbed.splitlines())
    )
    for row in [*rows, *expected]:  # in other batches the last digits differ
        row["confidence"] = round(row.get("confidence", 0), 4)
    assert rows == expected


def test_a_file_under_two_names_is_in_one_shard(
    photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli
) -> None:
    """Machines may be given the folders in another order."""
    (tmp_path / "linked").mkdir()
    for file in (photos / "blue").iterdir():
        (tmp_path / "linked" / f"other_{file.name}").symlink_to(file)
    folders, found = [photos / "blue", tmp_path / "linked"], []
    for number, given in ((1, folders), (2, folders[::-1])):
        output = tmp_path / f"{number}.jsonl"
        cfvit_main("predict", *given, "--model", colour_model, "--shard", f"{number}/2", "--output", output)
        found += [Path(json.loads(line)["path"]).resolve() for line in output.read_text().splitlines()]
    assert sorted(found) == sorted((photos / "blue").iterdir())


def test_a_shard_without_images_is_an_empty_file(
    photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli
) -> None:
    outputs = [tmp_path / f"{number}.parquet" for number in (1, 2)]
    for number, output in enumerate(outputs, 1):
        given = ("predict", photos / "red" / "0.png", "--model", colour_model, "--shard", f"{number}/2")
        assert cfvit_main(*given, "--output", output).status == 0
    assert sorted(pyarrow.parquet.read_table(output).num_rows for output in outputs) == [0, 1]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.5/2"])
def test_shards_that_there_are_not(text: str, fails: Callable[..., Any]) -> None:
    with fails("give i/n", UsageError):
        shard_of([], text)


# Runs that were stopped


def _killed(command: list[Any], at: int, when: str) -> bool:
    """Runs the command in a process of its own, which is killed before or after it puts its ``at``-th file in place."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # threads of the parent are not here
        replace, seen = Path.replace, 0

        def replace_or_die(self: Path, target: Path) -> Path:
            nonlocal seen
            seen += 1
            if seen == at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            moved = replace(self, target)
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return moved

        Path.replace = replace_or_die  # type: ignore[method-assign]
        try:
            main([str(word) for word in command])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_run_that_was_killed_goes_on(command: list[Any], undisturbed: str, tmp_path: Path, cfvit_main: Cli) -> None:
    """At each file that it writes: the list of images, the settings, five parts, all together, and the output."""
    for at, when in [*((at, "before") for at in range(1, 10)), (9, "after")]:
        output = tmp_path / f"{at}.jsonl"
        assert _killed([*command, output], at, when)
        assert cfvit_main(*command, output).status == 1
        assert output.read_text() == undisturbed
        assert [path.name for path in tmp_path.iterdir()] == [output.name]
        output.unlink()
    assert not _killed([*command, tmp_path / "answers.jsonl"], at=10, when="before")


def test_one_that_is_killed_again_and_again_goes_on(
    command: list[Any], undisturbed: str, tmp_path: Path, cfvit_main: Cli
) -> None:
    output = tmp_path / "answers.jsonl"
    assert _killed([*command, output], 4, "before")
    for _ in range(3):
        assert _killed([*command, output], 2, "before")
    outcome = cfvit_main(*command, output)
    assert outcome.err[0] == "22 images, 20 of them answered before"
    assert output.read_text() == undisturbed


@pytest.fixture
def begun(command: list[Any], tmp_path: Path) -> Path:
    """The output of a run that was killed after its second part."""
    output = tmp_path / "answers.jsonl"
    assert _killed([*command, output], 4, "after")
    return output


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_done_is_not_done_again(begun: Path, command: list[Any], undisturbed: str, cfvit_main: Cli) -> None:
    part = begun.with_name("answers.jsonl.parts") / "000001.jsonl"
    marked = part.read_text().replace("blue", "marked")
    part.write_text(marked)
    cfvit_main(*command, begun)
    lines = undisturbed.splitlines(keepends=True)
    assert begun.read_text() == "".join(lines[:5]) + marked + "".join(lines[10:])


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("job.json", "", "answers.jsonl.parts/job.json is damaged: remove "),
        ("job.json", "{}", "answers.jsonl.parts/job.json is damaged: remove "),
        ("job.json", '{"images": 22, "settings": 1}', "answers.jsonl.parts/job.json is damaged: remove "),
        ("images.jsonl", "", "answers.jsonl.parts has 10 rows for 22 images: remove it"),
        ("000001.jsonl", '{"path"', "answers.jsonl.parts is damaged ("),
    ],
)
def test_a_damaged_run_is_told(
    file: str, text: str, says: str, begun: Path, command: list[Any], cfvit_main: Cli
) -> None:
    begun.with_name("answers.jsonl.parts").joinpath(file).write_text(text)
    outcome = cfvit_main(*command, begun)
    assert outcome.status == 1 and says in outcome.err[-1]
    assert not begun.exists()


@pytest.fixture
def other_model(colour_model: Path, tmp_path: Path) -> Path:
    model = load(colour_model)
    model.get_parameter("backbone.norm.bias").data += 0.1
    save(model, tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--threshold": 0.123}, "threshold"),
        ({"--shard": "1/2"}, "shard None, not 1/2"),
        ({"--scaled-decode": "--scaled-decode"}, "scaled decode False, not True"),
        ({"--part-size": 7}, "part size 5, not 7"),
        ({"--model": "OTHER"}, "model"),
        ({"predict": "more"}, "photos"),
    ],
)
def test_other_settings_are_refused(
    changed: dict[str, Any], says: str, begun: Path, command: list[Any], other_model: Path, cfvit_main: Cli
) -> None:
    words = [*command, begun]
    for name, value in changed.items():
        value = other_model if value == "OTHER" else value
        if name.startswith("--") and name in words:
            words[words.index(name) + 1] = value
        else:
            words[1:1] = [value] if name in ("predict", value) else [name, value]
    folder = begun.with_name("answers.jsonl.parts")
    before = _contents(folder)
    outcome = cfvit_main(*words)
    assert outcome.status == 1
    assert len(outcome.err) == 1
    assert says in outcome.err[0]
    assert "remove" in outcome.err[0]
    assert _contents(folder) == before


def test_paths_from_another_folder_are_refused(
    photos: Path, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cfvit_main: Cli
) -> None:
    """They would lead nowhere: the list of images has them as they were given."""
    output = tmp_path / "answers.jsonl"
    monkeypatch.chdir(photos.parent)
    assert _killed(["predict", photos.name, *command[2:], output], 4, "after")
    monkeypatch.chdir(tmp_path)
    outcome = cfvit_main(*command, output)
    assert (outcome.status, len(outcome.err)) == (1, 1)
    (tmp_path / photos.name).symlink_to(photos)
    outcome = cfvit_main("predict", photos.name, *command[2:], output)
    assert f"was begun with working folder {photos.parent}, not {tmp_path}" in outcome.err[0]


def test_the_same_weights_in_eight_bits_are_another_model(colour_model: Path) -> None:
    model, scores = load(colour_model), TwoStageScores(50, 60, None, None, None)
    told = {f.name: getattr(model, f.name, None) for f in fields(ExportedModel)}
    exported = ExportedModel(**{**told, "format": "openvino", "source": weights_digest(model)})
    int8 = replace(exported, quantised=Quantised(100, 100, "accuracy", scores, scores))
    assert len({model_digest(each) for each in (model, exported, int8)}) == 3
    assert model_digest(replace(exported, exit=replace(model.exit, eta=0.1))) == model_digest(exported)


def test_the_images_are_those_of_the_start(photos: Path, command: list[Any], tmp_path: Path, cfvit_main: Cli) -> None:
    mine, output = tmp_path / "mine", tmp_path / "answers.jsonl"
    shutil.copytree(photos, mine)
    words = ["predict", mine, *command[2:], output]
    assert _killed(words, 4, "after")
    shutil.copy(mine / "blue" / "0.png", mine / "blue" / "added.png")
    (mine / "red" / "10.png").unlink()
    cfvit_main(*words)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 22
    assert {"path": str(mine / "red" / "10.png"), "error": "no such file"} in rows


def test_another_run_of_the_same_output_is_refused(begun: Path, command: list[Any], cfvit_main: Cli) -> None:
    with (begun.with_name("answers.jsonl.parts") / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = cfvit_main(*command, begun)
        assert outcome.status == 1
        assert outcome.err == [f"cfvit: another run is writing {begun}: wait for it, or end it"]
    assert cfvit_main(*command, begun).status == 1
    assert begun.exists()


def test_an_output_that_is_there_is_left_alone(command: list[Any], tmp_path: Path, cfvit_main: Cli) -> None:
    """What a kill at the very end may leave of the folder is removed."""
    output, folder = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.parts"
    output.write_text("mine")
    folder.mkdir()
    (folder / "000000.jsonl").write_text("rubbish")
    outcome = cfvit_main(*command, output)
    assert outcome.status == 1
    assert outcome.err == [f"cfvit: {output} is there already: remove it, or choose another place for the answers"]
    assert _contents(tmp_path) == {str(output): b"mine"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "answers.csv"], ".jsonl or .parquet"),
        (["--output", "answers.jsonl", "--json"], "leave out --json"),
        (["--output", "answers.jsonl", "--explain", "pictures"], "--explain"),
        (["--output", "answers.jsonl", "--shard", "3/2"], "give i/n"),
        (["--output", "answers.jsonl", "--part-size", "0"], "--part-size"),
        (["--shard", "1/2"], "add --output"),
        (["--part-size", "5"], "add --output"),
    ],
)
def test_wrong_usage(
    words: list[str], says: str, photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cfvit_main("predict", photos, "--model", colour_model, *words)
    assert outcome.status == 2
    assert len(outcome.err) == 1
    assert says in outcome.err[0]
    assert list(tmp_path.iterdir()) == []


def test_parquet_without_pyarrow_is_one_line(
    command: list[Any], tmp_path: Path, cfvit_main: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = cfvit_main(*command, tmp_path / "answers.parquet")
    assert outcome.status == 1
    assert outcome.err == ["cfvit: answers in parquet need pyarrow: install cfvit[parquet], or write .jsonl"]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_found_out_first(command: list[Any], photos: Path, cfvit_main: Cli) -> None:
    outcome = cfvit_main(*command, photos / "red" / "0.png" / "answers.jsonl")
    assert outcome.status == 1
    assert len(outcome.err) == 1
    assert "cannot write" in outcome.err[0]

"""Everything that README.md and docs/ tell the reader to type really runs, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import uvicorn
from conftest import COLOURS, Outcome
from safetensors.torch import load_file, save_file

from cfvit import StageMacs, calibrate
from cfvit.calibration import Saving
from cfvit.calibration.calibrated import write_calibration

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

TINY_BACKBONE = ["--backbone", "test_vit"]
TINY_LVVIT = ["--timm-kwargs.embed-dim", "32", "--timm-kwargs.num-heads", "2"]
TINY_TRAINING = shlex.split("--timm-kwargs.depth 2 --coarse-grid 2 --epochs 1 --batch-size 4 --workers 0")
TINY_BENCH = ["--rounds", "1", "--batch-sizes", "2", "--no-peers"]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _lines(page: Path) -> list[str]:
    """What stands in the page's console blocks, a continued line as one."""
    text = "".join(_blocks(page, "console")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


COMMANDS = {tuple(shlex.split(line, comments=True)): line for page in PAGES for line in _lines(page)}
"""What the pages tell to type, each once, by its words."""


def test_python_blocks_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = _blocks(README, "python")
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "% of the plain ViT's cost" in capsys.readouterr().out
    assert namespace["logits"].shape == (int(namespace["hard"].sum()), namespace["model"].config.num_classes)


@pytest.fixture(scope="module")
def furnished(
    tmp_path_factory: pytest.TempPathFactory, colours: Path, shallow_colour_model: Path, authors_file: Path
) -> Path:
    """A folder where every placeholder of the pages is a file or folder of that name, or may become one."""
    place = tmp_path_factory.mktemp("furnished")
    for name in ("DATA", "IMAGENET"):
        for split in ("train", "val"):
            for colour in COLOURS:
                (place / name / split / colour).mkdir(parents=True)
                for i in range(4):
                    shutil.copy(colours / split / colour / f"{i}.png", place / name / split / colour)
    shutil.copytree(shallow_colour_model, place / "MODEL")
    chosen = calibrate(torch.eye(3), torch.eye(3), torch.arange(3), StageMacs(1, 1, 2), Saving(10))
    write_calibration(chosen, place / "MODEL" / "calibration.json")
    write_calibration(chosen, place / "mine.json")
    shutil.copy(authors_file, place / "authors.pth")
    shutil.copy(colours / "val" / "red" / "0.png", place / "photo.jpg")
    (place / "photos").mkdir()
    shutil.copy(colours / "val" / "blue" / "1.png", place / "photos")
    backbone = timm.create_model("test_vit", num_classes=len(COLOURS), img_size=64, depth=2)
    save_file(backbone.state_dict(), place / "my_vit.safetensors")
    (place / "WEIGHTS").mkdir()
    described = {"architecture": "test_vit", "label_names": list(COLOURS)}
    (place / "WEIGHTS" / "config.json").write_text(json.dumps(described))
    shutil.copy(place / "my_vit.safetensors", place / "WEIGHTS" / "model.safetensors")
    ours = load_file(shallow_colour_model / "model.safetensors").items()
    plain = {name.removeprefix("backbone."): tensor for name, tensor in ours if name.startswith("backbone.")}
    save_file(plain, place / "plain_of_model.safetensors")
    for name in ("PHOTOS", "MORE_PHOTOS"):
        shutil.copytree(colours / "train" / "red", place / name)
    for colour in COLOURS:
        (place / "CALIBRATION" / colour).mkdir(parents=True)
        for i in range(4, 8):
            shutil.copy(colours / "val" / colour / f"{i}.png", place / "CALIBRATION" / colour)
    teacher = timm.create_model("resnet10t", num_classes=len(COLOURS))
    save_file(teacher.state_dict(), place / "teacher.safetensors")
    for image in sorted((place / "DATA" / "train").rglob("*.png")):
        (place / "maps" / image.parent.name).mkdir(parents=True, exist_ok=True)
        torch.save(torch.zeros(2, 1, 18, 18).half(), place / "maps" / image.parent.name / f"{image.stem}.pt")
    return place


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which a command runs."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _in_small(words: Sequence[str]) -> list[str]:
    """The arguments of a cfvit command, with what makes it quick."""
    command, *arguments = words
    if command != "train":  # each line runs alone, so a trained model stands for the run of the line before
        arguments = [{"RUN": "MODEL"}.get(word, word) for word in arguments]
    if command == "train":
        if "--token-labels" in arguments:
            arguments[arguments.index("--token-labels") + 1] = "maps"
            arguments += TINY_LVVIT
        elif "--backbone" in arguments:
            arguments[arguments.index("--backbone") + 1] = "test_vit"
        else:
            arguments += TINY_BACKBONE
        if "finetune" in arguments and "--initial-weights" not in arguments:
            arguments += ["--initial-weights", "my_vit.safetensors"]
        arguments += TINY_TRAINING
    elif command == "token-labels":
        arguments[arguments.index("--teacher") + 1] = "resnet10t"
        arguments += ["--weights", "teacher.safetensors", "--workers", "0"]
    elif command == "reproduce":
        arguments = [{"2h": "1s"}.get(word, word) for word in arguments]
        arguments += ["--workers", "0"] if "--model" in arguments else [*TINY_BACKBONE, *TINY_TRAINING]
        if "--plain" in arguments:
            arguments[arguments.index("--plain") + 1] = "plain_of_model.safetensors"
            arguments += ["--no-speed"]
    elif command == "bench":
        if "--backbone" in arguments:
            arguments[arguments.index("--backbone") + 1] = "test_vit"
        if "--batch-sizes" in arguments:  # to which more would be added
            first = arguments.index("--batch-sizes") + 1
            while arguments[first:] and arguments[first].isdecimal():
                del arguments[first]
            del arguments[first - 1]
        arguments += TINY_BENCH
    elif command == "serve":
        arguments += ["--port", "0"]
    elif command in ("eval", "calibrate"):
        arguments += ["--workers", "0"]
    return [command, *arguments]


def _cfvit_arguments(line: str) -> list[str] | None:
    """What follows ``cfvit`` or ``torchrun ... -m cfvit``; None of any other command."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun" and "-m" in words:
        words = words[words.index("-m") + 1 :]
    return words[1:] if words[0] == "cfvit" else None


@pytest.mark.usefixtures("timed_at_once")
@pytest.mark.parametrize("line", COMMANDS.values())
def test_console_lines_run(
    line: str, place: Path, cfvit_main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _cfvit_arguments(line)
    if arguments is None:
        made = re.fullmatch(r"make (\w+)", line.split("#")[0].strip())
        assert made, f"the tests do not know {line!r}: teach them, or take it out"
        assert re.search(rf"^{made[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    before = {path.name for path in place.iterdir()}
    arguments = _in_small(arguments)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # serve ends as soon as it listens
    outcome = cfvit_main(*arguments)
    assert outcome.status == 0, outcome.err
    promised = {Path(word).name for word in arguments} & {"RUN", "FOLDER", "PLAIN", "pictures", "report"}
    promised |= {"MAPS"} if arguments[0] == "token-labels" else set()
    promised |= {arguments[arguments.index("--output") + 1]} if "--output" in arguments else set()
    assert {path.name for path in place.iterdir()} == before | promised


def test_the_readme_shows_the_main_commands() -> None:
    shown = {(_cfvit_arguments(line) or [""])[0] for line in _lines(README)}
    assert {"predict", "eval", "calibrate", "train", "convert", "bench", "cost", "models"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link.split("#")[0] for link in links if not re.match(r"https?:|#", link)]
    missing = [link for link in inside if not (page.parent / link).exists()]
    assert missing == []

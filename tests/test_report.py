"""The report: a page that holds by itself, whose figures are those of one image at a time."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cfvit import CoarseToFineViT, StageMacs
from cfvit.calibration import Risk, calibrate, rank_images
from cfvit.data import DataSource
from cfvit.evaluation import metrics
from cfvit.evaluation.metrics import Collected, Evaluation
from cfvit.modeling.exit import Exit, confidence_of, goes_on
from cfvit.plots.report import LEVEL, answers_at, class_scores, most_confident, reliability_of, write_report

Fails = Callable[..., AbstractContextManager[None]]

MACS = StageMacs(coarse=1_000_000_000, fine=3_000_000_000, backbone=5_000_000_000)
CLASSES = ("class", "images", "right", "answered at the coarse stage")
DAY = date(2026, 1, 2)
VOID = {"meta", "img", "br", "link", "input", "hr"}
ADDRESSES = {"src", "href", "srcset", "xlink:href", "action", "data", "poster"}


class Page(HTMLParser):
    """A page, taken apart; a tag that is not closed where it should be is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags = text, list[str](), list[tuple[str, dict[str, str | None]]]()
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each such tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, *header: str) -> dict[str, list[str]]:
        """The cells of the first table whose header begins so, by row name."""
        found = next(rows for rows in self.tables if tuple(rows[0][: len(header)]) == header)
        return {row[0]: row[1:] for row in found[1:]}

    def tile(self, name: str) -> str:
        """The figure that stands under a name in the summary."""
        names = [word for word in self.words if word.strip()]
        return names[names.index(name) + 1]


def parse(path: Path) -> Page:
    """A report, checked to be well-formed, accessible and self-contained."""
    page = Page(path.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.tags:
        for name in ADDRESSES & set(attributes):
            assert (attributes[name] or "").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
            if (attributes[name] or "").startswith("#"):
                assert (attributes[name] or "")[1:] in ids
        assert attributes.get("aria-labelledby", ids[0]) in ids
        assert tag not in ("script", "link", "iframe", "object")
    for name in re.findall(r"url\(([^)]*)\)", page.text):
        assert name.startswith("#")
        assert name[1:] in ids
    assert "://" not in page.text
    assert "@import" not in page.text
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("h1")) == len(page.all("style")) == 1
    assert len(page.text) < 2_000_000
    used, set_ = set(re.findall(r"var\((--\w+)\)", page.text)), set(re.findall(r"(--\w+):", page.text))
    assert used <= set_
    return page


def make_collected(count: int, classes: int, seed: int = 0) -> Collected:
    """Logits of two stages that are often right, the second more often."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, classes).float()
    logits = [torch.randn(count, classes, generator=generator) + skill * truth for skill in (1.5, 2.5)]
    return Collected({"coarse": logits[0], "fine": logits[1]}, labels, torch.arange(count), [])


def make_source(count: int, size: tuple[int, int] = (40, 40)) -> DataSource:
    """Noise, of this width and height."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return same_image(Image.fromarray(pixels), count)


def same_image(image: Image.Image, count: int, names: Sequence[str] = ()) -> DataSource:
    """An image again and again, as a data set without a reader."""
    return DataSource(cast(Any, [(image, 0)] * count), list(names))


Write = Callable[..., Path]


@pytest.fixture
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model()


@pytest.fixture
def write(model: CoarseToFineViT, tmp_path: Path) -> Write:
    """``write(collected)``: the path of a report; keyword arguments override the usual ones."""

    def write(collected: Collected, threshold: float = 0.5, **changes: Any) -> Path:
        source = make_source(len(collected.labels) + len(collected.unreadable))
        arguments = {"model": model, "source": source, "model_name": "m", "data_name": "d", "day": DAY, **changes}
        unreadable = [source.name(index) for index in collected.unreadable]
        result = Evaluation(len(collected.labels), [], unreadable, collected, [], threshold, MACS)
        path = tmp_path / "new" / "report.html"
        write_report(path, result, **arguments)
        return path

    return write


def _confidence(logits: Tensor) -> float:
    return float(logits.softmax(-1).max())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_figures_are_those_of_one_image_at_a_time(write: Write, eta: float) -> None:
    collected = make_collected(60, 7)
    page = parse(write(collected, threshold=eta))
    right, exits = Counter[str](), Counter[int]()
    rows = zip(*collected.logits.values(), collected.labels, strict=True)
    for coarse, fine, label in rows:
        hard = eta >= 1 or (eta > 0 and _confidence(coarse) < eta)
        right["coarse"] += int(coarse.argmax() == label)
        right["fine"] += int(fine.argmax() == label)
        right["eta"] += int((fine if hard else coarse).argmax() == label)
        exits[int(label)] += not hard
    exited = sum(exits.values())
    gmacs = (exited * 1 + (60 - exited) * 4) / 60
    assert page.tile("right answers, coarse stage for all") == f"{100 * right['coarse'] / 60:.1f}%"
    assert page.tile("right answers, fine stage for all") == f"{100 * right['fine'] / 60:.1f}%"
    assert page.tile(f"right answers at eta {eta:g}") == f"{100 * right['eta'] / 60:.1f}%"
    assert page.tile("answered at the coarse stage") == f"{100 * exited / 60:.1f}%"
    assert page.tile("mean cost of an image") == f"{gmacs:#.3g} GMACs"
    assert page.tile("saved of the plain backbone's 5.00 GMACs") == f"{100 * (1 - gmacs / 5):.1f}%"
    costs = page.table("image takes")
    assert [row[:2] for row in costs.values()] == [["1.00", str(exited)], ["4.00", str(60 - exited)]]
    classes = page.table(*CLASSES)
    count = Counter(collected.labels.tolist())
    assert {name: (row[0], row[2]) for name, row in classes.items()} == {
        str(label): (str(images), f"{100 * exits[label] / images:.0f}%") for label, images in count.items()
    }
    shares = [exits[int(name)] / count[int(name)] for name in classes]
    assert shares == sorted(shares, reverse=True)
    assert page.table("eta")[f"{eta:g} (in use)"][0].startswith(f"{100 * right['eta'] / 60:.1f}% (")


def test_gains_of_classes_are_counted(write: Write) -> None:
    collected = make_collected(80, 7)
    page = parse(write(collected))
    assert "promised" not in page.text
    hits = [
        Counter(collected.labels[stage.argmax(-1) == collected.labels].tolist()) for stage in collected.logits.values()
    ]
    count = Counter(collected.labels.tolist())
    gains = {label: 100 * (hits[1][label] - hits[0][label]) / count[label] for label in count}
    table = page.table("class", "images", "right at the coarse stage")
    assert set(table) == {str(label) for label, gain in gains.items() if gain > 0}
    for name, row in table.items():
        label = int(name)
        assert row == [str(count[label]), str(hits[0][label]), str(hits[1][label]), f"+{gains[label]:.1f}"]
    shown = [float(row[-1]) for row in table.values()]
    assert shown == sorted(shown, reverse=True)


def test_reliability_is_counted_bin_by_bin() -> None:
    collected = make_collected(200, 7)
    stage = answers_at(collected, Exit(), 0.5).coarse
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for logits, label in zip(collected.logits["coarse"], collected.labels, strict=True):
        sure = _confidence(logits)
        inside[min(int(sure * 15), 14)].append((sure, bool(logits.argmax() == label)))
    error = sum(abs(sum(right for _, right in each) - sum(sure for sure, _ in each)) for each in inside) / 200
    found = reliability_of(stage.probability, stage.right)
    assert found.counts.tolist() == [len(each) for each in inside]
    assert found.hits.tolist() == [sum(right for _, right in each) for each in inside]
    assert found.error == pytest.approx(100 * error, abs=1e-4)


def test_reliability_is_of_probabilities_whatever_eta_is_compared_with() -> None:
    collected = make_collected(50, 7)
    answers = answers_at(collected, Exit("margin", 2.0), 0.3)
    expected = (collected.logits["coarse"] / 2).softmax(-1).amax(-1)
    np.testing.assert_allclose(answers.coarse.probability, expected, rtol=1e-6)
    rule = Exit("margin", 2.0)
    assert answers.gone_on.tolist() == goes_on(rule.coarse(collected.logits["coarse"]), 0.3).tolist()


def test_the_examples_are_the_surest_of_their_kind(write: Write, model: CoarseToFineViT) -> None:
    collected = make_collected(60, 7)
    page = parse(write(collected))
    coarse, fine = collected.logits.values()
    kinds = (
        (coarse.argmax(-1) == collected.labels, coarse),
        ((coarse.argmax(-1) != collected.labels) & (fine.argmax(-1) == collected.labels), fine),
        (fine.argmax(-1) != collected.labels, fine),
    )
    expected: list[int] = []
    for which, logits in kinds:
        chosen = [i for i in range(60) if which[i]]
        expected += sorted(chosen, key=lambda i: -_confidence(logits[i]))[:8]
    alts = [str(image["alt"]) for image in page.all("img")]
    files = [re.findall(r"\(image (\d+)\)", alt)[0] for alt in alts]
    assert [int(file) for file in files] == expected
    split = f"{-(-model.grid[0] * model.grid[1] // 2)} of {model.grid[0] * model.grid[1]} cells split"
    for alt, place in zip(alts, expected, strict=True):
        answers = [f"{stage[place].argmax()}, {_confidence(stage[place]):.1%}" for stage in (coarse, fine)]
        start = f"{collected.labels[place]} (image {place})"
        assert alt == f"{start}: coarse stage {answers[0]}, fine stage {answers[1]}; {split}"


def test_names_that_look_like_html_are_shown_as_they_are(write: Write, model: CoarseToFineViT) -> None:
    evil = "<script>alert('1')</script> & \"$x\" </td>"
    model.class_names = [evil, *"abcdef"]
    collected = make_collected(40, 7)
    page = parse(write(collected, model_name=evil, data_name="<b>$title</b>"))
    assert "<script" not in page.text
    assert evil in page.table(*CLASSES)
    assert any(evil in str(image["alt"]) for image in page.all("img"))
    assert "<b>$title</b>" in page.words


def test_one_image_is_enough(write: Write) -> None:
    page = parse(write(make_collected(1, 7)))
    assert "1 image of 1 of 7 classes" in page.words
    assert page.words.count("There is no such image.") >= 1


def test_what_is_missing_is_said_and_not_ranked(write: Write) -> None:
    collected = make_collected(40, 7)
    collected = replace(collected, labels=collected.labels.clamp(min=2), unreadable=[40])
    page = parse(write(collected))
    assert set(page.table(*CLASSES)) == set("23456")
    assert "Classes '0', '1' have none of the 40 images, so nothing is known of them." in page.words
    assert "1 image could not be read and is not counted: image 40." in page.words


def test_an_answer_that_is_no_number_is_said_and_never_a_class(write: Write) -> None:
    collected = make_collected(6, 7)
    collected.logits["fine"][2] = torch.nan
    page = parse(write(collected))
    assert "The model's answer to 1 image is not a finite number, which counts as wrong." in page.words
    right = int((collected.logits["fine"].argmax(-1) == collected.labels)[torch.arange(6) != 2].sum())
    assert page.tile("right answers, fine stage for all") == f"{100 * right / 6:.1f}%"
    (alt,) = {str(image["alt"]) for image in page.all("img") if "(image 2)" in str(image["alt"])}
    assert "fine stage no number, 0.0%" in alt


def test_a_thousand_classes_make_no_wall(write: Write, make_model: Callable[..., CoarseToFineViT]) -> None:
    collected = make_collected(3000, 1000)
    path = write(collected, model=make_model(num_classes=1000), threshold=0.01)
    page = parse(path)
    tables = [rows for rows in page.tables if rows[0][0] == "class"]
    assert [len(rows) - 1 for rows in tables] == [20, 20, 10]
    scores = class_scores(answers_at(collected, Exit(), 0.01), 1000)
    shares = sorted(score.exit_share for score in scores)
    for rows, sign in zip(tables[:2], (-1, 1), strict=True):  # of equal classes those of most images first
        keys = [(sign * float(row[3][:-1]), sign * float(row[2][:-1]), -int(row[1])) for row in rows[1:]]
        assert keys == sorted(keys)
    shown = [[row[-1] for row in rows[1:]] for rows in tables]
    assert shown[0] == [f"{100 * share:.0f}%" for share in shares[:-21:-1]]
    assert shown[1] == [f"{100 * share:.0f}%" for share in shares[:20]]
    assert len(page.all("svg")) == 3


def test_pictures_keep_the_models_shape(write: Write, make_model: Callable[..., CoarseToFineViT]) -> None:
    collected = make_collected(20, 7)
    page = parse(write(collected, model=make_model(coarse_grid=(3, 5)), source=make_source(20, size=(90, 30))))
    for image in page.all("img"):
        with Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))) as picture:
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
            assert picture.width / picture.height == pytest.approx(5 / 3, rel=0.02)


def test_cells_that_are_not_split_are_grey(write: Write, model: CoarseToFineViT) -> None:
    page = parse(write(make_collected(9, 7), source=same_image(Image.new("RGB", (40, 40), "red"), 9)))
    with Image.open(io.BytesIO(base64.b64decode(str(page.all("img")[0]["src"]).split(",")[1]))) as picture:
        saturation = np.asarray(picture.convert("HSV"))[..., 1].reshape(4, 56, 4, 56).mean(axis=(1, 3))
    assert model.grid == saturation.shape
    assert (saturation > 150).sum() == (saturation < 30).sum() == 8


def test_the_same_input_gives_the_same_page(write: Write) -> None:
    collected = make_collected(30, 7)
    first = write(collected).read_bytes()
    assert write(collected).read_bytes() == first
    assert write(collected, threshold=0.6).read_bytes() != first
    assert b"2026-01-02" in first


def test_a_calibrated_eta_comes_with_its_promise(write: Write) -> None:
    collected = make_collected(400, 7)
    coarse, fine = collected.logits.values()
    calibration = calibrate(coarse, fine, collected.labels, MACS, Risk(0.1))
    page = parse(write(collected, threshold=calibration.threshold, calibration=calibration))
    assert f"What was promised of this eta: {calibration.promise}." in page.words


@pytest.mark.parametrize(("eta", "exits"), [(0.0, 100), (1.0, 0)])
def test_how_many_exit_is_certain_at_the_ends(eta: float, exits: int) -> None:
    collected = make_collected(30, 7)
    coarse, fine = collected.logits.values()
    operation = rank_images(coarse, fine, collected.labels).operate(eta, MACS, LEVEL)
    gmacs = 1.0 if eta == 0 else 4.0
    for estimate, value in (
        (operation.exit_percent, exits),
        (operation.gmacs, gmacs),
        (operation.saving, 100 - 20 * gmacs),
    ):
        assert (estimate.low, estimate.value, estimate.high) == (pytest.approx(value),) * 3
    assert operation.accuracy.low < operation.accuracy.value < operation.accuracy.high


def test_captions_show_only_shares_in_percent(write: Write, model: CoarseToFineViT) -> None:
    model.exit = Exit("entropy")
    collected = make_collected(5, 7)
    for image in parse(write(collected)).all("img"):
        place = int(re.findall(r"\(image (\d+)\)", str(image["alt"]))[0])
        sure = [float(confidence_of(stage[place], "entropy")) for stage in collected.logits.values()]
        assert re.findall(r"stage \d, ([^,;]+)", str(image["alt"])) == [f"{value:.4f}" for value in sure]


@pytest.mark.parametrize("problem", ["file in the way", "no matplotlib"])
def test_a_report_that_cannot_be_written_is_refused_before_the_model_runs(
    problem: str,
    cfvit_main: Callable[..., Any],
    colour_model: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, message = tmp_path / "new" / "report", "install cfvit[plots]"
    if problem == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        (tmp_path / "new").write_text("in the way")
        message = f"cannot write {folder / 'report.html'} ("
    monkeypatch.setattr(metrics, "evaluate_model", lambda *arguments: pytest.fail("the model was run"))
    before = list(tmp_path.iterdir())
    outcome = cfvit_main("eval", "--data", colours, "--model", colour_model, "--report", folder, "--workers", 0)
    assert (outcome.status, outcome.out, len(outcome.err)) == (1, [], 1)
    assert message in outcome.err[0]
    assert list(tmp_path.iterdir()) == before


def test_the_most_confident_takes_the_first_of_equals() -> None:
    confidence = np.array([0.5, 0.9, 0.9, 1.0, 0.9])
    assert most_confident(np.array([True, True, True, False, True]), confidence, 3) == [1, 2, 4]
    assert most_confident(np.zeros(5, dtype=bool), confidence, 3) == []


def test_a_full_disk_leaves_the_old_page(write: Write, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(make_collected(5, 7))
    before = path.read_bytes()

    def full(path: Path, text: str, **options: object) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with fails(r"cannot write .*report.html \(No space left on device\)"):
        write(make_collected(6, 7))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]

"""Models on the Hugging Face Hub, by a fake of its client: no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml

import cfvit
from cfvit.calibration.records import write_calibration
from cfvit.calibration.targets import Saving
from cfvit.checkpoints import save_exit
from cfvit.deploy.hub import model_card
from cfvit.methods.base import create_method
from cfvit.methods.plain import backbone_of


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the Hub: repositories are folders in it."""

    class Api:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            (tmp_path / "hub" / name).mkdir(parents=True, exist_ok=exist_ok)

        def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> None:
            for operation in operations:
                with operation.as_file() as content:
                    (tmp_path / "hub" / name / operation.path_in_repo).write_bytes(content.read())

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "hub"


def test_a_pushed_model_loads_by_its_name(colour_model: Path, hub: Path) -> None:
    cfvit.push_to_hub(colour_model, "owner/colours")
    assert sorted(path.name for path in (hub / "owner" / "colours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded, local = cfvit.load("hf-hub:owner/colours"), cfvit.load(colour_model)
    assert loaded.config == local.config
    assert loaded.exit == local.exit
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))


def test_a_readme_of_the_folder_is_the_card(make_model: Callable[..., Any], hub: Path, tmp_path: Path) -> None:
    cfvit.save(make_model(), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    cfvit.push_to_hub(tmp_path / "model", "owner/mine")
    assert (hub / "owner" / "mine" / "README.md").read_text() == "mine"


def test_the_card_tells_what_each_eta_costs(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    cfvit.save(model, tmp_path)
    plain = model_card(tmp_path, "owner/tiny")
    assert yaml.safe_load(plain.split("---")[1])["library_name"] == "cfvit"
    assert 'cfvit.load("hf-hub:owner/tiny")' in plain
    macs = cfvit.count_macs(model)
    assert f"| {macs.coarse / 1e9:.3f} | {100 * (1 - macs.coarse / macs.backbone):.0f}% |" in plain
    assert "calibrated" not in plain

    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(2, 70, 7, generator=generator)
    chosen = cfvit.calibrate(coarse, fine, torch.arange(70) % 7, macs, Saving(20.0))
    write_calibration(chosen, tmp_path / "calibration.json")
    save_exit(chosen.exit, tmp_path)
    card = model_card(tmp_path, "owner/tiny")
    row = next(line for line in card.splitlines() if f"| {chosen.threshold:.3f}, calibrated |" in line)
    assert row.endswith(f"| {chosen.accuracy.value:.1f} | {chosen.gmacs.value:.3f} | {chosen.saving.value:.0f}% |")
    assert f"{chosen.images} images" in card

    model.threshold = 0.9
    save_exit(model.exit, tmp_path)
    with pytest.warns(UserWarning, match="stale"):
        assert "calibrated" not in model_card(tmp_path, "owner/tiny"), "the record is not of this exit"


@torch.no_grad()
def test_timm_reads_the_plain_vit_of_a_saved_model(
    colour_model: Path, make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """As docs/backbones.md says."""
    model: Any = cfvit.load(colour_model)
    create_method("plain").save(backbone_of(cfvit.load(colour_model)), tmp_path / "plain")
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    images = make_images(model, 2)
    assert torch.equal(plain(images), model.backbone(images))


def test_without_a_network_one_line_tells_so(colour_model: Path, fails: Callable[..., Any]) -> None:
    with fails(r"hf-hub:owner/nowhere cannot be had .*: give a local file or folder instead"):
        cfvit.load("hf-hub:owner/nowhere")
    with fails(r"is not pushed to owner/nowhere .*: check the network"):
        cfvit.push_to_hub(colour_model, "owner/nowhere")


def test_nothing_but_a_model_is_pushed(hub: Path, fails: Callable[..., Any], tmp_path: Path) -> None:
    with fails("no saved model"):
        cfvit.push_to_hub(tmp_path, "owner/empty")
    assert not (hub / "owner").exists()

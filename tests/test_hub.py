"""Models on the Hugging Face Hub, by a fake of its client: no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import resolve_model_data_config

os.environ["USE_TF"] = os.environ["USE_FLAX"] = "0"

import transformers

import cfvit
from cfvit.calibration.calibrated import write_calibration
from cfvit.calibration.targets import Saving
from cfvit.checkpoints import save_exit
from cfvit.deploy.hub import model_card


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
@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("deit_tiny_distilled_patch16_224", {"coarse_grid": (2, 3)}),
        ("eva02_tiny_patch14_224", {"coarse_grid": 2}),
        ("lvvit_tiny_patch16_224", {"coarse_grid": (2, 3)}),
        ("transformers_vit", {"coarse_grid": 2, "patch_size": 4, "pretrained_cfg_overlay": {"crop_pct": 0.5}}),
    ],
)
def test_timm_reads_the_plain_vit_of_a_saved_folder(backbone: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"embed_dim": 24, "num_heads": 2, "depth": 4}
    model: Any = cfvit.create_model(backbone, num_classes=5, **sizes, **kwargs).eval()
    cfvit.save(model, tmp_path)
    images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    plain: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(images), model.backbone(images))
    prepared = resolve_model_data_config(plain)
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in prepared.items()} == model.data_config
    larger: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, img_size=112).eval()
    assert larger(torch.zeros(1, 3, 112, 112)).shape == (1, 2)
    assert torch.equal(larger.blocks[0].norm1.weight, model.backbone.blocks[0].norm1.weight)


@torch.no_grad()
def test_converted_to_timm_a_model_is_read_by_timm_and_by_a_pipeline_of_transformers(
    colour_model: Path, make_images: Callable[..., torch.Tensor], cfvit_main: Callable[..., Any], tmp_path: Path
) -> None:
    assert cfvit_main("convert", colour_model, tmp_path / "plain", "--to", "timm").status == 0
    model: Any = cfvit.load(colour_model)
    images = make_images(model, 2)
    expected = model.backbone(images)
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    assert torch.equal(plain(images), expected)
    theirs: Any = transformers.pipeline("image-classification", model=str(tmp_path / "plain"))
    torch.testing.assert_close(theirs.model(images).logits, expected, rtol=0, atol=1e-6)
    photo = Image.new("RGB", (50, 40), "red")
    best = model.backbone(theirs.image_processor(photo)["pixel_values"]).argmax()
    assert theirs(photo)[0]["label"] == model.class_names[best]
    with pytest.raises(ValueError, match="cfvit"):
        transformers.pipeline("image-classification", model=str(colour_model))
    again = cfvit_main("convert", colour_model, tmp_path / "plain", "--to", "timm")
    assert "already holds a model" in again.err[0]


def test_without_a_network_one_line_tells_so(colour_model: Path, fails: Callable[..., Any]) -> None:
    with fails(r"hf-hub:owner/nowhere cannot be had .*: give a local file or folder instead"):
        cfvit.load("hf-hub:owner/nowhere")
    with fails(r"is not pushed to owner/nowhere .*: check the network"):
        cfvit.push_to_hub(colour_model, "owner/nowhere")


def test_nothing_but_a_model_is_pushed(hub: Path, fails: Callable[..., Any], tmp_path: Path) -> None:
    with fails("no saved model"):
        cfvit.push_to_hub(tmp_path, "owner/empty")
    assert not (hub / "owner").exists()

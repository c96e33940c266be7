"""What methods from other papers have in common: they train, are scored, costed and saved by one protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cfvit import CoarseToFineViT, load
from cfvit.data import open_data
from cfvit.errors import UsageError
from cfvit.evaluation.metrics import evaluate_method
from cfvit.methods.base import Batch, create_method
from cfvit.methods.blocks import attend, attend_kept, embed, project, run
from cfvit.methods.dvt import RelationReuse
from cfvit.methods.dynamicvit import KeepPredictor
from cfvit.methods.evo_vit import evolve
from cfvit.methods.ia_red2 import Interpreter, reward
from cfvit.methods.ps_vit import impact
from cfvit.methods.sit import Mixtures
from cfvit.modeling.config import ModelConfig, Objective
from cfvit.modeling.losses import distillation_loss
from cfvit.modeling.tokens import coarse_image
from cfvit.processes import Process

COMPARATORS = {
    "tome": ["r=13"],
    "evit": ["keep 0.7"],
    "cascade": ["coarse", "fine"],
    "literal": ["coarse", "fine"],
    "dynamicvit": ["keep 0.7"],
    "evo_vit": ["keep 0.5"],
    "sit": ["keep 0.5"],
    "ps_vit": ["masks"],
    "ia_red2": ["above 0.5"],
    "dvt": ["4x4", "6x6", "8x8"],
    "cf_evit": ["coarse", "fine"],
    "msdnet": [f"exit {number}" for number in range(1, 6)],
    "ranet": [f"exit {number}" for number in range(1, 9)],
}
OF_CONVOLUTIONS = ("msdnet", "ranet")


@pytest.fixture
def config(make_model: Callable[..., CoarseToFineViT], monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setattr("cfvit.methods.ranet.LAYERS", 2)  # of 8, which are 50 million weights
    return make_model().config


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_step_of_training_reaches_every_weight(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    method = create_method(name)
    network = method.build(config).train()
    images = make_images(network, 4)
    losses = []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(12):
        loss = method.loss(method.training_module(network), Batch(images, torch.arange(4)), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
def test_convolutional_networks_learn_digits_at_every_exit(name: str, config: ModelConfig) -> None:
    from sklearn.datasets import load_digits  # takes as long to import as torch

    torch.manual_seed(0)
    scans, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (scans.float() / 8 - 1).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    images = torch.nn.functional.interpolate(images, scale_factor=2.0)  # of 16 pixels
    method = create_method(name)
    network = method.build(replace(config, num_classes=10, coarse_grid=2)).train()
    running, optimizer = method.training_module(network), torch.optim.AdamW(network.parameters(), lr=6e-3)
    for step in range(24):
        batch = slice(64 * step, 64 * (step + 1))
        method.loss(running, Batch(images[batch], labels[batch]), 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        answers = method.answers(network.eval(), images[-256:])
    for point, answer in answers.items():
        right = (answer.argmax(dim=-1) == labels[-256:]).float().mean()
        assert right > 0.25, f"{point}: {right}, chance is 0.1"


@pytest.mark.parametrize("name", [name for name in COMPARATORS if name not in OF_CONVOLUTIONS])
def test_without_labels_it_learns_a_teachers_answers(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    method = create_method(
        name, Objective(label_weight=0.0, coarse_fine_weight=0.0, fine_teacher_weight=2.0, coarse_teacher_weight=1.0)
    )
    network = method.build(config).train()
    images, teacher = make_images(network, 4), 5 * torch.eye(4, config.num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    running = method.training_module(network)
    for _ in range(25):
        method.loss(running, Batch(images, None, teacher), 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    for answer in method.answers(network.eval(), images).values():
        assert (answer.argmax(dim=-1) == torch.arange(4)).float().mean() >= 0.75


@pytest.mark.parametrize("name", COMPARATORS)
def test_it_is_scored_and_costed_at_each_operating_point(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    method = create_method(name)
    network = method.build(config).eval()
    images = make_images(network, 3)
    answers, macs = method.answers(network, images), method.macs(network)
    assert list(answers) == list(macs) == list(method.points(network)) == COMPARATORS[name]
    assert all(answer.shape == (3, config.num_classes) for answer in answers.values())
    assert sorted(macs.values()) == list(macs.values()), "cheapest first"
    for point, answer in answers.items():
        torch.testing.assert_close(method.points(network)[point](images), answer)


@pytest.mark.parametrize("name", ["tome", "evit", "evo_vit"])
def test_a_plain_network_is_saved_in_timms_format(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method(name)
    network = method.build(config, class_names=list("abcdefg")).eval()
    method.save(network, tmp_path)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = make_images(network, 2)
    torch.testing.assert_close(read(images), network(images))


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_saved_network_is_loaded_with_its_exit(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method(name)
    network = method.build(config, class_names=list("abcdefg")).eval()
    chosen = method.choose_exit(network, method.answers(network, make_images(network, 4)), torch.arange(4), 100.0)
    method.save(network, tmp_path)
    read = method.load(method.build(config), tmp_path)
    images = make_images(network, 2)
    for answer, expected in zip(
        method.answers(read, images).values(), method.answers(network, images).values(), strict=True
    ):
        torch.testing.assert_close(answer, expected)
    assert method.choose_exit(read, method.answers(read, make_images(network, 4)), torch.arange(4), 100.0) == chosen
    assert not hasattr(network, "exit") or read.exit == network.exit


@pytest.mark.parametrize("content", ["{", "5", '{"eta": 7}', '{"et": 0.5}', None])
def test_an_exit_that_is_damaged_is_told(
    content: str | None, config: ModelConfig, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    method = create_method("cf_evit")
    network = method.build(config)
    method.save(network, tmp_path)
    (tmp_path / "exit.json").unlink()
    if content is not None:
        (tmp_path / "exit.json").write_text(content)
    with fails("is damaged .*: remove it to train it again"):
        method.load(network, tmp_path)


def test_both_networks_of_a_cascade_are_saved_in_timms_format(config: ModelConfig, tmp_path: Path) -> None:
    method = create_method("cascade")
    network = method.build(config, class_names=list("abcdefg")).eval()
    method.save(network, tmp_path)
    for name in ("small", "large"):
        read = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        images = torch.randn(2, 3, *getattr(network, name).image_size)
        torch.testing.assert_close(read(images), getattr(network, name)(images))


def test_the_literal_port_is_saved_as_the_model_that_it_is(
    config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method("literal")
    network = method.build(config).eval()
    method.save(network, tmp_path)
    images = make_images(network, 2)
    torch.testing.assert_close(load(tmp_path).eval()(images).fine, network(images).fine, rtol=1e-4, atol=1e-4)


ON_PLAIN_VITS = [name for name in COMPARATORS if name not in ("cascade", *OF_CONVOLUTIONS)]


@pytest.mark.parametrize("name", ON_PLAIN_VITS)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled"),
        ({"reg_tokens": 2}, "no other token"),
        ({"dynamic_img_size": True}, "images of one size.*--timm-kwargs.dynamic-img-size false"),
    ],
)
def test_other_backbones_are_refused(
    name: str, options: dict[str, Any], reason: str, make_model: Callable[..., CoarseToFineViT]
) -> None:
    with pytest.raises(UsageError, match=reason):
        create_method(name).build(make_model(**options).config)


@pytest.mark.parametrize("options", [{"selection": "random"}, {"feature_reuse": "none"}])
def test_the_literal_port_has_no_variants(options: dict[str, Any], make_model: Callable[..., CoarseToFineViT]) -> None:
    with pytest.raises(UsageError, match="selection and feature reuse"):
        create_method("literal").build(make_model(**options).config)


def test_the_literal_port_has_no_convolutional_stem(make_model: Callable[..., CoarseToFineViT]) -> None:
    with pytest.raises(UsageError, match="not LVViT"):
        create_method("literal").build(make_model(backbone="lvvit_tiny_patch16_224", patch_size=8).config)


@pytest.mark.parametrize(
    ("name", "options", "backbone", "printed"),
    [
        ("plain", {}, "deit_small_patch16_224", "4.6"),
        ("tome", {}, "deit_small_patch16_224", "2.7"),
        ("tome", {"merged": 8}, "deit_small_patch16_224", "3.4"),
        ("evit", {}, "deit_small_patch16_224", "3.0"),
        ("evit", {"keep_rate": 0.5}, "deit_small_patch16_224", "2.3"),
        ("evit", {}, "lvvit_small_patch16_224", "4.7"),
        ("dynamicvit", {}, "deit_small_patch16_224", "2.9"),
        ("dynamicvit", {}, "lvvit_small_patch16_224", "4.6"),
        ("evo_vit", {}, "deit_small_patch16_224", "3.0"),
        ("ps_vit", {}, "deit_small_patch16_224", "2.6"),
        ("ia_red2", {}, "deit_small_patch16_224", "3.2"),
    ],
)
def test_costs_are_those_that_the_papers_print(name: str, options: dict[str, Any], backbone: str, printed: str) -> None:
    method = create_method(name, options=options)
    with torch.device("meta"):
        network = method.build(ModelConfig(backbone=backbone))
    (macs,) = method.macs(network).values()
    assert abs(macs / 1e9 - float(printed)) < 0.1


def test_dvt_needs_three_sizes(config: ModelConfig, fails: Callable[..., Any]) -> None:
    with fails("a grid of 2x2 patches has no three sizes: give a --coarse-grid above 1", UsageError):
        create_method("dvt").build(replace(config, coarse_grid=1))


def test_msdnets_exits_cost_what_its_authors_print() -> None:
    """Theirs, in millions, count norms and activations besides."""
    method = create_method("msdnet")
    with torch.device("meta"):
        network = method.build(ModelConfig(backbone="deit_small_patch16_224"))
    printed = (339.90, 685.46, 1008.16, 1254.47, 1360.53)
    for macs, expected in zip(method.macs(network).values(), printed, strict=True):
        assert 0.99 * expected < macs / 1e6 < expected


def test_ranets_exits_cost_what_the_page_says() -> None:
    method = create_method("ranet")
    with torch.device("meta"):
        macs = method.macs(method.build(ModelConfig(backbone="deit_small_patch16_224")))
    page = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text()
    assert f"| `ranet` | {', '.join(f'{count / 1e9:.2f}' for count in macs.values())} at its" in page


@pytest.mark.parametrize("name", ["dvt", *OF_CONVOLUTIONS])
def test_an_exit_costs_all_that_ran_before_it(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    method = create_method(name)
    network = method.build(config).eval()
    image, (_, second, *_) = make_images(network, 1), method.macs(network).values()
    with FlopCounterMode(display=False) as counter:
        network(image, 2)
    assert counter.get_total_flops() == 2 * second


@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
def test_networks_of_convolutions_start_from_scratch_on_images_as_the_backbone_takes_them(
    name: str, config: ModelConfig, fails: Callable[..., Any]
) -> None:
    with fails(f"{name} has no use for weights of a ViT", UsageError):
        create_method(name).build(config, "weights.safetensors")
    halves = replace(config, backbone="vit_tiny_patch16_224", timm_kwargs={**config.timm_kwargs, "depth": 1})
    network = create_method(name).build(halves)
    assert network.data_config == create_method("plain").build(halves).data_config
    assert network.data_config["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
@pytest.mark.usefixtures("config")  # fewer layers
def test_no_convolution_halves_a_map_of_one_pixel(name: str, grid: int, make_images: Callable[..., Tensor]) -> None:
    """oneDNN leaves a part of that convolution's gradient in bfloat16 unwritten."""

    def check(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert convolution.stride == (1, 1) or max(inputs[0].shape[-2:]) > 1

    network = create_method(name).build(ModelConfig(backbone="deit_tiny_patch16_224", coarse_grid=grid))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(check)
    network.eval()(make_images(network, 1))


def test_a_network_of_ranet_sees_the_one_before_it_alone(
    config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    method = create_method("ranet")
    network = method.build(config).eval().requires_grad_(False)
    images = make_images(network, 2)
    before = method.answers(network, images)
    for parameter in network.networks[1].parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    after = method.answers(network, images)
    same = [torch.equal(before[name], after[name]) for name in network.exits]
    assert same == [True, True, *[False] * 6], "the first network's exits know nothing of the second"


def test_options_are_those_of_the_method(fails: Callable[..., Any]) -> None:
    with fails("no field 'keep_rat': did you mean 'keep_rate'", UsageError):
        create_method("evit", options={"keep_rat": 0.5})
    with fails("keep_rate is 1.5: give at most 1", UsageError):
        create_method("evit", options={"keep_rate": 1.5})
    with fails("no field 'keep_rate': leave it out", UsageError):
        create_method("plain", options={"keep_rate": 0.5})


# What fails if a method is wrong


@pytest.fixture
def build(make_model: Callable[..., CoarseToFineViT]) -> Callable[..., tuple[Any, Any]]:
    """A method and its network, whose backbone has weights that are far from symmetry, in evaluation mode."""

    def make(name: str, kwargs: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = make_model(**kwargs or {})
        method = create_method(name, options=options)
        network = method.build(model.config)
        getattr(network, "backbone", network).load_state_dict(model.backbone.state_dict())
        return method, network.eval().requires_grad_(False)

    return make


HEADS: list[dict[str, Any]] = [{}, {"backbone": "lvvit_tiny_patch16_224", "patch_size": 8}]
"""Of the class token alone, and of all patches."""


@pytest.mark.parametrize("name", ["evit", "dynamicvit", "evo_vit", "sit", "ia_red2"])
def test_who_keeps_all_answers_as_the_plain_network(
    name: str, build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    method, network = build(name, **({} if name == "ia_red2" else {"keep_rate": 1.0}))  # which at first keeps all
    images = make_images(network, 3)
    (answer,) = method.answers(network, images).values()
    torch.testing.assert_close(answer, getattr(network, "backbone", network)(images), rtol=1e-5, atol=1e-5)


def test_dropped_tokens_are_as_if_they_were_not_there_and_their_decisions_have_gradients(
    build: Callable[..., Any],
) -> None:
    block = build("plain")[1].blocks[0]
    tokens, kept = torch.randn(2, 9, 48), torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1, 0]).repeat(2, 1).requires_grad_()
    masked = attend_kept(block, tokens, kept)
    there = kept[0] > 0
    torch.testing.assert_close(masked[:, there], attend(block, tokens[:, there])[0], rtol=1e-5, atol=1e-5)
    itself_too = attend(block, tokens[:, [0, 1, 3, 6, 7, 2]])[0]
    torch.testing.assert_close(masked[:, 2], itself_too[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend_kept(block, tokens, torch.ones(2, 9)), attend(block, tokens)[0])
    (gradient,) = torch.autograd.grad(masked[:, there].square().sum(), kept)
    assert (gradient[:, ~there] != 0).all()


class ByPlace(nn.Module):
    """In place of a predictor: surely keeps the last ``share`` of the patches, the later the rather."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        places = torch.linspace(1, 0, patches.shape[1])
        scores = 1e4 * (self.share - places)
        return torch.stack([scores, -scores], dim=-1).expand(len(patches), -1, -1)


def test_dynamicvits_predictor_sees_a_patch_and_the_mean_of_those_that_are_kept() -> None:
    torch.manual_seed(0)
    patches, kept = torch.randn(1, 6, 8), torch.tensor([[1.0, 1, 0, 1, 0, 0]])
    predict = KeepPredictor(8)
    torch.testing.assert_close(predict(patches, kept)[:, [0, 1, 3]], predict(patches[:, [0, 1, 3]], torch.ones(1, 3)))
    assert not torch.allclose(predict(patches, kept)[:, 0], predict(patches[:, :1], torch.ones(1, 1))[:, 0])


def test_dynamicvit_keeps_the_patches_of_highest_score(
    build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    _, network = build("dynamicvit", keep_rate=0.5)
    network.predictors = nn.ModuleList(ByPlace(0.5) for _ in range(3))
    images, vit = make_images(network, 2), network.backbone
    tokens = embed(vit, images)
    for index, block in enumerate(vit.blocks):
        if index in (1, 2, 3):  # of five blocks
            tokens = torch.cat([tokens[:, :1], tokens[:, -(64 >> index) :]], dim=1)
        tokens = block(tokens)
    torch.testing.assert_close(network(images), vit.forward_head(vit.norm(tokens)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", HEADS)
def test_dynamicvits_drawn_decisions_are_the_sure_ones_and_drop_what_inference_drops(
    kwargs: dict[str, Any], build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    method, network = build("dynamicvit", kwargs, keep_rate=0.5)
    network.predictors = nn.ModuleList(ByPlace(0.5**stage) for stage in (1, 2, 3))
    images = make_images(network, 2)
    tokens, kept, shares = network.decide(images)
    assert torch.stack(shares).tolist() == [[0.5] * 2, [0.25] * 2, [0.125] * 2]
    assert kept.tolist() == [[0.0] * 56 + [1.0] * 8] * 2
    logits, imitation = method.training_module(network)(images)
    torch.testing.assert_close(logits, network(images), rtol=1e-5, atol=1e-5)
    vit = network.backbone
    distance = (tokens - vit.forward_features(images))[:, -8:].square().mean()  # of the patches that are kept
    expected = 0.5 * distance + 0.5 * distillation_loss(logits, vit(images))
    torch.testing.assert_close(imitation, expected)
    network.predictors[2] = ByPlace(1.0)  # what is dropped does not come back
    assert network.decide(images)[1].tolist() == [[0.0] * 48 + [1.0] * 16] * 2
    network.predictors[2] = ByPlace(0.125)
    network.shares = dict.fromkeys(network.shares, 0.25)  # wanted, where 0.5, 0.25 and 0.125 are kept
    torch.testing.assert_close(method.training_module(network)(images)[1], expected + 2 * (0.25**2 + 0.125**2) / 3)


def test_evo_vit_moves_all_that_bypass_a_block_alike(build: Callable[..., Any]) -> None:
    block = build("plain")[1].blocks[0]
    tokens, average = torch.randn(1, 7, 48), torch.tensor([[0.1, 0.3, 0.05, 0.25, 0.1, 0.2]])
    after, attention = evolve(block, tokens, average, 3)
    slow, fast = [2, 4, 6], [1, 5, 3]  # tokens, by falling attention
    weights = torch.tensor([0.1, 0.1, 0.05]) / 0.25
    representative = (weights[:, None] * tokens[0, fast]).sum(dim=0)
    alone = block(torch.cat([tokens[:, [0, *slow]], representative[None, None]], dim=1))
    torch.testing.assert_close(after[:, :4], alone[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[0, 4:] - tokens[0, fast], (alone[0, 4] - representative).expand(3, -1))
    assert attention[0, 3:].tolist() == average[0, [0, 4, 2]].tolist()
    query, key, _ = project(block.attn, block.norm1(torch.cat([tokens[0, [0, *slow]], representative[None]])[None]))
    row = (query[:, :, :1] * block.attn.scale @ key.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)[0, 0, 1:4]
    torch.testing.assert_close(attention[0, :3], 0.5 * average[0, [1, 3, 5]] + 0.5 * row)


def test_evo_vit_learns_by_the_class_token_and_by_the_mean_patch(
    build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    method, vit = build("evo_vit", keep_rate=1.0)
    batch = Batch(make_images(vit, 2), torch.tensor([1, 2]))
    tokens = vit.forward_features(batch.images)
    answers = vit.head(tokens[:, 0]), vit.head(tokens[:, 1:].mean(dim=1))
    expected = torch.stack([method.answer_loss(answer, batch) for answer in answers]).mean()
    torch.testing.assert_close(method.loss(method.training_module(vit), batch, 1.0), expected)


def test_sits_new_tokens_are_means_of_old_ones() -> None:
    torch.manual_seed(0)
    mixtures = Mixtures(8, 5)
    for parameter in mixtures.parameters():
        nn.init.normal_(parameter)
    constant = torch.randn(1, 1, 8).expand(2, 9, 8)
    torch.testing.assert_close(mixtures(constant), constant[:, :5])
    tokens = torch.randn(2, 9, 8)
    assert (mixtures(tokens) <= tokens.amax(dim=1, keepdim=True) + 1e-6).all()
    assert (mixtures(tokens) >= tokens.amin(dim=1, keepdim=True) - 1e-6).all()


def test_sit_learns_from_each_layer_of_the_unslimmed_network(
    build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    method, network = build("sit")
    nn.init.constant_(network.slim[0].scale, 0.0)  # all its tokens become the mean
    images, vit = make_images(network, 2), network.backbone
    own, wanted, distances = embed(vit, images), embed(vit, images), []
    for index, block in enumerate(vit.blocks):
        if index >= 2:  # stages begin at blocks 2, 3 and 4 of five
            own = torch.cat([own[:, :1], network.slim[index - 2](own[:, 1:])], dim=1)
        if index == 2:
            torch.testing.assert_close(own[:, 1:], wanted[:, 1:].mean(dim=1, keepdim=True).expand(-1, 32, -1))
        own, wanted = block(own), block(wanted)
        a, b = (vit.norm(tokens) if index == 4 else tokens for tokens in (own, wanted))
        a = network.restore[index - 2](a[:, 1:]) if index >= 2 else a[:, 1:]
        distances.append((a - b[:, 1:]).square().mean())
    _, imitation = method.training_module(network)(images)
    divergence = distillation_loss(vit.forward_head(vit.norm(own)), vit(images))
    torch.testing.assert_close(imitation, 2 * torch.stack(distances).mean() + 2 * divergence)


def test_sit_has_fewer_tokens_from_stage_to_stage(make_model: Callable[..., CoarseToFineViT]) -> None:
    method = create_method("sit")
    network = method.build(make_model(depth=16).config)
    images = torch.randn(1, 3, *network.image_size)
    after: list[Tensor] = []
    run(network.backbone, images, network.reduce, after)
    counts = [tokens.shape[1] - 1 for tokens in after]
    assert counts == [64] * 9 + [32] * 3 + [16] * 2 + [8] * 2


def test_ps_vit_chooses_nested_masks_from_the_last_block_to_the_first(
    build: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    counts, errors = [], []
    for tolerance in (0.001, 0.1, 0.5):
        method, network = build("ps_vit", tolerance=tolerance)
        images = make_images(network, 3)
        method.training_module(network)(images)
        vit, plan = network.backbone, network.plan.tolist()
        assert plan == sorted(plan, reverse=True)
        assert sorted(network.order.tolist()) == list(range(64))
        before = vit.blocks[:-1](embed(vit, images))
        first = impact(vit.blocks[-1], before, torch.tensor([0]))[1:].argsort(descending=True)
        assert network.order[: plan[-1]].tolist() == first[: plan[-1]].tolist()
        needed = torch.cat([torch.zeros(1, dtype=torch.long), network.order[: plan[-1]] + 1])
        scores = impact(vit.blocks[-2], vit.blocks[:-2](embed(vit, images)), needed).index_fill(0, needed, -torch.inf)
        more = scores.argsort(descending=True)[: plan[-2] - plan[-1]] - 1
        assert network.order[plan[-1] : plan[-2]].tolist() == more.tolist()
        (answer,) = method.answers(network, images).values()
        counts.append(sum(plan))
        errors.append((answer - vit(images)).norm().item())
        assert method.answers(network, images[:1])["masks"].shape == (1, 7)
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3
    assert errors == sorted(errors)


def test_ps_vits_masks_are_saved_with_it(
    build: Callable[..., Any], make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method, network = build("ps_vit", tolerance=0.5)
    images = make_images(network, 3)
    method.training_module(network)(images)
    method.save(network, tmp_path)
    _, read = build("ps_vit", tolerance=0.5)
    read = method.load(read, tmp_path)
    assert method.macs(read) == method.macs(network) != method.macs(build("ps_vit")[1])
    torch.testing.assert_close(method.answers(read, images), method.answers(network, images))


@pytest.fixture
def choosy(request: pytest.FixtureRequest, build: Callable[..., Any]) -> tuple[Any, Any]:
    """IA-RED2 with interpreters that drop some patches of each image."""
    method, network = build("ia_red2", getattr(request, "param", None))
    for interpreter in network.interpreters:
        interpreter.bias.zero_()
        nn.init.normal_(interpreter.policy)
        nn.init.normal_(interpreter.query.weight, std=0.3)
    return method, network


@pytest.mark.parametrize("choosy", HEADS, indirect=True)
def test_ia_red2_drops_what_it_masks_in_training(choosy: tuple[Any, Any], make_images: Callable[..., Tensor]) -> None:
    method, network = choosy
    images = make_images(network, 4)
    *_, greedy_logits, greedy_shares = method.training_module(network)(images)
    assert greedy_shares[:, -1].unique().numel() > 1, "images keep different numbers"
    assert 0 < greedy_shares.min() < greedy_shares.max() < 1
    torch.testing.assert_close(network(images), greedy_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([network(image[None]) for image in images]), network(images))


def test_ia_red2_costs_what_its_images_keep(choosy: tuple[Any, Any], make_images: Callable[..., Tensor]) -> None:
    method, network = choosy
    images, before = make_images(network, 1), network.plan.clone()
    *_, (shares,) = method.training_module(network)(images)
    assert network.plan.tolist() == before.tolist(), "training counts nothing"
    with FlopCounterMode(display=False) as counter:
        method.answers(network, images)
    torch.testing.assert_close(network.plan[:3] / 1e6, shares, rtol=0, atol=1e-6)
    assert method.macs(network) == {"above 0.5": pytest.approx(counter.get_total_flops() / 2, rel=2e-3)}


def test_ia_red2_counts_each_image_that_it_answers_once(
    choosy: tuple[Any, Any], config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method, network = choosy
    images = make_images(network, 5)
    for part in images.split([1, 4]):
        method.answers(network, part)
    counted = network.plan.clone()
    assert counted[3] == 5
    method.save(network, tmp_path)
    read = method.load(method.build(config), tmp_path)
    assert method.macs(read) == method.macs(network), "until it has answered images itself"
    method.answers(read, images)
    torch.testing.assert_close(read.plan, counted, rtol=0, atol=2)


def test_ia_red2_is_scored_beside_what_the_scored_images_cost(choosy: tuple[Any, Any], colours: Path) -> None:
    method, network = choosy
    source = open_data(str(colours), "validation")
    network.class_names = source.class_names
    (before,) = method.macs(network).values()
    scores = evaluate_method(method, network, source, 4, 0, Process(0, 1, torch.device("cpu")))
    (cost,) = method.macs(network).values()
    assert scores.stages[0].gmacs == pytest.approx(cost / 1e9) != pytest.approx(before / 1e9)


def test_ia_red2_rewards_right_answers_from_few_patches() -> None:
    logits, answer = torch.tensor([[2.0, 1], [2, 1], [2, 1]]), torch.tensor([0, 0, 1])
    shares = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0]])
    assert reward(logits, shares, answer, 3.0).tolist() == [0.75, 0.0, -3.0]


def test_ia_red2_learns_by_reward_above_that_of_its_likeliest_decisions() -> None:
    method, logits, answer = create_method("ia_red2"), torch.tensor([[2.0, 1], [2, 1]]), torch.tensor([0, 1])
    log_probability, drawn, greedy = torch.tensor([-1.0, -2]), torch.full((2, 3), 0.5), torch.ones(2, 3)
    loss = method.loss(lambda images: (logits, drawn, log_probability, logits, greedy), Batch(logits, answer), 1.0)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, answer) + 0.75 * 1 / 2)  # both wrong: nothing


def test_ia_red2_scores_by_the_mean_of_the_heads() -> None:
    interpreter = Interpreter(4, 2)
    nn.init.zeros_(interpreter.query.weight)
    with torch.no_grad():
        interpreter.query.bias.copy_(torch.tensor([1e4, 1e4, -3e4, -3e4]))
        interpreter.key.weight.zero_()
        interpreter.key.bias.fill_(1.0)
    assert interpreter(torch.randn(1, 1, 4)).item() == 0.5, "one head is sure to keep it, the other to drop it"


def test_dvts_exits_are_its_networks_until_reuse_is_learnt(
    build: Callable[..., Any], config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    plain_method, plain = build("plain")
    plain_method.save(plain, tmp_path)
    method = create_method("dvt")
    network = method.build(config, str(tmp_path)).eval().requires_grad_(False)
    images = make_images(network, 4)
    first, _, last = method.answers(network, images).values()
    torch.testing.assert_close(last, plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, network.vits[0](coarse_image(images)))
    for vit in network.vits[1:]:
        vit.blocks[0].mlp.fc1.weight[:, -48:] = 0.1
    with_features = method.answers(network, images)["8x8"]
    assert (with_features - last).abs().max() > 1e-3
    for relation in network.relations:
        nn.init.normal_(relation.last.weight, std=0.1)
    assert (method.answers(network, images)["8x8"] - with_features).abs().max() > 1e-3
    torch.testing.assert_close(method.answers(network, images)["4x4"], first)


def test_dvt_hands_on_the_attention_of_all_blocks_by_query_and_key(
    config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    network = create_method("dvt").build(config).eval().requires_grad_(False)
    images = make_images(network, 1)
    _, relations = network.stage(0, images, None).features
    vit = network.vits[0]
    query, key, _ = project(vit.blocks[0].attn, vit.blocks[0].norm1(embed(vit, coarse_image(images))))
    torch.testing.assert_close(relations[:, :3], query * vit.blocks[0].attn.scale @ key.transpose(-2, -1))
    assert (relations[:, 3:].flatten(2).std(dim=2) > 0).all()
    reuse = RelationReuse(1).requires_grad_(False)
    for linear in (reuse.first, reuse.last):
        nn.init.ones_(linear.weight)
        nn.init.zeros_(linear.bias)
    by_query = 10 + torch.arange(5.0)[:, None].expand(5, 5)  # where GELU does nothing
    made = reuse(by_query[None, None], (2, 2), (3, 3))[0, 0]
    torch.testing.assert_close(
        made, torch.tensor([10, 11, 11.5, 12, 12, 12.5, 13, 13, 13.5, 14])[:, None].expand(10, 10)
    )


def test_dvt_exits_by_confidence(config: ModelConfig, make_images: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    method = create_method("dvt")
    network = method.build(config).eval().requires_grad_(False)
    for vit in network.vits:
        nn.init.normal_(vit.head.weight)  # timm begins with zeros
    images = make_images(network, 6)
    answers = list(method.answers(network, images).values())
    network.etas.copy_(torch.tensor([answers[0].softmax(-1).amax(-1).median() + 1e-6, 0.0]))
    stages: Any = method.exits(network, method.answers(network, images))
    assert stages.tolist() == (answers[0].softmax(-1).amax(-1) < network.etas[0]).long().tolist()
    assert sorted(stages.tolist()) == [0] * 3 + [1] * 3
    chosen = method.choose_exit(network, method.answers(network, images), answers[2].argmax(dim=-1), 100.0)
    assert list(chosen.values()) == [pytest.approx(eta) for eta in reversed(network.etas.tolist())]
    stages = method.exits(network, method.answers(network, images))
    assert stages.tolist() == [0] * 6, "all accuracy may be lost"


def test_cf_evit_is_cf_vit_but_for_its_fine_stage(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model()
    images = make_images(model, 3)
    costs = {}
    for keep in (1.0, 0.5):
        method = create_method("cf_evit", options={"keep_rate": keep})
        network = method.build(model.config).eval()
        network.load_state_dict(model.state_dict())
        coarse, fine = method.answers(network, images).values()
        costs[keep] = method.macs(network)
        torch.testing.assert_close(coarse, model(images).coarse)
        same = torch.allclose(fine, model(images).fine, rtol=1e-4, atol=1e-5)
        assert same == (keep == 1.0)
    assert costs[1.0] == pytest.approx(create_method("cf_vit").macs(model), rel=1e-3)
    assert costs[0.5]["coarse"] == costs[1.0]["coarse"]
    assert costs[0.5]["fine"] < costs[1.0]["fine"]

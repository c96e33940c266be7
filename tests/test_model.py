"""Both stages against the literal reference and against timm, and the errors of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from reference import Reference, ReferenceState
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from cfvit import CfvitError, CoarseState, CoarseToFineViT, count_macs, create_model
from cfvit.modeling.config import Objective, Reuse
from cfvit.modeling.exit import Exit
from cfvit.modeling.losses import coarse_to_fine_loss

MakeModel = Callable[..., CoarseToFineViT]
MakeImages = Callable[..., Tensor]


VARIANTS: list[dict[str, str]] = [
    {"selection": "negative"},
    {"feature_reuse": "linear"},
    {"feature_reuse": "none"},
    {"feature_reuse": "class_token"},
    {"feature_reuse": "uninformative"},
    {"selection": "negative", "feature_reuse": "uninformative"},
]
"""Of Tables 4 and 5, as overrides of ``create_model``; random cells have tests of their own."""


def _in_words(variant: dict[str, str]) -> str:
    return "-".join(variant.values())


def _assert_states_equal(actual: CoarseState, expected: CoarseState) -> None:
    for f in fields(CoarseState):
        assert torch.equal(getattr(actual, f.name), getattr(expected, f.name)), f.name


def _without_feature_reuse(model: CoarseToFineViT) -> CoarseToFineViT:
    for name in ("weight", "bias"):
        nn.init.zeros_(model.get_parameter(f"feature_reuse.mlp.fc2.{name}"))
    return model


class TestReference:
    """Parity with the paper's equations written out."""

    @staticmethod
    def _both(model: CoarseToFineViT, images: Tensor) -> tuple[CoarseState, Tensor, ReferenceState, Tensor]:
        config = model.config
        reference = Reference(
            model.state_dict(),
            heads=3,
            grid=model.grid[0],
            patch=model.image_size[0] // (2 * model.grid[0]),
            ratio=config.informative_ratio,
            momentum=config.attention_momentum,
            selection=config.selection,
            reuse=config.feature_reuse,
        )
        with torch.no_grad():
            state = model.coarse(images)
            expected = reference.coarse(images)
            return state, model.fine(images, state), expected, reference.fine(images, expected)

    def _check(self, model: CoarseToFineViT, images: Tensor) -> None:
        state, fine, expected, expected_fine = self._both(model, images)
        torch.testing.assert_close(state.logits, expected.logits, atol=1e-5, rtol=1e-5)
        prefix = expected.tokens.shape[1] - state.tokens.shape[1]
        assert prefix == model.backbone.num_prefix_tokens
        torch.testing.assert_close(state.class_token, expected.tokens[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.tokens, expected.tokens[:, prefix:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.embedding, expected.embedding, atol=1e-5, rtol=1e-5)
        ranked_by = -state.class_attention if model.config.selection == "negative" else state.class_attention
        torch.testing.assert_close(ranked_by, expected.class_attention, atol=0, rtol=1e-5)
        torch.testing.assert_close(fine, expected_fine, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
    @pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("grid", [7, 9])
    def test_the_papers_grids(
        self, grid: int, ratio: float, momentum: float, make_model: MakeModel, make_images: MakeImages
    ) -> None:
        model = make_model(coarse_grid=grid, informative_ratio=ratio, attention_momentum=momentum)
        self._check(model, make_images(model, 2))

    def test_other_sizes(self, make_model: MakeModel, make_images: MakeImages) -> None:
        """A small odd grid, the usual 16-pixel patches, more blocks."""
        model = make_model(coarse_grid=3, patch_size=16, depth=7, seed=1)
        self._check(model, make_images(model, 3))

    @pytest.mark.parametrize(("grid", "ratio"), [(3, 0.5), (4, 0.25), (3, 1.0)], ids=["ceil", "exact", "all"])
    @pytest.mark.parametrize("variant", VARIANTS, ids=_in_words)
    def test_the_papers_variants(
        self, variant: dict[str, str], grid: int, ratio: float, make_model: MakeModel, make_images: MakeImages
    ) -> None:
        model = make_model(coarse_grid=grid, informative_ratio=ratio, **variant)
        self._check(model, make_images(model, 2))

    @pytest.mark.parametrize("reuse", ["mlp", "class_token", "uninformative"])
    @pytest.mark.parametrize(
        "prefix", [{"backbone": "deit_tiny_distilled_patch16_224"}, {"reg_tokens": 2}], ids=["distilled", "registers"]
    )
    def test_other_tokens_in_front_get_no_reuse(
        self, prefix: dict[str, Any], reuse: str, make_model: MakeModel, make_images: MakeImages
    ) -> None:
        model = make_model(coarse_grid=3, feature_reuse=reuse, **prefix)
        self._check(model, make_images(model, 2))

    def test_random_cells_are_split_as_others_are(self, make_model: MakeModel, make_images: MakeImages) -> None:
        """The reference ranks by the numbers that were drawn."""
        model = make_model(coarse_grid=3, selection="random")
        images = make_images(model, 2)
        reference = Reference(model.state_dict(), heads=3, grid=3, patch=4, ratio=0.5, momentum=0.99)
        with torch.no_grad():
            state = model.coarse(images)
            expected = replace(reference.coarse(images), class_attention=state.class_attention)
            torch.testing.assert_close(
                model.fine(images, state), reference.fine(images, expected), atol=1e-5, rtol=1e-5
            )

    def test_the_reference_sees_each_choice(self, make_model: MakeModel, make_images: MakeImages) -> None:
        """Parity proves something only if these settings matter to the reference's answer."""
        model = make_model()
        images = make_images(model, 2)
        answer = self._both(model, images)[3]
        for override in ({"informative_ratio": 0.3}, {"attention_momentum": 0.0}, *VARIANTS):
            other = self._both(make_model(**override), images)
            assert (other[3] - answer).abs().max() > 1e-3, override
        without_reuse = self._both(_without_feature_reuse(make_model()), images)
        assert (without_reuse[3] - answer).abs().max() > 1e-3


class TestStages:
    """The two calls and what passes between them."""

    def test_batch_size_and_order_change_nothing(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        with torch.no_grad():
            together = model(images)
            permuted = model(images[order])
            alone = [model(image[None]) for image in images]
        for stage in range(2):
            torch.testing.assert_close(permuted[stage], together[stage][order], atol=1e-5, rtol=1e-5)
            one_by_one = torch.cat([output[stage] for output in alone])
            torch.testing.assert_close(one_by_one, together[stage], atol=1e-5, rtol=1e-5)

    def test_forward_is_both_stages(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 2)
        with torch.no_grad():
            output, state = model(images), model.coarse(images)
            assert torch.equal(output.coarse, state.logits)
            assert torch.equal(output.fine, model.fine(images, state))

    def test_ratio_of_a_call_replaces_the_configured_one(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model, splitting_all = make_model(), make_model(informative_ratio=1.0)
        images = make_images(model, 2)
        with torch.no_grad():
            assert torch.equal(model(images, informative_ratio=1.0).fine, splitting_all(images).fine)
            assert not torch.equal(model(images).fine, splitting_all(images).fine)

    def test_state_is_indexed_like_a_tensor(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        with torch.no_grad():
            state = model.coarse(make_images(model, 4))
        mask = torch.tensor([False, True, True, False])
        _assert_states_equal(state[mask], state[torch.tensor([1, 2])])
        _assert_states_equal(state[mask], state[1:3])
        assert torch.equal(state[torch.tensor([2, 0])].tokens, torch.stack([state.tokens[2], state.tokens[0]]))
        assert torch.equal(state[mask].confidence, state.confidence[1:3])

    def test_confidence_is_the_highest_probability_in_float32(self) -> None:
        logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
        state = CoarseState(logits, *(torch.empty(2, 1) for _ in range(4)))
        torch.testing.assert_close(state.confidence, torch.tensor([0.5, 1 / (1 + torch.e**-2)]))

    def test_indexed_images_get_the_same_fine_answer(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 4)
        hard = torch.tensor([True, False, True, True])
        with torch.no_grad():
            state = model.coarse(images)
            some, all_of_them = model.fine(images[hard], state[hard]), model.fine(images, state)
        torch.testing.assert_close(some, all_of_them[hard], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("reuse", get_args(Reuse))
    def test_gradients_reach_every_parameter(self, reuse: str, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model(feature_reuse=reuse).train()
        coarse_to_fine_loss(model(make_images(model, 2)), torch.tensor([1, 5]), Objective()).backward()
        unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert unreached == []

    def test_no_weight_decay_names_parameters(self, make_model: MakeModel) -> None:
        model = make_model()
        names = model.no_weight_decay()
        assert names >= {"coarse_pos_embed", "backbone.pos_embed", "backbone.cls_token"}
        lacking_here = {"backbone.dist_token", "backbone.reg_token"}  # named by timm for every ViT
        assert names - lacking_here <= dict(model.named_parameters()).keys()


class TestVariants:
    """What is not a matter of the reference."""

    def test_random_cells_follow_torchs_generator(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model(selection="random")
        images = make_images(model, 2)

        def coarse(seed: int) -> CoarseState:
            torch.manual_seed(seed)
            return model.coarse(images)

        with torch.no_grad():
            state, again, other = coarse(0), coarse(0), coarse(1)
            _assert_states_equal(again, state)
            assert torch.equal(other.logits, state.logits)
            fine = model.fine(images, state)
            assert (model.fine(images, other) - fine).abs().max() > 1e-3
            assert torch.equal(model.fine(images, state), fine), "the state alone decides"
        assert not torch.equal(*state.class_attention.argsort()), "each image has cells of its own"

    @pytest.mark.parametrize("reuse", get_args(Reuse))
    def test_order_of_cells_changes_nothing(self, reuse: str, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model(feature_reuse=reuse)
        images = make_images(model, 2)
        with torch.no_grad():
            state = model.coarse(images)
            split = torch.zeros(2, 16).scatter(1, state.class_attention.topk(8).indices, 1)
            shuffled = replace(state, class_attention=split + torch.rand(2, 16) / 2)
            assert not torch.equal(shuffled.class_attention.argsort(), state.class_attention.argsort())
            ranked, any_order = model.fine(images, state), model.fine(images, shuffled)
        torch.testing.assert_close(any_order, ranked, atol=1e-5, rtol=1e-5)

    def test_merging_in_the_fine_stage_is_cheaper_and_the_same_for_any_batch(
        self, make_model: MakeModel, make_images: MakeImages
    ) -> None:
        model = make_model(fine_merged=6)
        plain = make_model()
        plain.load_state_dict(model.state_dict())
        images = make_images(model, 5)
        with torch.no_grad():
            answer = model(images)
            torch.testing.assert_close(torch.cat([model(image[None]).fine for image in images]), answer.fine)
            assert torch.equal(answer.coarse, plain(images).coarse)
            assert (answer.fine - plain(images).fine).abs().max() > 1e-3
        ours, theirs = count_macs(model), count_macs(plain)
        assert (ours.coarse, ours.backbone) == (theirs.coarse, theirs.backbone)
        assert ours.fine < 0.9 * theirs.fine

    def test_merging_patches_that_are_equal_changes_nothing(self, make_model: MakeModel) -> None:
        """Each token counts for all that it stands for."""
        model = make_model(fine_merged=6, informative_ratio=0.0, feature_reuse="none").requires_grad_(False)
        plain = make_model(informative_ratio=0.0, feature_reuse="none")
        assert model.coarse_pos_embed is not None
        model.coarse_pos_embed[:, 1:] = 0
        plain.load_state_dict(model.state_dict())
        flat = torch.full((1, 3, *model.image_size), 0.7)
        torch.testing.assert_close(model(flat).fine, plain(flat).fine)

    def test_answers_of_both_stages_are_mixed_by_weight(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 3)
        with torch.no_grad():
            coarse, fine = model(images)
            model.exit = Exit(coarse_weight=0.25)
            mixed = model(images)
        assert torch.equal(mixed.coarse, coarse)
        torch.testing.assert_close(mixed.fine, 0.75 * fine + 0.25 * coarse)

    def test_without_reuse_there_are_no_weights_for_it(self, make_model: MakeModel) -> None:
        def names(reuse: str) -> set[str]:
            return {n for n in make_model(feature_reuse=reuse).state_dict() if n.startswith("feature_reuse.")}

        assert names("none") == set()
        norm = {"feature_reuse.norm.weight", "feature_reuse.norm.bias"}
        assert names("linear") == norm | {"feature_reuse.mlp.weight", "feature_reuse.mlp.bias"}
        assert names("mlp") == names("class_token") == names("uninformative") > norm


class TestPrecision:
    """Lower precisions and the compiler."""

    @staticmethod
    def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=0)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
    def test_half_precision(
        self, dtype: torch.dtype, tolerance: float, make_model: MakeModel, make_images: MakeImages
    ) -> None:
        """The fine stage is compared with all cells split: rounding may swap cells of close rank."""
        model = make_model()
        images = make_images(model, 4)
        with torch.no_grad():
            expected = model(images, informative_ratio=1.0)
            model.to(dtype)
            state = model.coarse(images.to(dtype))
            fine = model.fine(images.to(dtype), state, informative_ratio=1.0)
        assert state.logits.dtype == fine.dtype == dtype
        assert state.class_attention.dtype == state.confidence.dtype == torch.float32
        self._assert_close(state.logits, expected.coarse, tolerance)
        self._assert_close(fine, expected.fine, tolerance)

    def test_autocast(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 4)
        with torch.no_grad():
            expected = model(images, informative_ratio=1.0)
            with torch.autocast("cpu", torch.bfloat16):
                state = model.coarse(images)
                fine = model.fine(images, state, informative_ratio=1.0)
        assert state.logits.dtype == fine.dtype == torch.bfloat16
        assert state.class_attention.dtype == torch.float32
        self._assert_close(state.logits, expected.coarse, 0.1)
        self._assert_close(fine, expected.fine, 0.1)

    def test_compiles_as_one_graph(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model(coarse_grid=3, depth=4)
        images = make_images(model, 2)
        with torch.no_grad():
            state = model.coarse(images)
            compiled = torch.compile(model.coarse, fullgraph=True, backend="eager")(images)
            fine = torch.compile(model.fine, fullgraph=True, backend="eager")(images, compiled)
            for f in fields(CoarseState):
                torch.testing.assert_close(getattr(compiled, f.name), getattr(state, f.name))
            torch.testing.assert_close(fine, model.fine(images, state))


class TestBackbone:
    """timm's own model inside, key for key."""

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_weights_load_key_for_key(
        self, suffix: str, tmp_path: Path, make_timm_model: Callable[..., nn.Module], make_model: MakeModel
    ) -> None:
        timm_model = make_timm_model(img_size=32)
        weights, file = timm_model.state_dict(), tmp_path / f"weights{suffix}"
        save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)

        model = make_model(coarse_grid=4, pretrained_backbone=file)

        loaded = model.backbone.state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(model.backbone(images), timm_model(images))

    @pytest.mark.parametrize("wrapper", ["model", "state_dict"])
    def test_weights_may_be_wrapped(
        self, wrapper: str, tmp_path: Path, make_timm_model: Callable[..., nn.Module], make_model: MakeModel
    ) -> None:
        weights = make_timm_model(img_size=32).state_dict()
        torch.save({wrapper: weights, "epoch": 3}, tmp_path / "weights.pth")
        model = make_model(coarse_grid=4, pretrained_backbone=str(tmp_path / "weights.pth"))
        assert torch.equal(model.backbone.state_dict()["norm.weight"], weights["norm.weight"])

    def test_positions_are_resampled_to_both_grids(
        self, make_timm_model: Callable[..., nn.Module], make_model: MakeModel
    ) -> None:
        weights = make_timm_model(img_size=56).state_dict()
        model = make_model(coarse_grid=9, pretrained_backbone=weights)
        fine = resample_abs_pos_embed(weights["pos_embed"], [18, 18])
        assert model.backbone.pos_embed is not None
        torch.testing.assert_close(model.backbone.pos_embed.data, fine)
        torch.testing.assert_close(model.get_parameter("coarse_pos_embed").data, resample_abs_pos_embed(fine, [9, 9]))

    def test_a_head_for_other_classes_is_dropped(
        self, make_timm_model: Callable[..., nn.Module], make_model: MakeModel
    ) -> None:
        weights = make_timm_model(img_size=32, num_classes=10).state_dict()
        model = make_model(coarse_grid=4, num_classes=4, pretrained_backbone=weights)
        loaded = model.backbone.state_dict()
        assert loaded["head.weight"].shape == (4, 48)
        others = [name for name in weights if not name.startswith("head.")]
        assert all(torch.equal(loaded[name], weights[name]) for name in others)

    @pytest.mark.parametrize(
        "variant",
        [
            {},
            {"reg_tokens": 2},
            {"reg_tokens": 2, "no_embed_class": True},
            {"qk_norm": True, "scale_attn_norm": True},
            {"pre_norm": True, "init_values": 0.3},
            {"global_pool": "avg", "qkv_bias": False},
        ],
        ids=lambda variant: "-".join(variant) or "plain",
    )
    def test_splitting_all_without_reuse_is_the_backbone(
        self, variant: dict[str, Any], make_model: MakeModel, make_images: MakeImages
    ) -> None:
        """The fine stage is then the backbone with its patches in another order."""
        model = _without_feature_reuse(make_model(informative_ratio=1.0, **variant))
        images = make_images(model, 2)
        with torch.no_grad():
            torch.testing.assert_close(model(images).fine, model.backbone(images), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "variant", [{}, {"reg_tokens": 2}, {"qk_norm": True, "scale_attn_norm": True}, {"init_values": 0.3}]
    )
    def test_coarse_stage_is_the_backbone_on_the_coarse_image(
        self, variant: dict[str, Any], make_model: MakeModel, make_images: MakeImages
    ) -> None:
        """The blocks that give the class attention row compute what timm's compute."""
        model = make_model(**variant)
        small = make_model(coarse_grid=2, **variant).backbone
        weights = {**model.backbone.state_dict(), "pos_embed": model.get_parameter("coarse_pos_embed").data}
        small.load_state_dict(weights)
        images = make_images(model, 2)
        half = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=True)
        with torch.no_grad():
            torch.testing.assert_close(model.coarse(images).logits, small(half), atol=1e-5, rtol=1e-5)


class TestErrors:
    """One line that names what was got."""

    @staticmethod
    def _assert_message(error: pytest.ExceptionInfo[CfvitError], got: str) -> None:
        message = str(error.value)
        assert got in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "name",
        [
            "vit_no_such_model",
            "resnet18",
            "vit_base_patch16_siglip_224",
            "vit_medium_patch16_gap_240",
            "swin_tiny_patch4_window7_224",
            "deit_tiny_patch16_224.no_such_tag",
        ],
    )
    def test_unsuitable_backbone(self, name: str) -> None:
        with pytest.raises(CfvitError) as error:
            create_model(name)
        self._assert_message(error, name)

    @pytest.mark.parametrize(
        ("override", "got"),
        [
            ({"informative_ratio": 1.5}, "informative_ratio is 1.5"),
            ({"informative_ratio": -0.1}, "informative_ratio is -0.1"),
            ({"informative_ratio": float("nan")}, "informative_ratio is nan"),
            ({"coarse_grid": 0}, "coarse_grid is 0"),
            ({"attention_momentum": 1.0}, "attention_momentum is 1.0"),
            ({"num_classes": 0}, "num_classes is 0"),
            ({"selection": "best"}, "selection is 'best': give one of attention, negative, random"),
            ({"fine_merged": -1}, "fine_merged is -1: give at least 0"),
            ({"fine_merged": 2, "backbone": "vit_base_patch16_rope_mixed_224"}, "not for rotary positions"),
            (
                {"feature_reuse": None},
                "feature_reuse is None: give one of mlp, linear, none, class_token, uninformative",
            ),
        ],
    )
    def test_value_out_of_range(self, override: dict[str, Any], got: str, make_model: MakeModel) -> None:
        with pytest.raises(CfvitError) as error:
            make_model(**override)
        self._assert_message(error, got)

    @pytest.mark.parametrize("ratio", [1.5, -0.1])
    def test_ratio_of_a_call_out_of_range(self, ratio: float, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        with pytest.raises(CfvitError) as error:
            model(make_images(model, 1), informative_ratio=ratio)
        self._assert_message(error, f"informative_ratio is {ratio}")

    @pytest.mark.parametrize("shape", [(2, 3, 32, 36), (2, 1, 32, 32), (3, 32, 32), (2, 3, 64, 64)])
    def test_images_of_another_shape(self, shape: tuple[int, ...], make_model: MakeModel) -> None:
        model = make_model()
        with pytest.raises(CfvitError) as error:
            model.coarse(torch.zeros(shape))
        self._assert_message(error, str(list(shape)))
        state = model.coarse(torch.zeros(2, 3, 32, 32))
        with pytest.raises(CfvitError):
            model.fine(torch.zeros(shape), state)

    def test_state_of_other_images(self, make_model: MakeModel, make_images: MakeImages) -> None:
        model = make_model()
        images = make_images(model, 3)
        with pytest.raises(CfvitError) as error:
            model.fine(images, model.coarse(images)[:2])
        self._assert_message(error, "3 images with the state of 2")

    @pytest.mark.parametrize("classes", [7, 10])
    def test_weights_of_another_depth(
        self, classes: int, make_timm_model: Callable[..., nn.Module], make_model: MakeModel
    ) -> None:
        """Also where the head is dropped because it is for another number of classes."""
        weights = make_timm_model(img_size=32, depth=4, num_classes=classes).state_dict()
        with pytest.raises(CfvitError) as error:
            make_model(coarse_grid=4, pretrained_backbone=weights)
        self._assert_message(error, "deit_tiny_patch16_224")

    def test_weights_of_other_names(self, make_timm_model: Callable[..., nn.Module], make_model: MakeModel) -> None:
        """They must not be passed over in silence, which would leave random weights."""
        weights = make_timm_model(img_size=32).state_dict()
        with pytest.raises(CfvitError) as error:
            make_model(pretrained_backbone={f"module.{name}": tensor for name, tensor in weights.items()})
        self._assert_message(error, "deit_tiny_patch16_224")

    @pytest.mark.parametrize("content", [None, b"no weights", {"model": 3}])
    def test_a_file_without_weights(self, content: object, tmp_path: Path, make_model: MakeModel) -> None:
        file = tmp_path / "weights.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises(CfvitError) as error:
            make_model(pretrained_backbone=file)
        self._assert_message(error, str(file))

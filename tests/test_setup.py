"""Optimisers: fast where they run, and the same when a run is resumed."""

import pytest
import timm.optim.muon
import torch
from torch import nn

from cfvit.errors import CfvitError
from cfvit.training.recipe import Recipe
from cfvit.training.setup import create_optimizer, orthogonalising_in


def layer_with_gradient():
    layer = nn.Linear(16, 8)
    layer.weight.grad, layer.bias.grad = torch.randn(8, 16), torch.randn(8)
    return layer


@pytest.fixture
def products(monkeypatch):
    """In which precision Muon asked for its products, call by call; None for timm's own."""
    asked = []
    real = timm.optim.muon.zeropower_via_newtonschulz

    def spy(*args, dtype=None, **options):
        asked.append(dtype)
        return real(*args, **options) if dtype is None else real(*args, dtype=dtype, **options)

    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", spy)
    return asked


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, None),
        ("cuda", torch.float32, None),
        ("cuda", torch.bfloat16, None),
    ],
)
def test_muon_multiplies_in_float32_on_a_cpu_that_trains_in_it_alone(products, device, dtype, precision):
    optimizer = create_optimizer(Recipe(optimizer="muon"), layer_with_gradient(), 1e-2)
    with orthogonalising_in(dtype, torch.device(device)):
        optimizer.step()
    assert products == [precision]


def test_timms_muon_is_as_it_was_afterwards_even_after_an_error():
    before = timm.optim.muon.zeropower_via_newtonschulz
    with pytest.raises(ZeroDivisionError), orthogonalising_in(torch.float32, torch.device("cpu")):
        assert timm.optim.muon.zeropower_via_newtonschulz is not before
        raise ZeroDivisionError
    assert timm.optim.muon.zeropower_via_newtonschulz is before


def test_an_update_of_full_rank_is_the_one_in_bfloat16_up_to_its_rounding():
    torch.manual_seed(0)
    layers = [layer_with_gradient()]
    layers.append(nn.Linear(16, 8))
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].weight.grad, layers[1].bias.grad = layers[0].weight.grad, layers[0].bias.grad
    start = layers[0].weight.detach().clone()
    for layer, device in zip(layers, ("cpu", "cuda"), strict=True):
        with orthogonalising_in(torch.float32, torch.device(device)):
            create_optimizer(Recipe(optimizer="muon", weight_decay=0.0), layer, 1e-2).step()
    fast, usual = ((layer.weight - start).detach() for layer in layers)
    assert usual.norm() > 1e-3
    assert (fast - usual).norm() < 0.02 * usual.norm()


def test_adamw_updates_in_one_pass():
    optimizer = create_optimizer(Recipe(optimizer="adamw"), layer_with_gradient(), 1e-3)
    assert optimizer.defaults["fused"] is True


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(CfvitError, match="adamww"):
        create_optimizer(Recipe(optimizer="adamww"), layer_with_gradient(), 1e-3)

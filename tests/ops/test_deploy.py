"""switch_to_deploy: the same outputs and keys, from frozen weights."""

import copy
import pickle

import pytest
import torch

from convnext_mm import ConvNeXt
from convnext_mm.ops import lean

SMALL = dict(depths=[1, 2, 3, 1], channels=[8, 16, 24, 32])


def trained(**settings):
    """A backbone whose every parameter is away from its initial value."""
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, layer_scale_init_value=0.5, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)
    return model


def relative(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(
    'settings', [{}, dict(use_grn=True), dict(impl='eager'), dict(impl='lean+')]
)
@pytest.mark.parametrize('mode', ['fp32', 'autocast', 'bf16', 'fp16'])
@torch.no_grad()
def test_outputs_stay(settings, mode):
    model = trained(**settings)
    x = torch.rand(2, 3, 65, 100)
    exact = copy.deepcopy(model).double()(x.double())
    deployed = copy.deepcopy(model).switch_to_deploy()
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(mode)
    outs = []
    for m in (model, deployed):
        m = m.to(dtype) if dtype else m
        with torch.autocast('cpu', torch.bfloat16, enabled=mode == 'autocast'):
            outs.append(m(x.to(dtype) if dtype else x))
    for plain, folded, reference in zip(*outs, exact):
        assert folded.dtype == plain.dtype
        if mode == 'fp32':
            assert relative(folded, reference) < 1e-5
        else:
            assert relative(folded, reference) <= 1.5 * relative(plain, reference)


@pytest.mark.parametrize('use_grn', [False, True])
def test_keys_stay_and_twice_is_once(use_grn):
    model = trained(use_grn=use_grn)
    keys = {k: v.shape for k, v in model.state_dict().items()}
    assert model.switch_to_deploy() is model
    state = copy.deepcopy(model.state_dict())
    assert {k: v.shape for k, v in state.items()} == keys
    for name, value in state.items():
        if name.startswith('stages'):
            if name.endswith('norm.weight') or (
                name.endswith('.gamma') and 'grn' not in name
            ):
                assert value.eq(1).all(), name
            elif name.endswith(('norm.bias', 'grn.beta')):
                assert value.eq(0).all(), name
    model.switch_to_deploy()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@torch.no_grad()
def test_saved_deployed_weights_load_into_a_plain_model():
    model = trained().switch_to_deploy()
    other = ConvNeXt(SMALL, impl='eager').eval()
    other.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(model(x), other(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_loaded_later_are_used():
    """The packed copies follow, also weights that are not folded."""
    model, other = trained().switch_to_deploy(), trained()
    x = torch.rand(1, 3, 64, 64)
    model(x)
    for p in other.parameters():
        p.mul_(1.1)
    model.load_state_dict(other.state_dict())
    for a, b in zip(model(x), other(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_are_packed_once(monkeypatch):
    model = trained().switch_to_deploy()
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    monkeypatch.setattr('convnext_mm.ops.deploy.pack', None)
    assert all(map(torch.equal, model(x), expected))
    with torch.inference_mode():
        assert all(map(torch.equal, model(x), expected))


@torch.no_grad()
def test_copies_and_pickles():
    model = trained(use_grn=True).switch_to_deploy()
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.deployed
        assert all(map(torch.equal, other(x), expected))


def test_no_training_afterwards():
    model = trained().switch_to_deploy()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.eval() is model
    with pytest.raises(RuntimeError, match='switch_to_deploy'):
        model.train()
    # The image's gradient, for those who ask for one, is still right.
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    grads = [
        torch.autograd.grad(m(x)[-1].square().sum(), x)[0]
        for m in (model, trained(impl='eager'))
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_without_onednn():
    model = trained().switch_to_deploy()
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    plain = copy.deepcopy(model)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not lean.onednn(x)
        for a, b in zip(plain(x), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

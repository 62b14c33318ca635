"""The last layer of a released classifier in a head."""

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from convnext_mm import ConvNeXt


class Head(BaseModule):
    def __init__(self, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.fc = nn.Linear(16, num_classes)


@pytest.fixture
def backbone():
    return ConvNeXt(dict(depths=[1] * 4, channels=[2, 4, 8, 16])).state_dict()


@pytest.fixture
def released(tmp_path, backbone):
    """As the paper's release: backbone and head below ``model``."""
    path = tmp_path / 'classifier.pth'
    head = nn.Linear(16, 5)
    torch.save(dict(model={**backbone, **below_head(head.state_dict())}), path)
    return path, head


def below_head(state):
    return {f'head.{name}': tensor for name, tensor in state.items()}


def init_cfg(path):
    return dict(type='convnext_mm.ReleasedClassifierInit', checkpoint=str(path))


def test_takes_the_layer(released):
    path, expected = released
    head = Head(5, init_cfg=init_cfg(path))
    head.init_weights()
    assert torch.equal(head.fc.weight, expected.weight)
    assert torch.equal(head.fc.bias, expected.bias)
    assert head.fc.weight.requires_grad


def test_other_classes_are_refused(released):
    with pytest.raises(
        ValueError,
        match=r'head.weight of \(7, 16\), found '
        r'\(5, 16\).*TruncNormal',
    ):
        Head(7, init_cfg=init_cfg(released[0])).init_weights()


def test_of_the_copy_that_the_backbone_takes(released, backbone, tmp_path):
    path, expected = released
    content = torch.load(path)
    other = {name: tensor + 1 for name, tensor in content['model'].items()}
    torch.save(dict(model=other, model_ema=content['model']), tmp_path / 'b.pth')
    head = Head(5, init_cfg=init_cfg(tmp_path / 'b.pth'))
    head.init_weights()
    assert torch.equal(head.fc.weight, expected.weight)


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda tensor: tensor.double() * 1e300, r'weight, .*e\+\d+ in torch.float32'),
        (lambda tensor: tensor.int(), 'has dtype torch.int32'),
        (lambda tensor: tensor.to('meta'), 'on meta'),
    ],
)
def test_numbers_that_are_none_are_refused(change, reason, backbone, tmp_path):
    state = {name: change(t) for name, t in nn.Linear(16, 5).state_dict().items()}
    torch.save(dict(model={**backbone, **below_head(state)}), tmp_path / 'b.pth')
    head = Head(5, init_cfg=init_cfg(tmp_path / 'b.pth'))
    before = head.fc.weight.clone()
    with pytest.raises(ValueError, match=reason):
        head.init_weights()
    assert torch.equal(head.fc.weight, before)


@pytest.mark.parametrize(
    'has_backbone, reason', [(True, 'found none'), (False, 'no ConvNeXt weights')]
)
def test_no_classifier(has_backbone, reason, backbone, tmp_path):
    state = backbone if has_backbone else {'norm.weight': torch.ones(3)}
    torch.save(dict(model=state), tmp_path / 'b.pth')
    with pytest.raises(ValueError, match=reason):
        Head(5, init_cfg=init_cfg(tmp_path / 'b.pth')).init_weights()

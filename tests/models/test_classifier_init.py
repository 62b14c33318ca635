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
def released(tmp_path):
    """As the paper's release: backbone and head below ``model``."""
    path = tmp_path / 'classifier.pth'
    state = ConvNeXt(dict(depths=[1] * 4, channels=[2, 4, 8, 16])).state_dict()
    head = nn.Linear(16, 5)
    state.update({'head.weight': head.weight.data, 'head.bias': head.bias.data})
    torch.save(dict(model=state), path)
    return path, head


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


def test_backbone_without_classifier(tmp_path):
    torch.save(dict(model={'norm.weight': torch.ones(3)}), tmp_path / 'b.pth')
    with pytest.raises(ValueError, match='found none'):
        Head(5, init_cfg=init_cfg(tmp_path / 'b.pth')).init_weights()

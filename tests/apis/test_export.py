"""Exported files give what the model gives, in a process without this package."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import convnext_mm
import recipe_models
import toys
from convnext_mm.apis.export import check, targets
from convnext_mm.apis.export.networks import AdaptiveAvgPool2d
from convnext_mm.cli import main
from convnext_mm.datasets.shapes import draw_scene
from convnext_mm.engine.errors import ConfigError
from repo import ROOT

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
slow = pytest.mark.slow
V1 = dict(type='convnext_mm.ConvNeXt', arch=toys.ARCH, layer_scale_init_value=1.0)
V2 = dict(type='convnext_mm.ConvNeXt', arch=toys.ARCH, use_grn=True)
TARGETS = targets.TARGETS


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(check, 'ROUNDS', 2)


def backbone(cfg=V1):
    return toys.randomise(MODELS.build(cfg))


def whole(*words):
    """A toy of a recipe that finds something."""
    cfg = recipe_models.load(recipe_models.recipe(*words))
    return built(recipe_models.cut_down(cfg), cfg.default_scope)


def one_stage(path):
    """The same of a detector in configs/custom."""
    width = 32  # GN has 32 groups
    cfg = recipe_models.toy(
        path,
        {
            'neck.out_channels': width,
            'bbox_head.in_channels': width,
            'bbox_head.feat_channels': width,
            'bbox_head.stacked_convs': 1,
        },
    )
    return built(cfg.model, cfg.default_scope)


def built(model, scope):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(model)
    model.init_weights()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if 'cls' in name or 'logits' in name:
                param += 0.1 * torch.randn_like(param)
    return model.eval()


def to_file(model, to, folder, **settings):
    return convnext_mm.export(model, to, folder / f'model{TARGETS[to]}', **settings)


@slow
@pytest.mark.parametrize(
    'cfg, to', [*((V1, to) for to in TARGETS), (V2, 'onnx')], ids=[*TARGETS, 'v2-onnx']
)
def test_backbone(tmp_path, cfg, to):
    result = to_file(backbone(cfg), to, tmp_path)
    assert 0 < result.differences['largest'] < 1e-5
    assert result.outputs == ('stage1', 'stage2', 'stage3', 'stage4')
    # Weights only: no pictures that it was made with.
    assert result.bytes == result.path.stat().st_size < 8e5
    assert result.time > 0


@slow
@pytest.mark.parametrize('to', ['onnx', 'torchscript'])
def test_fp16(tmp_path, to):
    result = to_file(backbone(V2), to, tmp_path, dtype='fp16')
    assert 1e-6 < result.differences['largest'] < 1e-2
    if to == 'onnx':
        weights = onnx.load(result.path).graph.initializer
        assert {onnx.TensorProto.FLOAT16} == {
            w.data_type for w in weights if len(w.dims) > 1
        }


def test_folded_and_named(tmp_path):
    """No layer scale is left, and sizes have names."""
    result = to_file(backbone(), 'onnx', tmp_path, check=False)
    blocks = sum(toys.ARCH['depths'])
    assert result.operators['Gelu'] == blocks
    assert 'Mul' not in result.operators  # by layer scale
    (images,) = onnx.load(result.path).graph.input
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == ['batch', 3, 'height', 'width']
    assert result.differences == {} and result.time is None


def test_fixed_size(tmp_path):
    result = to_file(backbone(), 'onnx', tmp_path, shape=(64, 96))
    assert result.differences['largest'] < 1e-5
    session = onnxruntime.InferenceSession(result.path)
    assert session.get_inputs()[0].shape == ['batch', 3, 64, 96]


@slow
@pytest.mark.parametrize('to', ['onnx', 'torch-export'])
def test_segmentor(tmp_path, to):
    """With pooled maps whose windows differ in size."""
    result = to_file(whole('upernet'), to, tmp_path)
    assert result.differences['largest'] < 1e-4
    assert result.differences['classes'] < 1e-3
    assert result.outputs == ('logits', 'classes')


def test_padded_segmentor(tmp_path):
    """As its config pads tests."""
    padded = dict(
        type='mmseg.SegDataPreProcessor', size=(64, 64), test_cfg=dict(size_divisor=32)
    )
    cfg = toys.segmentor(V1, test_cfg=dict(mode='whole')) | dict(
        data_preprocessor=padded
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = toys.randomise(MODELS.build(cfg))
    result = to_file(model, 'torchscript', tmp_path)
    assert result.differences['largest'] < 1e-4


@slow
@pytest.mark.parametrize('to', TARGETS)
def test_mask_rcnn(tmp_path, to):
    result = to_file(whole('mask-rcnn_convnext-t_'), to, tmp_path)
    assert result.outputs == ('boxes', 'scores', 'labels', 'masks')
    assert result.differences['objects'] > 50
    assert result.differences['unmatched'] == 0
    assert result.differences['boxes'] < 0.05
    assert result.differences['scores'] < 1e-4


@slow
@pytest.mark.parametrize(
    'model',
    [
        lambda: whole('cascade-mask-rcnn_convnext-t_'),
        lambda: one_stage('configs/custom/retinanet_convnext-t_fpn_1x_coco.py'),
        lambda: one_stage('configs/custom/fcos_convnext-t_fpn_gn-head_1x_coco.py'),
        lambda: one_stage('configs/custom/atss_convnext-t_fpn_1x_coco.py'),
    ],
    ids=['cascade', 'retinanet', 'fcos', 'atss'],
)
def test_detectors(tmp_path, model):
    result = to_file(model(), 'onnx', tmp_path)
    assert result.differences['objects'] > 50
    assert result.differences['unmatched'] <= 1  # the last of a hundred
    assert result.differences['scores'] < 1e-4


def test_a_wrong_file_is_told(tmp_path, monkeypatch):
    """The comparison can fail, and an older file stays."""
    (tmp_path / 'model.torchscript').write_text('older')
    given, run = backbone(), check.run_elsewhere

    def spoiled(path, inputs):
        outputs = run(path, inputs)
        outputs[0][1] += 0.01 * abs(outputs[0][1]).max()
        return outputs

    monkeypatch.setattr(check, 'run_elsewhere', spoiled)
    with pytest.raises(ConfigError, match='differs from the model by more than'):
        to_file(given, 'torchscript', tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / 'model.torchscript']
    assert (tmp_path / 'model.torchscript').read_text() == 'older'


def test_a_lost_object_is_told():
    """Of a detector: no box, another label, another place."""
    model = one_stage('configs/custom/retinanet_convnext-t_fpn_1x_coco.py')
    image = check.pictures((), (256, 320))[0]
    network = convnext_mm.apis.export.network_for(model)
    (x,) = check.inputs_of(network, [image])
    with torch.no_grad():
        outputs = list(network(x))
        found = check._compare_objects(model, x, image, outputs)
        assert found['objects'] > 10
        assert found['unmatched'] <= 1  # the last of a hundred
        for spoil in (
            lambda boxes, scores, labels: (boxes, scores * 0, labels),
            lambda boxes, scores, labels: (boxes, scores, labels + 1),
            lambda boxes, scores, labels: (boxes + 30, scores, labels),
        ):
            found = check._compare_objects(model, x, image, list(spoil(*outputs)))
            assert found['unmatched'] > 0.8 * found['objects']


@slow
def test_int8(tmp_path):
    for index in range(4):
        image = draw_scene(np.random.default_rng(index), 96).image
        cv2.imwrite(str(tmp_path / f'{index}.png'), image)
    result = to_file(backbone(), 'onnx', tmp_path, int8=str(tmp_path))
    assert result.operators['QuantizeLinear'] > 10
    # Random weights take badly to it.
    assert 1e-4 < result.differences['largest'] < 0.5


@pytest.mark.parametrize('size', [1, 2, 3, 6, (None, 4), (5, None)])
def test_pooling(size):
    x = torch.rand(2, 3, 11, 17, dtype=torch.float64)
    expected = nn.AdaptiveAvgPool2d(size)(x)
    torch.testing.assert_close(AdaptiveAvgPool2d(size)(x), expected)


@slow
def test_example_without_pytorch(tmp_path):
    """examples/run_onnx.py, where PyTorch cannot be imported, finds what the model
    finds."""
    config = tmp_path / 'toy.py'
    cfg = recipe_models.load(recipe_models.recipe('mask-rcnn_convnext-t_'))
    cfg.model = recipe_models.cut_down(cfg)
    cfg.dump(config)
    model = built(cfg.model, 'mmdet')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'toy.pth')
    picture = tmp_path / 'picture.png'
    cv2.imwrite(str(picture), draw_scene(np.random.default_rng(0), 224).image)
    out = tmp_path / 'toy.onnx'
    status = main(
        [
            *('export', str(config), '--checkpoint', str(tmp_path / 'toy.pth')),
            *('--out', str(out), '--no-check'),
        ]
    )
    assert status == 0
    without = "import sys; sys.modules['torch'] = None; import runpy; "
    code = f'{without}runpy.run_path({str(ROOT / "examples/run_onnx.py")!r}, None, '
    done = subprocess.run(
        [
            *(sys.executable, '-c', f"{code}'__main__')", str(out), str(picture)),
            *('nothing.png', '--out', str(tmp_path / 'found')),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and 'nothing.png: not a picture' in done.stderr
    result = convnext_mm.infer(
        str(config), str(picture), checkpoint=str(tmp_path / 'toy.pth')
    )
    names = done.stdout.split(': ', 1)[1].strip()
    found = result.predictions[0]
    expected = [
        f'{found.classes[label]} {score:.2f}'
        for label, score in zip(found.labels, found.scores)
    ]
    assert names == (', '.join(expected) or 'nothing')
    drawn = cv2.imread(str(tmp_path / 'found' / 'picture.png'))
    assert drawn.shape == (224, 224, 3)


def test_a_network_stays_as_it_is(tmp_path):
    network = backbone().requires_grad_()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    to_file(network, 'torchscript', tmp_path, dtype='fp16', check=False)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in network.parameters())
    network.train()


def test_facts_in_a_file(tmp_path):
    """What whoever runs it has to know."""
    result = to_file(backbone(), 'torchscript', tmp_path, check=False)
    extra = {targets.FACTS: ''}
    torch.jit.load(str(result.path), _extra_files=extra)
    facts = json.loads(extra[targets.FACTS])
    assert facts['outputs'] == ['stage1', 'stage2', 'stage3', 'stage4']
    assert facts['inputs'].startswith('images (N, 3, H, W) fp32')


def refused(model, words, **settings):
    with pytest.raises(ConfigError) as error:
        convnext_mm.export(model, **settings)
    for word in words:
        assert word in str(error.value)


def test_mistakes(tmp_path, monkeypatch):
    refused(backbone(), ['--to tflite', 'onnx, torch-export'], to='tflite')
    refused(backbone(), ['--part head', 'model, backbone'], part='head')
    refused(backbone(), ['--dtype bf16', 'fp32, fp16'], dtype='bf16')
    refused(backbone(), ['--opset 11', '18'], opset=11)
    refused(backbone(), ['--opset 99'], opset=99)
    refused(backbone(), ['--shape 16 64', '32 x 32'], shape=(16, 64))
    refused(backbone().train(), ['training mode', 'model.eval()'])
    refused(backbone(), ['x.pt2', 'does not end in .onnx'], out=tmp_path / 'x.pt2')
    refused(backbone(), ['--int8', 'onnx'], int8=str(tmp_path), to='torchscript')
    refused(backbone(), ['no such folder'], int8=str(tmp_path / 'none'))
    refused(backbone(), ['holds no pictures'], int8=str(tmp_path))
    refused(backbone(), ['there is no picture none.png'], images=['none.png'])
    refused(backbone(), ['--shape 0 64', 'pixels'], shape=(0, 64))
    refused(backbone(), ['by its name'], checkpoint='weights.pth')
    (tmp_path / 'x.onnx').mkdir()
    refused(backbone(), ['x.onnx is a folder'], out=tmp_path / 'x.onnx')
    (tmp_path / 'x.onnx').rmdir()
    nowhere = '/proc/none/x.torchscript'
    refused(backbone(), [nowhere, 'name another --out'], out=nowhere, to='torchscript')
    pooled = MODELS.build(V1 | dict(gap_before_final_norm=True, out_indices=-1))
    refused(pooled.eval(), ['vectors, not maps'])
    refused(nn.Linear(2, 2).eval(), ['Linear is no backbone'])
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    refused(backbone(), ['onnxruntime is needed', 'pip install'])


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('configs/custom/dino-4scale_convnext-t_8xb2-12e_coco.py', 'DINOHead'),
        ('configs/custom/ms-rcnn_convnext-t_fpn_1x_coco.py', 'MaskScoringRoIHead'),
        (
            'configs/custom/mask2former_convnext-t_8xb2-160k_ade20k-512x512.py',
            'Mask2FormerHead',
        ),
    ],
)
def test_other_heads_are_refused(path, name):
    cfg = recipe_models.toy(path, {})
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    refused(model, [name, '--part backbone'], check=False)


@pytest.mark.parametrize('impl', ['lean+', 'triton'])
@pytest.mark.parametrize('to', ['torch-export', 'torchscript'])
def test_any_implementation(impl, to, tmp_path):
    """The config of a training may ask for what no file can hold."""
    model = backbone(dict(V1, impl=impl))
    path = tmp_path / f'model{TARGETS[to]}'
    convnext_mm.export(model, to, path, check=False)
    assert path.stat().st_size


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f'--images {tmp_path}: it holds no pict'):
        convnext_mm.export(
            backbone(), 'onnx', tmp_path / 'a.onnx', images=str(tmp_path)
        )


def test_soft_nms_is_refused():
    model = one_stage('configs/custom/retinanet_convnext-t_fpn_1x_coco.py')
    model.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.5)
    refused(model, ['soft_nms', 'type="nms"'])


@slow
def test_command(tmp_path, capsys):
    """A work folder, as `convnext-mm infer` takes it, the backbone alone, int8."""
    cfg = recipe_models.load(recipe_models.recipe('upernet'))
    cfg.model = recipe_models.cut_down(cfg)
    cfg.dump(tmp_path / 'toy.py')
    model = built(cfg.model, 'mmseg')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'iter_1.pth')
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    cv2.imwrite(str(pictures / 'a.png'), draw_scene(np.random.default_rng(0), 96).image)
    out = tmp_path / 'toy.onnx'
    folder = ('export', str(tmp_path), '--out', str(out))
    options = ('--shape', '64', '96', '--int8', str(pictures))
    assert main([*folder, *options, '--images', str(pictures)]) == 0
    said = capsys.readouterr().out
    assert f'{out}, ' in said and 'images (N, 3, 64, 96) fp32, red first' in said
    assert 'QuantizeLinear' in said and 'of the pixels have another class' in said
    assert 'time ' in said
    facts = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    facts = json.loads(facts['convnext_mm'])
    assert facts['task'] == 'segmentation' and len(facts['classes']) == 150
    assert facts['dtype'] == 'int8'
    out = tmp_path / 'toy.torchscript'
    options = ('--to', 'torchscript', '--part', 'backbone', '--dtype', 'fp16')
    assert main([*folder[:3], str(out), *options, '--no-check']) == 0
    assert 'leave --no-check out' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='error: --to tflite'):
        main(['export', str(tmp_path), '--to', 'tflite'])

"""Every door through which a user's checkpoint comes in, as a function of a
file; each runs in a process of its own, with limits.

A door gives the state dict that it loaded. What should have been loaded, and
the small detector and segmentor that it is loaded into, are made by
:func:`make_world`.
"""

import gc
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import convnext_mm
import toys
from convnext_mm import CheckpointError, ConvNeXt
from repo import load_tool
from speed import quick_configs

State = dict[str, Tensor]

MAX_SECONDS = 10
MAX_BYTES = 1 << 30

train, test, convert = map(load_tool, ('train', 'test', 'convert_checkpoint'))
LOADED: State = {}


@HOOKS.register_module()
class KeepLoadedWeights(Hook):
    """Keeps what a run starts with."""

    def before_train(self, runner) -> None:
        model = runner.model
        model = model.module if hasattr(model, 'module') else model
        LOADED.update({k: t.clone() for k, t in model.state_dict().items()})

    before_test = before_train


BACKBONE = dict(type='convnext_mm.ConvNeXt', arch=toys.ARCH)
DETECTOR = toys.detector(
    BACKBONE,
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=10,
        score_thr=0.05,
        max_per_img=10,
        nms=dict(type='nms', iou_threshold=0.5),
    ),
)
SEGMENTOR = toys.segmentor(BACKBONE, test_cfg=dict(mode='whole'))
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64))]
LOAD_BOXES = dict(type='LoadAnnotations', with_bbox=True)
LOAD_MASKS = dict(type='LoadAnnotations')


def make_data(folder: Path) -> None:
    """Two images, their boxes and their masks."""
    (folder / 'images').mkdir()
    (folder / 'masks').mkdir()
    for i in range(2):
        Image.fromarray(np.full((64, 64, 3), 99 * i, np.uint8)).save(
            folder / f'images/{i}.png'
        )
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(folder / f'masks/{i}.png')
    box = dict(category_id=1, iscrowd=0, area=400, bbox=[9, 9, 20, 20])
    boxes = dict(
        images=[
            dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(2)
        ],
        categories=[dict(id=1, name='thing')],
        annotations=[dict(box, id=i + 1, image_id=i) for i in range(2)],
    )
    (folder / 'boxes.json').write_text(json.dumps(boxes))


def detector_config(folder: Path) -> dict:
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    data = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='boxes.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=('thing',)),
    )
    return dict(
        default_scope='mmdet',
        model=DETECTOR,
        visualizer=dict(type='DetLocalVisualizer', name='v'),
        **run_config(
            dict(data, pipeline=[*PIPELINE, LOAD_BOXES, dict(type='PackDetInputs')]),
            dict(
                data,
                test_mode=True,
                pipeline=[
                    *PIPELINE,
                    LOAD_BOXES,
                    dict(type='PackDetInputs', meta_keys=keys),
                ],
            ),
            dict(type='CocoMetric', metric='bbox', ann_file=f'{folder}/boxes.json'),
        ),
    )


def segmentor_config(folder: Path) -> dict:
    pack = dict(type='PackSegInputs')
    flips = [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)]
    data = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        seg_map_suffix='.png',
        img_suffix='.png',
        metainfo=dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]]),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        pipeline=[*PIPELINE, LOAD_MASKS, pack],
    )
    return dict(
        default_scope='mmseg',
        model=SEGMENTOR,
        visualizer=dict(type='SegLocalVisualizer', name='v'),
        tta_model=dict(type='SegTTAModel'),
        tta_pipeline=[
            *PIPELINE,
            dict(type='TestTimeAug', transforms=[flips, [LOAD_MASKS], [pack]]),
        ],
        **run_config(data, data, dict(type='IoUMetric', iou_metrics=['mIoU'])),
    )


def run_config(train_data: dict, test_data: dict, metric: dict) -> dict:
    """What both tasks say of a run."""
    loader = dict(
        batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False)
    )
    test_loader = dict(loader, dataset=test_data)
    return dict(
        train_dataloader=dict(loader, dataset=train_data),
        test_dataloader=test_loader,
        val_dataloader=test_loader,
        test_evaluator=metric,
        val_evaluator=metric,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        param_scheduler=dict(type='LinearLR', by_epoch=False, begin=0, end=9),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        test_cfg=dict(type='TestLoop'),
        val_cfg=dict(type='ValLoop'),
        log_level='ERROR',
        custom_hooks=[dict(type='mmengine.KeepLoadedWeights')],
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1,
                by_epoch=False,
                max_keep_ckpts=2,
                save_best='auto',
            )
        ),
    )


def run(tool, folder: Path, name: str, *args: str) -> State:
    # What a user's own work folder would be.
    tool.main(
        [str(folder / f'{name}.py'), *args, '--work-dir', str(Path.cwd() / 'work')]
    )
    return LOADED


def load_function(folder: Path, path: str) -> State:
    return convnext_mm.load_checkpoint(path)


def init_backbone(folder: Path, path: str, **init_cfg: Any) -> State:
    model = MODELS.build(
        dict(
            BACKBONE,
            init_cfg=dict(dict(type='Pretrained', checkpoint=path), **init_cfg),
        )
    )
    model.init_weights()
    return model.state_dict()


def init_model(folder: Path, path: str, where: str = 'model') -> State:
    options = [
        f'{where}.init_cfg.type=Pretrained',
        f'{where}.init_cfg.checkpoint={path}',
    ]
    if where != 'model':
        options.append(f'{where}.init_cfg.prefix={where[6:]}.')
    state = run(train, folder, 'detector', '--cfg-options', *options)
    return {key: tensor for key, tensor in state.items() if key.startswith(where[6:])}


def load_from(folder: Path, path: str) -> State:
    return run(train, folder, 'detector', '--cfg-options', f'load_from={path}')


def resume(folder: Path, path: str) -> State:
    return run(train, folder, 'detector', '--resume', path)


def resume_last(folder: Path, path: str) -> State:
    Path('work').mkdir()
    Path('work/last_checkpoint').write_text(path)
    return run(train, folder, 'detector', '--resume')


def run_test(folder: Path, path: str) -> State:
    return run(test, folder, 'detector', path)


def run_tta(folder: Path, path: str) -> State:
    state = run(test, folder, 'segmentor', path, '--tta')
    return {key.removeprefix('module.'): t for key, t in state.items()}


def convert_file(folder: Path, path: str) -> State:
    if convert.main([path, 'converted.pth']):  # its error is in the log
        raise CheckpointError('refused')
    return torch.load('converted.pth')['state_dict']


def infer_boxes(folder: Path, path: str) -> State:
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(
        str(folder / 'detector.py'), path, 'cpu', show_progress=False
    )
    inferencer(str(folder / 'images/0.png'))
    return inferencer.model.state_dict()


def infer_boxes_of_weights(folder: Path, path: str) -> State:
    from mmdet.apis import DetInferencer

    return DetInferencer(None, path, 'cpu').model.state_dict()


def infer_masks(folder: Path, path: str) -> State:
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(
        str(folder / 'segmentor.py'), path, device='cpu', show_progress=False
    )
    inferencer(str(folder / 'images/0.png'))
    return inferencer.model.state_dict()


class Door(NamedTuple):
    """A way in; the model whose checkpoint comes through it."""

    enter: Callable[[Path, str], State]
    model: str


DOORS: dict[str, Door] = {
    'load_checkpoint()': Door(load_function, 'backbone'),
    'init_cfg of the backbone': Door(init_backbone, 'backbone'),
    'init_cfg of the detector': Door(init_model, 'detector'),
    'init_cfg of a head': Door(
        lambda folder, path: init_model(folder, path, 'model.bbox_head'), 'detector'
    ),
    'load_from': Door(load_from, 'detector'),
    '--resume FILE': Door(resume, 'detector'),
    '--resume': Door(resume_last, 'detector'),
    'test.py': Door(run_test, 'detector'),
    'test.py --tta': Door(run_tta, 'segmentor'),
    'convert_checkpoint.py': Door(convert_file, 'backbone'),
    'DetInferencer': Door(infer_boxes, 'detector'),
    'DetInferencer, no config': Door(infer_boxes_of_weights, 'detector'),
    'MMSegInferencer': Door(infer_masks, 'segmentor'),
}


def make_world(folder: Path) -> dict[str, dict]:
    """Data, configs, and a valid checkpoint for each kind of model."""
    make_data(folder)
    configs = dict(detector=detector_config(folder), segmentor=segmentor_config(folder))
    backbone = toys.randomise(ConvNeXt(toys.ARCH))
    backbone.stages[1][1].gamma.data.fill_(0.5)  # some files expand it
    checkpoints = dict(backbone=backbone.state_dict())
    for name, cfg in configs.items():
        cfg = Config(cfg)
        cfg.dump(folder / f'{name}.py')
        init_default_scope(cfg.default_scope)
        model = toys.randomise(MODELS.build(cfg.model))
        model.backbone.load_state_dict(checkpoints['backbone'])
        # Which every PyTorch reads safely.
        path = folder / f'first_{name}.safetensors'
        save_file(model.state_dict(), path)
        train.main(
            [
                str(folder / f'{name}.py'),
                '--work-dir',
                str(folder / name),
                '--cfg-options',
                f'load_from={path}',
                'train_cfg.max_iters=1',
            ]
        )
        checkpoints[name] = dict(
            torch.load(folder / name / 'iter_1.pth', weights_only=False),
            state_dict=model.state_dict(),
        )
    torch.save(checkpoints, folder / 'checkpoints.pth')
    LOADED.clear()
    return checkpoints


def compare(state: State, checkpoint: dict) -> tuple[str, str]:
    """Whether what was loaded is what the valid checkpoint holds."""
    expected = checkpoint.get('state_dict', checkpoint)
    if not state:
        return 'silent', 'nothing was loaded'
    wrong = [
        key
        for key, tensor in state.items()
        if not torch.equal(tensor.to(expected[key]), expected[key])
    ]
    return ('wrong', f'{wrong[:3]}') if wrong else ('right', '')


def refused_with(error: BaseException) -> tuple[str, str]:
    """A refusal is an exception of ours, or the one sentence of a tool."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, CheckpointError):
        return 'refused', f'{type(cause).__name__}: {cause}'
    return 'foreign', f'{type(error).__name__}: {error}'


def enter_with_limits(
    door: Door, folder: Path, path: str, checkpoint: dict
) -> tuple[str, str]:
    def read(name: str) -> int:
        with open('/proc/self/status') as status:
            return (
                next(int(line.split()[1]) for line in status if line.startswith(name))
                * 1024
            )

    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    used = read('VmData')
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_BYTES,) * 2)
    try:
        return compare(door.enter(folder, path), checkpoint)
    except BaseException as error:
        return refused_with(error)


def serve(folder: Path) -> None:
    """Answers each line of standard input, a JSON list of door, file and
    working folder, with a line: outcome and message."""
    torch.set_num_threads(1)
    quick_configs()
    checkpoints = make_world(folder)
    gc.freeze()  # and data sets collect garbage
    answers = os.fdopen(os.dup(1), 'w')
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        name, path, where = json.loads(line)
        door = DOORS[name]
        pid = os.fork()
        if pid == 0:
            os.chdir(where)
            os.environ['CANARY'] = f'{where}/canary'
            log = os.open('log', os.O_CREAT | os.O_WRONLY)
            for stream in (0, 1, 2):
                os.dup2(log, stream)
            outcome = enter_with_limits(door, folder, path, checkpoints[door.model])
            Path('outcome').write_text(json.dumps(outcome))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        try:
            outcome = json.loads(Path(where, 'outcome').read_text())
        except FileNotFoundError:
            killed = os.WTERMSIG(status)
            outcome = [
                'hung' if killed in (signal.SIGXCPU, signal.SIGKILL) else 'crashed',
                f'signal {killed}',
            ]
        if Path(where, 'canary').exists():
            outcome = ['executed', outcome[1]]
        elif not Path(where, 'victim/file').exists():
            outcome = ['deleted', outcome[1]]
        elif re.search(
            rb'[\x00-\x08\x0b-\x1f\x7f\x9b]FORGED|^FORGED|'
            rb'^2026.*FORGED',
            Path(where, 'log').read_bytes(),
            re.MULTILINE,
        ):
            outcome = ['forged', outcome[1]]
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == '__main__':
    serve(Path(sys.argv[1]).resolve())

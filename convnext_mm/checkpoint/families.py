"""The one table of checkpoint families, and how a family is recognised.

A row of :data:`FAMILIES` says how one library names the parts of a ConvNeXt.
Names may use ``{s}`` (stage, from 0), ``{s1}`` (stage, from 1), ``{even}`` and
``{odd}`` (2 s, 2 s + 1) and ``{b}`` (block). To add a family, add a row and a
test. What our own names are: :mod:`.layout`.
"""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from convnext_mm.archs import NUM_STAGES

from .errors import UnknownCheckpointError, quoted
from .layout import FINAL_NORM, MAP_NORM, STEM

MAX_BLOCKS = 64  # in one stage; the deepest published one has 30
# Kinds of leftovers that fitting finds, too.
FINAL_NORM_KIND = 'final norm'
OUT_NORMS_KIND = 'output norms that the model does not build'


class Family(NamedTuple):
    """How a family names the parts of a ConvNeXt."""

    name: str
    origin: str
    stem: tuple[str, ...]  # convolution, norm
    downsample: tuple[str, ...]  # of stages 1 to 3: norm, convolution
    block: str
    dwconv: str
    norm: str
    pwconv1: str
    pwconv2: str
    gamma: str = 'gamma'  # layer scale, V1
    grn: tuple[str, str] = ('grn.gamma', 'grn.beta')  # V2
    final_norm: str | None = None
    map_norm: str | None = None
    out_norm: str | None = None  # of each emitted stage
    kernel: str = 'weight'  # of the convolutions after the stem
    # A key that only this family has, where the parts are named as in another.
    marker: str | None = None
    num_stages: int = NUM_STAGES


# What several families share: names of the parts, without norms after them.
_PAPER = Family(
    name='',
    origin='',
    stem=('downsample_layers.0.0', 'downsample_layers.0.1'),
    downsample=('downsample_layers.{s}.0', 'downsample_layers.{s}.1'),
    block='stages.{s}.{b}',
    dwconv='dwconv',
    norm='norm',
    pwconv1='pwconv1',
    pwconv2='pwconv2',
)
_TIMM = Family(
    name='',
    origin='',
    stem=('stem.0', 'stem.1'),
    downsample=('stages.{s}.downsample.0', 'stages.{s}.downsample.1'),
    block='stages.{s}.blocks.{b}',
    dwconv='conv_dw',
    norm='norm',
    pwconv1='mlp.fc1',
    pwconv2='mlp.fc2',
    grn=('mlp.grn.weight', 'mlp.grn.bias'),
)

FAMILIES = (
    _PAPER._replace(
        name='paper',
        origin="the paper's release, V1 and V2, classifiers and fine-tuned detectors "
        'and segmentors; convnext_mm',
        final_norm='norm',
        out_norm='norm{s}',
    ),
    _PAPER._replace(
        name='dinov3',
        origin="DINOv3's release",
        final_norm='norm',
        marker='norms.3.weight',
    ),
    _PAPER._replace(
        name='fcmae',
        origin='masked pretraining of ConvNeXt V2, sparse convolutions',
        downsample=('downsample_layers.{s}.0.ln', 'downsample_layers.{s}.1'),
        norm='norm.ln',
        pwconv1='pwconv1.linear',
        pwconv2='pwconv2.linear',
        kernel='kernel',
    ),
    _TIMM._replace(
        name='timm',
        origin='timm, V1 and V2, linear or 1x1-convolution MLP',
        final_norm='head.norm',
        map_norm='norm_pre',
    ),
    _TIMM._replace(
        name='open_clip',
        origin='OpenCLIP, with a timm trunk',
        final_norm='head.norm',
        map_norm='norm_pre',
        marker='visual.trunk.stem.0.weight',
    ),
    _TIMM._replace(
        name='timm_features',
        origin='timm with features_only=True',
        stem=('stem_0', 'stem_1'),
        downsample=('stages_{s}.downsample.0', 'stages_{s}.downsample.1'),
        block='stages_{s}.blocks.{b}',
    ),
    Family(
        'torchvision',
        'torchvision',
        stem=('features.0.0', 'features.0.1'),
        downsample=('features.{even}.0', 'features.{even}.1'),
        block='features.{odd}.{b}',
        dwconv='block.0',
        norm='block.2',
        pwconv1='block.3',
        pwconv2='block.5',
        gamma='layer_scale',
        final_norm='classifier.0',
    ),
    Family(
        'huggingface',
        'transformers: ConvNext and ConvNextV2',
        stem=('embeddings.patch_embeddings', 'embeddings.layernorm'),
        downsample=(
            'encoder.stages.{s}.downsampling_layer.0',
            'encoder.stages.{s}.downsampling_layer.1',
        ),
        block='encoder.stages.{s}.layers.{b}',
        dwconv='dwconv',
        norm='layernorm',
        pwconv1='pwconv1',
        pwconv2='pwconv2',
        gamma='layer_scale_parameter',
        grn=('grn.weight', 'grn.bias'),
        final_norm='layernorm',
        out_norm='hidden_states_norms.stage{s1}',
    ),
    Family(
        'huggingface_dinov3',
        'transformers: DINOv3 ConvNext',
        stem=('stages.0.downsample_layers.0', 'stages.0.downsample_layers.1'),
        downsample=('stages.{s}.downsample_layers.0', 'stages.{s}.downsample_layers.1'),
        block='stages.{s}.layers.{b}',
        dwconv='depthwise_conv',
        norm='layer_norm',
        pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2',
        final_norm='layer_norm',
    ),
    _PAPER._replace(
        name='mmpretrain',
        origin='mmpretrain classifiers, and MMDetection and MMSegmentation models on '
        'its backbone',
        dwconv='depthwise_conv',
        pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2',
        out_norm='norm{s}',
    ),
    _PAPER._replace(
        name='isotropic',
        origin="the paper's release, isotropic networks",
        stem=('stem',),
        downsample=(),
        block='blocks.{b}',
        final_norm='norm',
        marker='stem.weight',
        num_stages=1,
    ),
)

# A container or prefix of these names holds an averaged copy of the weights.
EMA_NAMES = ('model_ema', 'state_dict_ema', 'ema', 'ema_model')
# MMEngine saves the averaged weights as state_dict and the others here.
SWAPPED_EMA = 'ema_state_dict'
# Leftovers that are expected, by the first pattern of each that a key contains
# (dots mark whole parts of a name).
LEFTOVERS: dict[str, tuple[str, ...]] = {
    'text tower': (
        '.text.',
        '.transformer.',
        '.token_embedding.',
        '.positional_embedding.',
        '.ln_final.',
        '.logit_scale.',
        '.logit_bias.',
        '.text_projection.',
        '.visual.head.',
    ),
    'decoder of masked pretraining': ('.decoder.', '.mask_token.', '.proj.', '.pred.'),
    'detector or segmentor parts': (
        '.neck.',
        '.rpn_head.',
        '.roi_head.',
        '.bbox_head.',
        '.mask_head.',
        '.decode_head.',
        '.auxiliary_head.',
        '.data_preprocessor.',
    ),
    FINAL_NORM_KIND: (
        '.norm.',
        '.norms.',
        '.layernorm.',
        '.layer_norm.',
        '.final_norm.',
        '.norm_pre.',
        '.head.norm.',
        '.classifier.0.',
    ),
    'classifier head': ('.head.', '.classifier.', '.fc.'),
    OUT_NORMS_KIND: (
        '.norm0.',
        '.norm1.',
        '.norm2.',
        '.norm3.',
        '.hidden_states_norms.',
    ),
    'averaged copy of another training state': (f'.{SWAPPED_EMA}.',),
}


def _affine(ours: str, theirs: str, weight: str = 'weight') -> dict[str, str]:
    return {f'{theirs}.{weight}': f'{ours}.weight', f'{theirs}.bias': f'{ours}.bias'}


def layer_names(family: Family) -> dict[str, str]:
    """Every name that the family can give a parameter of stem, downsampling
    layers and stages, to ours."""
    names = {}
    for s in range(family.num_stages):
        place = dict(s=s, s1=s + 1, even=2 * s, odd=2 * s + 1)
        for i, layer in enumerate(family.downsample if s else family.stem):
            is_kernel = s > 0 and i == 1
            names.update(
                _affine(
                    f'downsample_layers.{s}.{i}',
                    layer.format(**place),
                    family.kernel if is_kernel else 'weight',
                )
            )
        for b in range(MAX_BLOCKS):
            theirs = family.block.format(**place, b=b)
            ours = f'stages.{s}.{b}'
            names.update(
                _affine(f'{ours}.dwconv', f'{theirs}.{family.dwconv}', family.kernel)
            )
            for part in ('norm', 'pwconv1', 'pwconv2'):
                names.update(
                    _affine(f'{ours}.{part}', f'{theirs}.{getattr(family, part)}')
                )
            names[f'{theirs}.{family.gamma}'] = f'{ours}.gamma'
            names[f'{theirs}.{family.grn[0]}'] = f'{ours}.grn.gamma'
            names[f'{theirs}.{family.grn[1]}'] = f'{ours}.grn.beta'
    return names


def norm_names(family: Family) -> dict[str, str]:
    """The family's names of norms outside the stages, to ours."""
    names = {}
    for ours, theirs in ((FINAL_NORM, family.final_norm), (MAP_NORM, family.map_norm)):
        if theirs is not None:
            names.update(_affine(ours, theirs))
    if family.out_norm is not None:
        for s in range(NUM_STAGES):
            names.update(_affine(f'norm{s}', family.out_norm.format(s=s, s1=s + 1)))
    return names


@cache
def _all_names() -> dict[str, dict[str, str]]:
    """name in some family -> {family: our name}."""
    names: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        for theirs, ours in layer_names(family).items():
            names.setdefault(theirs, {})[family.name] = ours
    return names


@cache
def _most_parts() -> int:
    """Parts (between dots) of the longest name in any family."""
    return 1 + max(name.count('.') for name in _all_names())


# What a network has at least, whatever its depth.
_CORE = {
    STEM,
    'stages.0.0.dwconv.weight',
    'stages.0.0.pwconv1.weight',
    'stages.0.0.pwconv2.weight',
}


class Recognised(NamedTuple):
    """A ConvNeXt found among the keys of a checkpoint."""

    family: Family
    prefix: str
    names: dict[str, str]  # key without prefix -> our name

    @property
    def has_core(self) -> bool:
        """Whether it has what every network has, not only like names."""
        return {*self.names.values()} >= _CORE


def recognise(keys: Iterable[str]) -> list[Recognised]:
    """Every ConvNeXt among the keys, by prefix; the largest first.

    A ConvNeXt is what has parameters of stem, downsampling layers or stages
    named as in one family, all behind the same prefix.
    """
    keys = list(keys)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for key in keys:
        start = len(key) + 1
        for _ in range(_most_parts()):
            if start == 0:
                break
            start = key.rfind('.', 0, start - 1) + 1
            for family, ours in _all_names().get(key[start:], {}).items():
                names = found.setdefault(key[:start], {}).setdefault(family, {})
                names[key[start:]] = ours
    marked = {
        family.name
        for family in FAMILIES
        if family.marker is None
        or any(f'.{key}'.endswith(f'.{family.marker}') for key in keys)
    }
    networks = [
        network
        for prefix, by_family in found.items()
        for network in _networks(prefix, by_family, marked)
    ]
    return sorted(networks, key=lambda network: -len(network.names))


def _networks(
    prefix: str, by_family: dict[str, dict[str, str]], marked: set[str]
) -> list[Recognised]:
    """What lies behind a prefix. Where names fit several families the one that
    explains most keys is taken, then one with a marker; others only where they
    have a network of their own there."""
    candidates = sorted(
        (
            family
            for family in FAMILIES
            if family.name in by_family and family.name in marked
        ),
        key=lambda family: (len(by_family[family.name]), family.marker is not None),
        reverse=True,
    )
    taken: list[Recognised] = []
    for family in candidates:
        names = by_family[family.name]
        if not taken or (
            all({*n.values()} >= _CORE for n in (names, *(t.names for t in taken)))
            and all(names.keys() - t.names.keys() for t in taken)
        ):
            taken.append(Recognised(family, prefix, names))
    return taken


def choose(found: list[Recognised], prefix: str | None) -> tuple[Recognised, bool]:
    """The ConvNeXt to load, and whether it is an averaged (EMA) copy.

    Raises:
        UnknownCheckpointError: There is none, or several and no ``prefix``
            says which.
    """
    if prefix is not None:
        found = _behind(found, prefix)
    averaged = [r for r in found if set(r.prefix.split('.')) & set(EMA_NAMES)]
    found = (
        averaged
        or [r for r in found if SWAPPED_EMA not in r.prefix.split('.')]
        or found
    )
    if not found:
        raise UnknownCheckpointError(
            'no ConvNeXt weights of a known family are in it; known are '
            f'{", ".join(family.name for family in FAMILIES)}'
        )
    if len(found) > 1:
        if len({r.prefix for r in found}) == 1:
            names = ' and '.join(r.family.name for r in found)
            raise UnknownCheckpointError(
                f'it holds networks in the names of {names} in one place, '
                f'behind {quoted(found[0].prefix)}: keep those of one'
            )
        places = ', '.join(
            f'{quoted(r.prefix)} ({len(r.names)} parameters)' for r in found[:4]
        )
        raise UnknownCheckpointError(
            f'ConvNeXt parameters lie in more than one place: {places}. '
            'Either keys are doubled, or there are several networks: then '
            'name one with prefix=...'
        )
    return found[0], bool(averaged)


def _behind(found: list[Recognised], prefix: str) -> list[Recognised]:
    wanted = prefix.rstrip('.') + '.' if prefix else ''
    kept = [
        r
        for r in found
        if not wanted
        or f'.{r.prefix}'.endswith(f'.{wanted}')
        or f'.{wanted}' in f'.{r.prefix}'
    ]
    if not kept:
        places = ', '.join(quoted(r.prefix) for r in found[:4]) or 'nowhere'
        raise UnknownCheckpointError(
            f'no ConvNeXt weights lie behind prefix={prefix!r}; they were '
            f'found behind: {places}'
        )
    return kept


def label_leftover(key: str) -> str:
    """What a key that the backbone does not use belongs to."""
    dotted = f'.{key}.'
    for label, patterns in LEFTOVERS.items():
        if any(pattern in dotted for pattern in patterns):
            return label
    return 'unknown'

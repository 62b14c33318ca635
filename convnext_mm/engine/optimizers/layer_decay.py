"""Optimizer wrapper constructor with layer-wise learning-rate decay."""

from collections.abc import Callable
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from convnext_mm.models import StagedBackbone
from convnext_mm.models.arguments import integer, number, one_of
from convnext_mm.models.layer_id import DECAY_TYPES
from convnext_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, register

PREFIX = 'backbone.'
# Parameters of these kinds never get weight decay here, so 0 says nothing new.
NO_DECAY_KEYS = ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult')
CUSTOM_OPTIONS = ('lr_mult', 'decay_mult')
PARAMWISE_KEYS = (
    'decay_rate',
    'decay_type',
    'num_layers',
    'custom_keys',
    'bypass_duplicate',
    *NO_DECAY_KEYS,
)


@register(OPTIM_WRAPPER_CONSTRUCTORS)
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Gives early layers of a backbone a smaller learning rate than late ones.

    A parameter's learning rate is ``lr * decay_rate ** (num_layers + 1 - id)``
    with the ids of :func:`convnext_mm.models.layer_id.get_layer_id`: necks,
    heads and output norms train at the full ``lr``. Parameters with one
    dimension, biases and GRN's gamma and beta get no weight decay; frozen ones
    are left out. For ConvNeXt V1 this is what the published recipes do (arXiv
    2201.03545, table 8 ff. and its released code). It serves any model whose
    ``backbone`` is one of this package, and, layer-wise with its
    own count, any other that has ``get_layer_depth`` (those of mmpretrain).

    Args:
        optim_wrapper_cfg: MMEngine's, with ``optimizer``, whose ``lr`` is
            needed. Any wrapper type: AMP, gradient accumulation, clipping.
        paramwise_cfg: ``decay_rate`` in (0, 1]; ``decay_type``,
            ``'layer_wise'`` (default) or ``'stage_wise'``; ``num_layers``, by
            default from the backbone's depths; and of MMEngine's own keys
            ``custom_keys`` (``lr_mult`` multiplies the decayed learning rate),
            ``bypass_duplicate`` (shared parameters are always counted once) and
            ``norm_decay_mult``, ``bias_decay_mult``, ``flat_decay_mult`` (at 0,
            which is the rule here). Others are refused.

    Raises:
        TypeError, ValueError: A setting has the wrong type or value, or the
            model has no backbone that can be served.

    Examples:
        >>> optim_wrapper = dict(
        ...     type='AmpOptimWrapper',
        ...     constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        cfg = self.paramwise_cfg
        unknown = [key for key in cfg if key not in PARAMWISE_KEYS]
        if unknown:
            raise ValueError(
                f'paramwise_cfg has {unknown}, which layer decay does not '
                f'take; allowed: {PARAMWISE_KEYS}. For other multipliers use '
                'custom_keys, such as dict(dwconv=dict(decay_mult=0.))'
            )
        for key in NO_DECAY_KEYS:
            if cfg.get(key, 0) != 0:
                raise ValueError(
                    f'{key}={cfg[key]!r}: parameters with one dimension and '
                    'biases get no weight decay under layer decay; leave '
                    f'{key} out or set it to 0'
                )
        rate = number('paramwise_cfg.decay_rate', cfg.get('decay_rate'))
        if not 0 < rate <= 1:
            raise ValueError(f'decay_rate must be in (0, 1], got {rate}')
        one_of('decay_type', self._decay_type, DECAY_TYPES)
        if cfg.get('num_layers') is not None:
            integer('num_layers', cfg['num_layers'], 1)
        for key, options in cfg.get('custom_keys', {}).items():
            if not isinstance(options, dict):
                raise TypeError(
                    f'custom_keys[{key!r}] must be a dict of '
                    f'{CUSTOM_OPTIONS}, got {options!r}'
                )
            for name, value in options.items():
                one_of(f'a key of custom_keys[{key!r}]', name, CUSTOM_OPTIONS)
                number(f'custom_keys[{key!r}][{name!r}]', value)
        if self.base_lr is None:
            raise ValueError(
                'layer decay scales the learning rate: set lr in '
                'optim_wrapper.optimizer'
            )

    @property
    def _decay_type(self) -> str:
        return self.paramwise_cfg.get('decay_type', 'layer_wise')

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Appends the parameter groups of ``module``, the whole model.

        Args:
            params: Parameter groups, extended in place. Each gets ``lr``,
                ``weight_decay``, ``lr_scale``, ``group_name`` and the names of
                its parameters, ``param_names``.
            module: The model, with a ``backbone``.
        """
        get_id, full_id = self._layer_ids(module)
        custom_keys = self.paramwise_cfg.get('custom_keys', {})
        # Longest first, as in MMEngine: the most specific key decides.
        sorted_keys = sorted(sorted(custom_keys), key=len, reverse=True)
        groups: dict[tuple[int, bool, str], dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            layer_id = get_id(name)
            decays = not (
                param.ndim <= 1 or name.endswith(('.bias', '.grn.gamma', '.grn.beta'))
            )
            custom = next((key for key in sorted_keys if key in name), '')
            key = (layer_id, not decays, custom)
            if key not in groups:
                groups[key] = self._new_group(layer_id, full_id, decays, custom)
            groups[key]['params'].append(param)
            groups[key]['param_names'].append(name)
        if not groups:
            raise ValueError(
                f'{type(module).__name__} has no parameter to '
                'train: all are frozen (requires_grad=False)'
            )
        added = [groups[key] for key in sorted(groups)]
        params.extend(added)
        self._log_table(added)

    def _layer_ids(self, model: nn.Module) -> tuple[Callable[[str], int], int]:
        """A function from parameter name to layer id, and the id of the full
        learning rate."""
        backbone: Any = getattr(model, 'backbone', None)
        if isinstance(backbone, StagedBackbone):
            return self._own_ids(model, backbone)
        if hasattr(backbone, 'get_layer_depth'):
            return self._ids_of_another(backbone)
        found = (
            'no backbone'
            if backbone is None
            else f'the backbone {type(backbone).__name__}'
        )
        raise ValueError(
            'layer decay needs a model whose backbone has get_layer_depth '
            f'(convnext_mm.ConvNeXt, mmpretrain backbones); '
            f'{type(model).__name__} has {found}'
        )

    def _own_ids(
        self, model: nn.Module, backbone: StagedBackbone
    ) -> tuple[Callable[[str], int], int]:
        default = backbone.default_num_layers()
        num_layers = self.paramwise_cfg.get('num_layers') or default

        def get_id(name: str) -> int:
            return backbone.get_layer_id(name, num_layers, self._decay_type, PREFIX)

        # An id above num_layers + 1 would mean a scale above 1.
        highest = max(get_id(name) for name, _ in model.named_parameters())
        excess = highest - num_layers - 1
        if excess > 0:
            raise ValueError(
                f'num_layers={num_layers} gives some layers of this '
                'backbone more than the full learning rate; at least '
                f'{num_layers + excess} is needed for {self._decay_type} decay of '
                f'depths {backbone.depths}, {default} is the default'
            )
        return get_id, num_layers + 1

    def _ids_of_another(self, backbone: Any) -> tuple[Callable[[str], int], int]:
        kind = type(backbone).__name__
        if self._decay_type != 'layer_wise':
            raise ValueError(
                f'decay_type={self._decay_type!r} is for backbones of convnext_mm; '
                f"{kind} is served with 'layer_wise'"
            )
        full_id = backbone.get_layer_depth('head', PREFIX)[1] - 1
        num_layers = self.paramwise_cfg.get('num_layers')
        if num_layers not in (None, full_id - 1):
            raise ValueError(
                f'num_layers={num_layers}, but {kind} counts {full_id - 1} layers '
                'itself; leave num_layers out'
            )

        def get_id(name: str) -> int:
            if not name.startswith(PREFIX):
                return full_id
            return backbone.get_layer_depth(name, PREFIX)[0]

        return get_id, full_id

    def _new_group(
        self, layer_id: int, full_id: int, decays: bool, custom: str
    ) -> dict:
        options = self.paramwise_cfg.get('custom_keys', {}).get(custom, {})
        scale = self.paramwise_cfg['decay_rate'] ** (full_id - layer_id)
        scale *= options.get('lr_mult', 1.0)
        name = f'layer_{layer_id}_{"decay" if decays else "no_decay"}'
        group = dict(
            params=[],
            param_names=[],
            group_name=f'{name}_{custom}' if custom else name,
            lr_scale=scale,
            lr=self.base_lr * scale,
        )
        if not decays:
            group['weight_decay'] = 0.0
        elif self.base_wd is not None:
            group['weight_decay'] = self.base_wd * options.get('decay_mult', 1.0)
        return group

    def _log_table(self, groups: list[dict]) -> None:
        width = max(len(group['group_name']) for group in groups)
        lines = [
            f'Layer decay: {self._decay_type}, rate '
            f'{self.paramwise_cfg["decay_rate"]}, base lr {self.base_lr:g}',
            f'{"group":{width}}  lr scale  weight decay  tensors   parameters',
        ]
        for group in groups:
            decay = group.get('weight_decay')
            lines.append(
                f'{group["group_name"]:{width}}  {group["lr_scale"]:8.4f}  '
                f'{"default" if decay is None else format(decay, "g"):>12}  '
                f'{len(group["params"]):7d}  '
                f'{sum(p.numel() for p in group["params"]):11,d}'
            )
        print_log('\n'.join(lines), logger='current')

"""Child registries of MMEngine's roots, scope ``convnext_mm``.

``type='convnext_mm.ConvNeXt'`` resolves from any ``default_scope`` with nothing
imported first: MMEngine imports this module when it meets the scope, and the
``locations`` below when it looks a name up.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import LOOPS as ROOT_LOOPS
from mmengine.registry import METRICS as ROOT_METRICS
from mmengine.registry import MODEL_WRAPPERS as ROOT_MODEL_WRAPPERS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import VISBACKENDS as ROOT_VISBACKENDS
from mmengine.registry import WEIGHT_INITIALIZERS as ROOT_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

SCOPE = 'convnext_mm'

MODELS = Registry('model', parent=ROOT_MODELS, scope=SCOPE, locations=['convnext_mm'])
MODEL_WRAPPERS = Registry(
    'model wrapper', parent=ROOT_MODEL_WRAPPERS, scope=SCOPE, locations=['convnext_mm']
)
HOOKS = Registry('hook', parent=ROOT_HOOKS, scope=SCOPE, locations=['convnext_mm'])
LOOPS = Registry('loop', parent=ROOT_LOOPS, scope=SCOPE, locations=['convnext_mm'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=ROOT_OPTIM_WRAPPERS,
    scope=SCOPE,
    locations=['convnext_mm'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=ROOT_OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['convnext_mm'],
)
DATASETS = Registry(
    'dataset', parent=ROOT_DATASETS, scope=SCOPE, locations=['convnext_mm']
)
TRANSFORMS = Registry(
    'transform', parent=ROOT_TRANSFORMS, scope=SCOPE, locations=['convnext_mm']
)
METRICS = Registry(
    'metric', parent=ROOT_METRICS, scope=SCOPE, locations=['convnext_mm']
)
VISBACKENDS = Registry(
    'vis_backend', parent=ROOT_VISBACKENDS, scope=SCOPE, locations=['convnext_mm']
)
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=ROOT_WEIGHT_INITIALIZERS,
    scope=SCOPE,
    locations=['convnext_mm'],
)


def register(registry: Registry) -> Callable[[type], type]:
    """Class decorator: registers ``Name`` here and, bare, in the root registry.

    The bare name serves ``custom_imports=dict(imports=['convnext_mm'])``. A
    class that already has the bare name in the root registry keeps it; the
    scoped name is always ours.
    """

    def decorate(cls: type) -> type:
        registry.register_module(module=cls)
        if cls.__name__ not in registry.parent.module_dict:
            registry.parent.register_module(module=cls)
        return cls

    return decorate


def register_on_demand(registry: Registry, name: str, location: str) -> None:
    """Registers, under its scoped name only, a class whose module is imported
    when it is first built: the module needs a head library."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(location), name)(*args, **kwargs)

    build.__name__ = name
    registry.register_module(name=name, module=build)

"""The scoped type resolves by itself; the bare name after an import."""

import pytest

from repo import run
from warm_python import warm_python

RESOLVE = """
from mmengine.registry import init_default_scope
init_default_scope({scope!r})
from {scope}.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
if {imported}:
    from mmengine.utils import import_modules_from_strings
    import_modules_from_strings(['convnext_mm'])
model = MODELS.build(dict(type={type!r}, arch='atto'))
found = OPTIM_WRAPPER_CONSTRUCTORS.get({constructor!r})
print('built by', type(model).__module__, 'and', found.__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize('prefix, imported', [('convnext_mm.', False), ('', True)])
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmengine'])
def test_type_resolves(scope, prefix, imported):
    code = RESOLVE.format(
        scope=scope,
        imported=imported,
        type=prefix + 'ConvNeXt',
        constructor=prefix + 'LayerDecayOptimWrapperConstructor',
    )
    assert (
        'built by convnext_mm.models.convnext and '
        'convnext_mm.engine.optimizers.layer_decay'
    ) in run(warm_python(), '-c', code)


@pytest.mark.slow
def test_a_class_of_the_same_bare_name_is_kept():
    code = (
        'from mmengine.registry import MODELS\n'
        '@MODELS.register_module()\n'
        'class ConvNeXt: pass\n'
        'import convnext_mm\n'
        'print(MODELS.get("ConvNeXt") is ConvNeXt,\n'
        '      MODELS.get("convnext_mm.ConvNeXt") is '
        'convnext_mm.ConvNeXt)'
    )
    assert run(warm_python(), '-c', code).strip().endswith('True True')


@pytest.mark.slow
def test_what_recipes_name_resolves_with_nothing_imported():
    pytest.importorskip('mmdet')
    code = """
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS
print(OPTIM_WRAPPERS.get('convnext_mm.AmpOptimWrapper').__module__)
print(HOOKS.get('convnext_mm.StepProfilerHook').__module__)
print(type(MODELS.build(dict(
    type='convnext_mm.SingleRoIExtractor', out_channels=1, featmap_strides=[4],
    roi_layer=dict(type='RoIAlign', output_size=7)))).__module__)
"""
    said = run(warm_python(), '-c', code)
    found = [w for w in said.split() if w.startswith('convnext_mm.')]
    assert found == [
        'convnext_mm.engine.optimizers.amp',
        'convnext_mm.engine.hooks.profile_hook',
        'convnext_mm.models.roi_extractor',
    ]

"""Layer ids for learning-rate decay: pure functions of a parameter's name."""

from collections.abc import Sequence

DECAY_TYPES = ('layer_wise', 'stage_wise')


def default_num_layers(depths: Sequence[int]) -> int:
    """Number of layers for decay that suits a network of these depths.

    6 where the third stage has at most 9 blocks, 12 up to 27 (the published
    recipes), more beyond, so that no learning-rate scale exceeds 1.
    """
    return 6 if depths[2] <= 9 else max(12, 4 + (depths[2] - 1) // 3)


def get_layer_id(
    name: str,
    num_layers: int,
    decay_type: str = 'layer_wise',
    prefix: str = 'backbone.',
) -> int:
    """Layer id of a ConvNeXt parameter; its learning-rate scale is
    ``decay_rate ** (num_layers + 1 - layer_id)``.

    Layer-wise, three blocks of the third stage share an id, every other stage
    has one, and a downsampling layer goes with the first block after it.
    Stage-wise, all downsampling layers are 0 and stage i is i + 1. Whatever is
    not the backbone's stem, downsampling layers or stages (output norms, neck,
    heads) gets ``num_layers + 1``: the full learning rate. Source: the released
    fine-tuning code of "A ConvNet for the 2020s" (arXiv 2201.03545).

    Args:
        name: Parameter name, such as ``'backbone.stages.2.4.norm.weight'``.
        num_layers: Number of layers (6 or 12 in the published recipes).
        decay_type: ``'layer_wise'`` or ``'stage_wise'``.
        prefix: What precedes the backbone's own names.
    """
    part, *numbers = name[len(prefix) :].split('.')[:3]
    if not name.startswith(prefix) or part not in ('downsample_layers', 'stages'):
        return num_layers + 1

    stage = int(numbers[0])
    is_downsample = part == 'downsample_layers'
    if decay_type == 'stage_wise':
        return 0 if is_downsample else stage + 1
    if is_downsample and stage == 0:  # the stem
        return 0
    if stage == 3:
        return num_layers
    block = 0 if is_downsample else int(numbers[1])
    return 3 + block // 3 if stage == 2 else stage + 1

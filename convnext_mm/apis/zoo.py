"""Recipes and trained models by name, as the metafiles beside the configs list them.

What needs PyTorch is imported where it is called: names are completed in a shell."""

import contextlib
import difflib
import glob
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from convnext_mm.archs import ARCHS, ISOTROPIC_ARCHS
from convnext_mm.engine.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
TASKS = {  # of the metafiles to the short names of ours
    'Object Detection': 'detection',
    'Instance Segmentation': 'instance',
    'Semantic Segmentation': 'semantic',
    'Image Classification': 'classification',
}
FOLDERS = (
    'mask_rcnn',
    'cascade',
    'rtmdet',
    'upernet',
    'imagenet',
    'isotropic',
    'roadmap',
    'robustness',
    'demo',
)
LETTERS = dict(t='tiny', s='small', b='base', l='large', xl='xlarge', h='huge')


@dataclass(frozen=True)
class Model:
    """A recipe, and the weights that somebody trained with it.

    Args:
        name: Of the config; ``mmdet::NAME`` and ``mmseg::NAME`` where MMDetection
            or MMSegmentation trained it.
        config: Its file.
        tasks: Values of :data:`TASKS`.
        arch: One of :data:`convnext_mm.archs.ARCHS`, ``'isotropic small'`` and its
            like, or the regime of a modernized ResNet.
        weights: Address of trained weights, or None.
        aliases: Shorter names.
        metadata: What else the metafile says: ``Training Data``, ``Initial
            Weights``, ``Trained By``, ``License``, ...
        metrics: Published figures by name, such as ``'box AP (paper)'``.
    """

    name: str
    config: Path
    tasks: tuple[str, ...]
    arch: str
    weights: str | None
    aliases: tuple[str, ...]
    metadata: dict[str, Any] = field(repr=False)
    metrics: dict[str, float]

    @property
    def shortest(self) -> str:
        return min((self.name, *self.aliases), key=len)

    @property
    def pretraining(self) -> str:
        return self.metadata.get('Initial Weights', 'none')

    @property
    def cached(self) -> Path | None:
        """The file of its weights, where it has been fetched."""
        if self.weights is None:
            return None
        from convnext_mm.checkpoint.remote import cache_path

        path = cache_path(self.weights)
        return path if path.is_file() else None

    def fetch(self) -> str:
        """Fetches the weights where they are not in the cache.

        Returns:
            Path of their file.

        Raises:
            ConfigError: Nobody published weights for this recipe.
            CheckpointDownloadError: They cannot be fetched; says where a file that
                was fetched elsewhere is to be put.
        """
        from convnext_mm.checkpoint import CheckpointDownloadError
        from convnext_mm.checkpoint.remote import cache_path, fetch

        if self.weights is None:
            trained = [m.shortest for m in models() if m.weights]
            raise ConfigError(
                f'{self.name} is a recipe: nobody has published weights that were '
                'trained with it. Give a checkpoint of your own, or take one of '
                f'{", ".join(trained)}'
            )
        try:
            return str(fetch(self.weights))
        except CheckpointDownloadError as error:
            reason = str(error).partition('; ')[0]
            raise CheckpointDownloadError(
                f'{reason}. Check the network; or fetch that file elsewhere and put it '
                f'at {cache_path(self.weights)}'
            ) from error


def configs_folder() -> Path:
    """Where the configs are: in the package, or beside it in a checkout."""
    for folder in (PACKAGE / 'configs', PACKAGE.parent / 'configs'):
        if (folder / FOLDERS[0]).is_dir():
            return folder
    raise ConfigError(
        f'the configs of this package are not in {PACKAGE}: install it again'
    )


@cache
def models() -> tuple[Model, ...]:
    """All that the metafiles list, in their order."""
    return tuple(
        _model(configs_folder(), entry)
        for folder in FOLDERS
        for entry in yaml.safe_load(
            (configs_folder() / folder / 'metafile.yml').read_text()
        )['Models']
    )


def _model(folder: Path, entry: dict[str, Any]) -> Model:
    results = entry.get('Results') or ()
    return Model(
        name=entry['Name'],
        config=folder.parent / entry['Config'],
        tasks=tuple(TASKS[result['Task']] for result in results)
        or _tasks_of(entry['Config']),
        arch=_arch_of(entry['Name']),
        weights=entry.get('Weights'),
        aliases=tuple(entry.get('Alias') or ()),
        metadata=entry['Metadata'],
        metrics={
            name: value
            for result in results
            for name, value in result['Metrics'].items()
        },
    )


def _tasks_of(config: str) -> tuple[str, ...]:
    """Of recipes without results."""
    for word, task in (
        ('upernet', 'semantic'),
        ('in1k', 'classification'),
        ('in22k.py', 'classification'),
        ('rtmdet', 'detection'),
    ):
        if word in config:
            return (task,)
    return 'detection', 'instance'


def _arch_of(name: str) -> str:
    regime = re.search(r'modernized-(resnet\d+)', name)
    if regime:
        return regime[1]
    word = re.search(r'convnext[-_](?:v2[-_])?(iso[-_])?([a-z]+)', name)
    arch = word and LETTERS.get(word[2], word[2])
    if word is None or arch not in (ISOTROPIC_ARCHS if word[1] else ARCHS):
        raise ValueError(f'no arch in the name {name!r}')
    return f'isotropic {arch}' if word[1] else str(arch)


def as_dict(model: Model) -> dict[str, Any]:
    """Of plain values, as json has them."""
    return dict(
        name=model.name,
        aliases=list(model.aliases),
        config=str(model.config),
        tasks=list(model.tasks),
        arch=model.arch,
        weights=model.weights,
        cached=None if model.cached is None else str(model.cached),
        metadata=model.metadata,
        metrics=model.metrics,
    )


def find(name: str) -> Model | None:
    """The model with that name or alias, whatever its case; None: there is none."""
    for model in models():
        if name.lower() in (n.lower() for n in (model.name, *model.aliases)):
            return model
    return None


def close_names(name: str) -> list[str]:
    """Names and aliases that may be meant, three at most."""
    known = [n for model in models() for n in (*model.aliases, model.name)]
    return difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)


def find_config(name: str) -> Path:
    """The config at a path, of a recipe, or of a work folder.

    Raises:
        ConfigError: There is neither; close names are given.
    """
    if os.path.isfile(name):
        return Path(name)
    if os.path.isdir(name):
        return _config_of(Path(name))
    model = find(name)
    if model is not None:
        return model.config
    file = Path(name).name
    if name == file:
        for path in configs_folder().rglob(f'{glob.escape(Path(name).stem)}.py'):
            return path
    # As the documentation writes it, where there is no checkout.
    elif Path(name).parts[0] == 'configs':
        path = configs_folder().joinpath(*Path(name).parts[1:])
        if path.is_file():
            return path
    files = {
        p.name: p for p in Path('configs').rglob('*.py') if '_base_' not in p.parts
    }
    matches = difflib.get_close_matches(file, files, n=3, cutoff=0.5)
    # Who wrote no path meant a name.
    close = [str(files[match]) for match in matches] if name.endswith('.py') else []
    close = close or close_names(Path(name).stem)
    raise ConfigError(
        f'config {name!r} does not exist'
        + (
            f': did you mean {" or ".join(close)}?'
            if close
            else '; give the path of a config, a name that `convnext-mm zoo` lists, or '
            'that of a file in the folder that `convnext-mm configs` prints'
        )
    )


def resolve(model: str, checkpoint: str | None = None) -> tuple[str, str, Model | None]:
    """What a user means by a model.

    Args:
        model: The name of a trained model; a config, with ``checkpoint``; or a
            work folder.
        checkpoint: Path or address; the model's own by default.

    Returns:
        Config, checkpoint, and the model of the zoo whose weights these are.

    Raises:
        ConfigError: There is no such model, or it has no weights.
        CheckpointError: The weights cannot be fetched, or are damaged.
    """
    if os.path.isdir(model):
        return *_in_work_folder(Path(model), checkpoint), None
    known = None if os.path.isfile(model) else find(model)
    if known is not None:
        if checkpoint is None:
            return str(known.config), known.fetch(), known
        return str(known.config), checkpoint, None
    config = str(find_config(model))
    if not config.endswith(('.py', '.json', '.yml', '.yaml')):
        raise ConfigError(
            f'{model} is neither a config nor the name of a model: the model comes '
            'first; for a checkpoint give its config, and the checkpoint beside it'
        )
    if checkpoint is None:
        raise ConfigError(
            f'{model} is a config: give a checkpoint as well, or the name of a trained '
            'model (`convnext-mm zoo --trained`)'
        )
    return config, checkpoint, None


def _best(folder: Path) -> Path | None:
    """The newest best checkpoint that can be read."""
    from convnext_mm.checkpoint import CheckpointError
    from convnext_mm.checkpoint.reader import read_checkpoint

    found = sorted(folder.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        with contextlib.suppress(CheckpointError):
            read_checkpoint(path)
            return path
    return None


def _config_of(folder: Path) -> Path:
    """That a run has left in its work folder."""
    # Of the newest start; a file beside the checkpoints may be anything.
    configs = sorted(folder.glob('*/vis_data/config.py'))
    configs = [path for path in configs if not _is_averaged(path)][-1:]
    configs = configs or list(folder.glob('*.py'))
    if len(configs) != 1:
        raise ConfigError(
            f'{folder} holds {len(configs) or "no"} configs (*.py): a work folder that '
            'training wrote has one; give a config and a checkpoint'
        )
    return configs[0]


def _is_averaged(path: Path) -> bool:
    """Whether `test --tta` left it, with another model and data around the run's."""
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    tta = cfg.get('tta_model')
    return tta is not None and cfg.model.type == tta.type


def _in_work_folder(folder: Path, checkpoint: str | None) -> tuple[str, str]:
    """The config of a run, and its best checkpoint or else the newest."""
    from convnext_mm.engine import work_folder

    config = _config_of(folder)
    if checkpoint is None:
        newest = _best(folder) or work_folder.newest_valid(folder)
        if newest is None:
            raise ConfigError(
                f'{folder} holds no checkpoint yet (best_*.pth, iter_*.pth, '
                'epoch_*.pth)'
            )
        checkpoint = str(newest)
    return str(config), checkpoint

"""What errors of imports mean."""

import re

OPERATORS_COMMAND = 'python -m convnext_mm.compat.mmcv_ops'
HEADLESS = '`pip install --force-reinstall --no-deps opencv-python-headless`'
# What errors of imports say, and what helps.
CAUSES = {
    r'mmcv(/|\.)_ext': f'mmcv has no operators: `{OPERATORS_COMMAND}`',
    r'lib(GL|EGL|gthread|X\w+|SM|ICE)\S*\.so': 'this machine has no display, and '
    f'OpenCV wants its libraries: {HEADLESS}',
    r'dtype size changed|_ARRAY_API|multiarray|numpy\.core|compiled using NumPy': (
        'it is compiled for another NumPy: `pip install --upgrade --force-reinstall '
        '--no-deps {name}`, or a NumPy that fits it (`pip install "numpy<2"`)'
    ),
    r'NoneType takes no arguments': 'mmpretrain does not import with transformers '
    '5: `pip install "transformers<5"`',
    r'is used but incompatible': 'install a version that it asks for',
    r"No module named '([\w.]+)": 'install what has the module {0}',
    r'SIGILL': 'this build uses instructions that the processor lacks: install '
    'another one of {name}',
}


def why(error: str, name: str) -> str:
    """What helps against an error of an import, where it is well known."""
    for pattern, advice in CAUSES.items():
        if match := re.search(pattern, error):
            return advice.format(*match.groups(), name=name)
    return ''

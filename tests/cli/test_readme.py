"""Every command of the README is run by a test, or by CI itself."""

import re

from repo import ROOT

CI = '.ci/run'
# What a line begins with, to where it is run.
RUN_BY = {
    'git clone': CI,  # CI has cloned it
    'make demo': 'tests/apis/test_training.py::test_demo_shows_and_judges',
    'make test': CI,
    'source .venv/bin/activate': 'docs/installation.md',
    'convnext-mm zoo --trained': 'tests/apis/test_zoo.py::test_command',
    'convnext-mm infer mask-rcnn_convnext-t': (
        'tests/apis/test_zoo.py::test_a_file_of_each_layout'
    ),
    'convnext-mm infer upernet_convnext-b': (
        'tests/apis/test_zoo.py::test_a_file_of_each_layout'
    ),
    'convnext-mm infer work_dirs/demo': (
        'tests/apis/test_inference.py::test_a_work_folder'
    ),
    'bash tools/dist_train.sh': 'tests/apis/test_training.py::test_dist_train_on_a_cpu',
    'bash tools/dist_test.sh': 'tests/apis/test_training.py::test_dist_train_on_a_cpu',
    'NNODES=2': 'tools/maintenance/inject_faults.py',
    'bash tools/slurm_train.sh': 'tests/tools/test_slurm.py::test_job_is_requeued',
    'convnext-mm train CONFIG': 'tests/apis/test_training.py::test_train_test_resume',
    'convnext-mm test cascade': 'tests/apis/test_published.py::test_by_name',
}


def test_every_command_is_run():
    readme = (ROOT / 'README.md').read_text()
    lines = [
        line.strip()
        for block in re.findall(r'```bash\n(.*?)```', readme, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) > 10
    for line in lines:
        assert any(line.startswith(start) for start in RUN_BY), f'nobody runs: {line}'
    for start, place in RUN_BY.items():
        assert any(line.startswith(start) for line in lines), (
            f'no longer there: {start}'
        )
        path, _, name = place.partition('::')
        assert (ROOT / path).is_file() and f'def {name}' * bool(name) in (
            ROOT / path
        ).read_text()

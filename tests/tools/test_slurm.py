"""tools/slurm_*.sh, against commands that write down how Slurm was called."""

import os
import subprocess

import pytest

from repo import ROOT

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
[ "$(basename "$0")" = sbatch ] && cat > "$JOB"
[ "$(basename "$0")" = srun ] && touch ${MARKER:-"$CALLS"} && exit "${STATUS:-0}"
exit 0
"""


@pytest.fixture
def slurm(tmp_path):
    for name in ('sbatch', 'srun', 'scontrol'):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)

    def call(*command, **env):
        done = subprocess.run(
            ['bash', *map(str, command)],
            env={
                **os.environ,
                'PATH': f'{tmp_path}:{os.environ["PATH"]}',
                'CALLS': str(tmp_path / 'calls'),
                'JOB': str(tmp_path / 'job'),
                'PYTHON': 'python3',
                **env,
            },
            capture_output=True,
            text=True,
        )
        calls = tmp_path / 'calls'
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done, lines

    call.job = tmp_path / 'job'
    return call


@pytest.mark.parametrize(
    'task, fourth, command',
    [
        ('train', 'work dirs/x', '--work-dir work\\ dirs/x'),
        ('test', 'iter 8.pth', 'c.py iter\\ 8.pth'),
    ],
)
def test_job_is_requeued(task, fourth, command, slurm):
    script = ROOT / f'tools/slurm_{task}.sh'
    done, (line,) = slurm(script, 'gpu', 'name', 'c.py', fourth, '--x', GPUS='16')
    assert done.returncode == 0, done.stderr
    for part in ('sbatch --partition=gpu --job-name=name', '--gres=gpu:8'):
        assert part in line
    assert '--ntasks=16 --ntasks-per-node=8' in line
    assert '--requeue' in line and '--signal=USR1@120' in line
    job = slurm.job.read_text()
    assert command in job and job.count('--launcher slurm --x') == 1

    for status, expected in (('0', 0), ('1', 1), ('75', 75)):
        done, lines = slurm(slurm.job, STATUS=status, SLURM_JOB_ID='7')
        assert done.returncode == expected
        assert ('scontrol requeue 7' in lines) is (status == '75')


def test_the_process_that_saved_is_believed(slurm, tmp_path):
    """Slurm tells the highest status of all, as of one that it killed."""
    slurm(
        ROOT / 'tools/slurm_train.sh', 'gpu', 'name', 'c.py', tmp_path / 'w', GPUS='2'
    )
    marker = tmp_path / 'w' / 'interrupted'
    marker.parent.mkdir()
    for interrupted in (False, True):
        marker.touch()  # of an earlier job
        env = dict(MARKER=str(marker)) if interrupted else {}
        _, lines = slurm(slurm.job, STATUS='143', SLURM_JOB_ID='7', **env)
        assert ('scontrol requeue 7' in lines) is interrupted


def test_foreground(slurm):
    script = ROOT / 'tools/slurm_train.sh'
    done, (line,) = slurm(
        *(script, 'gpu', 'name', 'c.py', 'w'),
        **dict(FOREGROUND='1', GPUS='4', SRUN_ARGS='--qos=high', STATUS='75'),
    )
    assert done.returncode == 75
    assert line.startswith('srun --partition=gpu')
    assert '--ntasks-per-node=4' in line and '--qos=high' in line


@pytest.mark.parametrize(
    'arguments, env, message',
    [
        (('gpu', 'name', 'c.py'), {}, 'usage:'),
        (('gpu', 'name', 'c.py', 'w'), dict(GPUS='x'), 'GPUS is a whole number'),
        (
            ('gpu', 'name', 'c.py', 'w'),
            dict(GPUS='12', GPUS_PER_NODE='8'),
            'GPUS=12 is no multiple of GPUS_PER_NODE=8',
        ),
    ],
)
def test_mistakes(arguments, env, message, slurm):
    done, lines = slurm(ROOT / 'tools/slurm_train.sh', *arguments, **env)
    assert done.returncode == 2 and lines == []
    assert message in done.stderr

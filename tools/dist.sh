#!/usr/bin/env bash
# Shared by dist_train.sh and dist_test.sh: one process per GPU (or, without
# one, per requested process on the CPU), see convnext_mm/engine/launcher.py.
set -euo pipefail
tools=$(dirname "$0")
task=$1
shift
case $task in
    train) positional=1 usage='CONFIG [GPUS] [arguments of tools/train.py]' ;;
    test) positional=2 usage='CONFIG CHECKPOINT [GPUS] [arguments of tools/test.py]' ;;
esac
if [ $# -lt "$positional" ]; then
    echo "usage: bash tools/dist_$task.sh $usage" >&2
    exit 2
fi
paths=("${@:1:positional}")
shift "$positional"
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    GPUS=$1
    shift
fi
if [ -z "${GPUS:-}" ]; then
    echo "tools/dist_$task.sh: say how many processes: $usage" >&2
    exit 2
fi
# The project's own environment, unless another one is active or asked for.
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
        PYTHON="$tools/../.venv/bin/python"
    fi
fi
export GPUS
PYTHONPATH="$tools/..:${PYTHONPATH:-}" exec "$PYTHON" -m convnext_mm.engine.launcher \
    "$tools/$task.py" "${paths[@]}" --launcher pytorch "$@"

#!/usr/bin/env bash
# Trains Mask R-CNN tiny on coco_tiny and UPerNet tiny on camvid from scratch in
# mixed precision, each with this package's backbone and with mmpretrain's, and
# writes training.json and training.png to OUT. On one GPU, in under 9 minutes.
#
#     bash tools/maintenance/gpu_train.sh OUT [--wheels DIR] [--data DIR] [--smoke]
#                             [--only detector|segmentor] [more of gpu_train.py]
#
# --wheels: folder of packages to install first, see tools/maintenance/pack_wheels.sh.
# --smoke: a few steps on a CPU.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=gpu_env.sh
. "$tools/gpu_env.sh"
wheels='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
python=$(gpu_python "$wheels")
# Results are written after each run, so an end by the clock loses one at most.
exec timeout 520 "$python" -W ignore "$tools/gpu_train.py" "${arguments[@]}"

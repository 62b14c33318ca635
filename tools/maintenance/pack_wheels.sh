#!/usr/bin/env bash
# Fills a folder with the wheels that tools/maintenance/gpu_env.sh installs on a machine
# that has PyTorch and no package index: OpenMMLab's packages and what they
# import beside PyTorch and its usual company, in the versions of
# requirements/common.txt.
#
#     bash tools/maintenance/pack_wheels.sh [FOLDER] [PYTHON_VERSION]
#
# FOLDER is wheels/ by default, PYTHON_VERSION that of the machine that the
# wheels are for, 3.12. mmcv comes without compiled operators; gpu_env.sh gives it
# those on torchvision.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$root/wheels}
version=${2:-3.12}
python=${PYTHON:-$root/.venv/bin/python}
pins=$root/requirements/common.txt

pin() {  # NAME...: NAME==VERSION of each, from the constraints
    local name
    for name in "$@"; do
        sed -n "s/^\($name==[^ ;]*\).*/\1/p" "$pins" | grep . || {
            echo "pack_wheels.sh: $name is not in $pins: add it there" >&2
            return 1
        }
    done
}

# Pure Python, and where the index has only the source, built here.
pure=$(pin onedl-mmengine onedl-mmdetection onedl-mmsegmentation \
    onedl-mmpretrain addict ftfy huggingface_hub importlib_metadata mat4py \
    markdown-it-py mdurl model-index modelindex ordered-set platformdirs \
    prettytable Pygments rich termcolor \
    terminaltables transformers yapf)
# Compiled: for the other machine's Python.
compiled=$(pin pycocotools shapely tokenizers wcwidth)
platforms=()
for glibc in 17 24 26 27 28 31; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
mkdir -p "$folder"
# shellcheck disable=SC2086  # names without spaces
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$folder" $pure
# In pip's isolation there is no PyTorch, and so nothing of mmcv is compiled; the
# cache may hold a wheel that was.
# shellcheck disable=SC2046
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
    --no-cache-dir --no-binary onedl-mmcv --wheel-dir "$folder" $(pin onedl-mmcv)
# shellcheck disable=SC2086
"$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --implementation cp --python-version "$version" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" \
    $compiled
echo "$folder holds $(find "$folder" -name '*.whl' | wc -l) wheels"

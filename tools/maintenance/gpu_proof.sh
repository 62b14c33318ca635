#!/usr/bin/env bash
# Checks the kernels and measures everything on a GPU machine, in less than 10
# minutes, with nothing but this checkout, a Python with PyTorch, and a folder of
# wheels (tools/maintenance/pack_wheels.sh) where that Python lacks OpenMMLab's packages.
#
#     bash tools/maintenance/gpu_proof.sh OUT [--tune] [--wheels DIR] [--smoke]
#                             [more of gpu_proof.py]
#
# DIR is wheels/ by default, '' means none. PYTHON names the interpreter (python3).
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=gpu_env.sh
. "$tools/gpu_env.sh"
wheels=$GPU_ENV_ROOT/wheels arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels)
            wheels=${2-missing}
            shift
            [ -z "$wheels" ] || [ -d "$wheels" ] || {
                echo "gpu_proof.sh: --wheels '$wheels' is no folder; give" \
                    "one, or '' for none" >&2
                exit 2
            } ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
python=$(gpu_python "$wheels")
limit=$((560 - SECONDS))
exec "$python" "$tools/gpu_proof.py" --limit "$limit" "${arguments[@]}"

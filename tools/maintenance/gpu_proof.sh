#!/usr/bin/env bash
# Checks the kernels and measures everything on a GPU machine, in less than 9
# minutes, with nothing but this checkout, a Python with PyTorch, and a folder of
# wheels (tools/maintenance/pack_wheels.sh) where that Python lacks OpenMMLab's packages.
#
#     bash tools/maintenance/gpu_proof.sh OUT [--wheels DIR] [--smoke]
#
# OUT gets kernels.json, one json file for each run of tools/benchmark.py,
# plot.png, log.txt, and summary.json: the exit code and seconds of each part. A
# part that hangs is ended (exit code 124) and the others go on; the script ends
# with status 1 where one failed. --smoke does everything in small on a CPU,
# which shows that it runs and measures nothing. DIR is wheels/ by default, ''
# means none. PYTHON names the interpreter (python3).
set -uo pipefail
SECONDS=0
LIMIT=510  # seconds for all parts together
PLOT_LIMIT=20  # and after them for the plot
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tools/maintenance/gpu_env.sh
source "$root/tools/maintenance/gpu_env.sh"
usage='usage: bash tools/maintenance/gpu_proof.sh OUT [--wheels DIR] [--smoke]'
out='' wheels=$root/wheels smoke=''
while [ $# -gt 0 ]; do
    case $1 in
        --smoke) smoke=--smoke ;;
        --wheels)
            wheels=${2-missing}
            shift
            [ -z "$wheels" ] || [ -d "$wheels" ] || {
                echo "gpu_proof.sh: --wheels '$wheels' is no folder; give" \
                    "one, or '' for none" >&2
                exit 2
            } ;;
        -*)
            echo "gpu_proof.sh: unknown option '$1'; $usage" >&2
            exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
if [ -z "$out" ]; then
    echo "$usage" >&2
    exit 2
fi
[ -z "$wheels" ] || [ ! -d "$wheels" ] || wheels=$(cd "$wheels" && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
: > "$out/parts.tsv"

# part NAME SECONDS COMMAND...: runs a command under a time limit and notes how
# it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS left=$((LIMIT - SECONDS)) code
    shift 2
    echo "=== $name ($start s)"
    if [ "$left" -lt 5 ]; then
        note "$name" 124 0 'no time was left'
        return
    fi
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@"
    code=$?
    note "$name" "$code" $((SECONDS - start)) ''
}

# note NAME EXIT_CODE SECONDS REASON: one more part of summary.json. An empty
# EXIT_CODE is a part that was left out.
note() {
    printf '%s\t%s\t%s\t%s\n' "$@" >> "$out/parts.tsv"
    [ -z "$4" ] || echo "$1: $4"
    "${python:-${PYTHON:-python3}}" - "$out" <<'END'
import csv, json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {}
for name, code, seconds, reason in csv.reader(
        (out / 'parts.tsv').open(), delimiter='\t', quoting=csv.QUOTE_NONE):
    parts[name] = dict(exit_code=int(code) if code else None,
                       seconds=int(seconds))
    if reason:
        parts[name]['reason'] = reason
(out / 'summary.json').write_text(json.dumps(parts, indent=1) + '\n')
END
}

# bench NAME SECONDS ARGUMENTS...: a run of the benchmark.
bench() {
    part "$1" "$2" "$python" tools/benchmark.py "${common[@]}" "${@:3}" \
        --out "$out/$1.json"
}

# backbone ARCH: what is measured of a backbone, and of a compiled one.
backbone() {
    bench "backbone_$1" 80 --arch "$1" --size $full \
        --mode train infer memory --dtype $dtypes
    bench "backbone_$1_crop" 30 --arch "$1" --size $crop --mode train \
        --dtype amp
}

backbone_compiled() {
    bench "backbone_$1_compiled" 70 --arch "$1" "${compile_case[@]}" \
        --networks $compiled --compile $compiled
}

# Code for the compiled networks is generated while the kernels are checked,
# which times nothing, and found in the cache when they are timed.
warm_compile_cache() {
    local arch network
    for arch in "${archs[@]}"; do
        for network in $compiled; do
            "$python" tools/benchmark.py "${common[@]}" "${compile_case[@]}" \
                --arch "$arch" --networks "$network" --compile "$network" \
                --rounds 2 --warmup 0 --out /dev/null &
            warming+=($!)
        done
    done
}

main() {
    local python warming=()
    if ! python=$(gpu_python "$wheels"); then
        note environment 1 $SECONDS 'no usable Python: see log.txt'
        return
    fi
    note environment 0 $SECONDS ''
    local compiled='mmpretrain timm torchvision transformers lean triton'
    local common=(--device cuda --batch 2 --rounds 15)
    local archs=(tiny base) full='800 1344' crop='512 512'
    local dtypes='amp bf16 amp-fp16' model_dtype=amp fit='--fit-gib 24 80'
    local detector='' segmentor='' backend=inductor
    if [ -n "$smoke" ]; then
        common=(--device cpu --batch 2 --rounds 2 --warmup 0)
        archs=(atto) full='64 96' crop='64 64'
        dtypes=amp model_dtype=fp32 fit=''
        detector='--batch 1 --size 64 64' segmentor='--size 64 64'
        compiled=timm backend=aot_eager
    fi
    local compile_case=(--mode train --dtype amp --size $full
        --compile-backend "$backend")

    [ -n "$smoke" ] || warm_compile_cache > "$out/warming.txt" 2>&1
    part kernels 100 "$python" tools/maintenance/check_kernels.py $smoke "$out"
    if [ ${#warming[@]} -gt 0 ]; then
        timeout 40 bash -c 'for p; do tail --pid="$p" -f /dev/null; done' _ \
            "${warming[@]}"
        kill "${warming[@]}" 2> /dev/null
        wait "${warming[@]}" 2> /dev/null
    fi

    backbone "${archs[0]}"
    local reason
    if reason=$("$python" -c 'import sys
sys.path.insert(0, "tools")
from setup_env import CHECK_MMCV
exec(CHECK_MMCV)
import mmdet.models, mmseg.models' 2>&1); then
        bench detector 80 --mode detector --dtype $model_dtype $fit \
            --arch "${archs[0]}" $detector
        bench segmentor 60 --mode segmentor --dtype $model_dtype $fit \
            --arch "${archs[0]}" $segmentor
    else
        note detector '' 0 "left out: $(tail -n 1 <<< "$reason")"
        note segmentor '' 0 "left out: $(tail -n 1 <<< "$reason")"
    fi
    # The later, the more likely it is that no time is left.
    local arch
    backbone_compiled "${archs[0]}"
    for arch in "${archs[@]:1}"; do
        backbone "$arch"
        backbone_compiled "$arch"
    done
    local name results=()
    for name in backbone_{tiny,base,atto}{,_crop,_compiled} detector \
        segmentor; do
        [ ! -e "$out/$name.json" ] || results+=("$out/$name.json")
    done
    LIMIT=$((LIMIT + PLOT_LIMIT))
    part plot "$PLOT_LIMIT" "$python" tools/benchmark.py --plot "${results[@]}" \
        --out "$out/plot.png"
}

main 2>&1 | tee "$out/log.txt"
awk -F '\t' '$2 != "" && $2 != 0 { print "failed: " $1 " (exit code " $2 ")"
                                   failed = 1 }
             END { exit failed }' "$out/parts.tsv"
failed=$?
rm "$out/parts.tsv"
exit $failed

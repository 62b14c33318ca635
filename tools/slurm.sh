#!/usr/bin/env bash
# Shared by slurm_train.sh and slurm_test.sh: a batch job that Slurm puts back into
# its queue when the machine is wanted or the time is up (status 75), and that goes
# on from its last checkpoint. FOREGROUND=1: srun in this terminal instead.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
task=$1
shift
case $task in
    train) named=4 usage='PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]' ;;
    test) named=4 usage='PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]' ;;
esac
if [ $# -lt "$named" ]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] bash tools/slurm_$task.sh $usage" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 fourth=$4
shift 4
GPUS=${GPUS:-8}
for name in GPUS GPUS_PER_NODE CPUS_PER_TASK; do
    value=${!name:-1}
    if ! [[ $value =~ ^[1-9][0-9]*$ ]]; then
        echo "tools/slurm_$task.sh: $name is a whole number from 1 on, got '$value'" >&2
        exit 2
    fi
done
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
if [ $((GPUS % GPUS_PER_NODE)) -ne 0 ]; then
    echo "tools/slurm_$task.sh: GPUS=$GPUS is no multiple of GPUS_PER_NODE=$GPUS_PER_NODE" >&2
    exit 2
fi
PYTHON=${PYTHON:-python}
if [ "$PYTHON" = python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
    PYTHON="$tools/../.venv/bin/python"
fi
resources=(
    --partition="$partition" --job-name="$job" --gres="gpu:$GPUS_PER_NODE"
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE"
    --cpus-per-task="${CPUS_PER_TASK:-5}"
)
if [ "$task" = train ]; then
    command=("$PYTHON" -u "$tools/train.py" "$config" --work-dir "$fourth")
    marker=$fourth/interrupted
else
    command=("$PYTHON" -u "$tools/test.py" "$config" "$fourth")
    marker=/nonexistent  # a test begins anew
fi
command+=(--launcher slurm "$@")
export PYTHONPATH="$tools/..:${PYTHONPATH:-}"
if [ -n "${FOREGROUND:-}" ]; then
    # shellcheck disable=SC2086
    exec srun "${resources[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${command[@]}"
fi
# The signal comes two minutes before the time is up, to the processes alone.
# shellcheck disable=SC2086
sbatch "${resources[@]}" --requeue --open-mode=append --signal=USR1@120 \
    --output="%x-%j.log" ${SRUN_ARGS:-} <<JOB
#!/usr/bin/env bash
rm -f $(printf '%q' "$marker")
srun --kill-on-bad-exit=1$(printf ' %q' "${command[@]}")
status=\$?
# Of several processes Slurm tells the highest status, not that of the one that saved.
if [ \$status -eq 75 ] || [ -e $(printf '%q' "$marker") ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
JOB

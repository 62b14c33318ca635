#!/usr/bin/env bash
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT [GPUS] [arguments of tools/test.py]
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 PORT=29500 ... on each.
exec bash "$(dirname "$0")/dist.sh" test "$@"

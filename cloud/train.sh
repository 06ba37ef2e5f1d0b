#!/usr/bin/env bash
# Starts this machine's ranks of a run: on a single machine, under SkyPilot or under Slurm.
#   cloud/train.sh RUN DATASETS_DIR [options of ddp_train.py]
# Reads PROCESSES_PER_NODE (default: one per GPU), MASTER_ADDR and MASTER_PORT.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

nodes=${SKYPILOT_NUM_NODES:-${SLURM_NNODES:-1}}
if [ "$nodes" -eq 1 ]; then
  exec torchrun --standalone --nproc_per_node="${PROCESSES_PER_NODE:-gpu}" --max-restarts=3 ddp_train.py "$@"
fi
# Node ranks are fixed, so that after a restart the machine with the run's folder is rank 0 again.
first_ip=${SKYPILOT_NODE_IPS:-}
exec torchrun --nnodes="$nodes" --node-rank="${SKYPILOT_NODE_RANK:-${SLURM_NODEID:-0}}" \
  --master-addr="${MASTER_ADDR:-${first_ip%%$'\n'*}}" --master-port="${MASTER_PORT:-29500}" \
  --nproc_per_node="${PROCESSES_PER_NODE:-gpu}" ddp_train.py "$@"

#!/usr/bin/env bash
# As train.sh, on a machine that may be taken away: the run's folder is copied to KEPT_DIR (a mounted bucket) every few
# minutes and at the end, and taken from there at the start.
#   cloud/train_and_keep.sh KEPT_DIR RUN DATASETS_DIR [options of ddp_train.py]
# Started through bash, here and by SkyPilot: files that come by way of a bucket lose their executable bit.
# A copy that was cut off does no harm: a checkpoint is verified before it is resumed from.
set -euo pipefail
cd "$(dirname "$0")/.."
kept=$1/$2
run=${RUNS_DIR:-runs}/$2
shift
every=${KEEP_SECONDS:-300}

if [ "${SKYPILOT_NODE_RANK:-0}" -ne 0 ]; then # only rank 0's machine has the run's folder
  exec bash cloud/train.sh "$@"
fi

keep() {
  # A bucket has no links and its own clock; a resumed run makes the links anew. Pruned checkpoints go there too, but
  # only when the new ones are whole: this machine may be gone at any moment.
  rsync --recursive --update --inplace --delete-after --exclude='.lock' --exclude='.tmp-*' --exclude='.*.tmp' \
    "$run/" "$kept/" || echo "warning: $run could not be copied to $kept" >&2
}

if [ -d "$kept" ]; then # the configuration that was sent along is the newer one
  rsync --recursive --exclude=/model.json --exclude=/train.json "$kept/" "$run/"
fi
mkdir -p "$kept"
bash cloud/train.sh "$@" --runs-dir "${RUNS_DIR:-runs}" &
trainer=$!
trap 'kill -TERM $trainer' TERM INT
copied=$SECONDS
while kill -0 $trainer 2>/dev/null; do
  sleep 1 || true
  if [ $((SECONDS - copied)) -ge "$every" ]; then
    keep
    copied=$SECONDS
  fi
done
status=0
wait $trainer || status=$?
keep
exit $status

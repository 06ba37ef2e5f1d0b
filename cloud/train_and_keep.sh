#!/usr/bin/env bash
# Runs train.sh on a machine that may be reclaimed: copies the run's folder from KEPT_DIR (a mounted bucket) at the start,
# and back every few minutes and at the end.
#   cloud/train_and_keep.sh KEPT_DIR RUN DATASETS_DIR [options of ddp_train.py]
# Scripts are started through bash, because files uploaded through a bucket lose their executable bit.
# An incomplete copy does no harm: checkpoints are verified before a run resumes from them.
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
  # A bucket has no symbolic links, which a resumed run makes again, and its own clock. Pruned checkpoints are deleted
  # from it only after the new ones are complete, because this machine may be reclaimed at any moment.
  rsync --recursive --update --inplace --delete-after --exclude='.lock' --exclude='.tmp-*' --exclude='.*.tmp' \
    "$run/" "$kept/" || echo "warning: $run could not be copied to $kept" >&2
}

if [ -d "$kept" ]; then # keep the uploaded configuration, which is newer
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

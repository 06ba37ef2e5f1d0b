"""Two launchers, as on two machines: each with its own address, run folder and copy of the dataset."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.engine import resume
from harness.run.errors import CheckpointError
from tests.helpers import OFFLINE, ROOT, final_bits, status, train_in_fork, write_run

TRAIN = {"microbatch_size": 2, "gradient_accumulation_steps": 2, "min_train_tokens": 12 * 8 * 16}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_node(number: int, port: int, base: Path) -> subprocess.Popen[str]:
    """Start the launcher of one node; 127.0.0.1 and 127.0.0.2 are the two machines."""
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}", "--nproc_per_node=1"),
        *("--master-addr=127.0.0.1", f"--master-port={port}", f"--local-addr=127.0.0.{number + 1}"),
        *("ddp_train.py", "tiny", str(base / "datasets"), "--runs-dir", str(base / "runs"), "--device", "cpu"),
    ]
    environment = {**os.environ, **OFFLINE, "GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def train_on_two_nodes(bases: list[Path]) -> list[str]:
    """Train `runs/tiny` under two base folders, one a node in rank order; give what the nodes wrote."""
    port = free_port()
    nodes = [start_node(number, port, base) for number, base in enumerate(bases)]
    return ["".join(node.communicate(timeout=600)) for node in nodes]


@pytest.fixture
def bases(tmp_path: Path, datasets_dir: Path) -> list[Path]:
    """Two machines' disks."""
    found = [tmp_path / "first", tmp_path / "second"]
    for base in found:
        write_run(base / "runs" / "tiny", {}, TRAIN)
        shutil.copytree(datasets_dir, base / "datasets")
    return found


def test_two_nodes_train_as_one_and_only_the_first_writes(
    bases: list[Path], make_run: Callable[..., Path], datasets_dir: Path
) -> None:
    outputs = train_on_two_nodes(bases)
    first, second = (base / "runs" / "tiny" for base in bases)
    assert status(first)["state"] == "complete", outputs
    assert sorted(path.name for path in second.iterdir()) == ["model.json", "train.json"]
    on_one_machine = make_run(train=TRAIN)
    train_in_fork(on_one_machine, datasets_dir, count=2)
    assert final_bits(first) == final_bits(on_one_machine)


@pytest.mark.slow
def test_machines_that_change_places_do_not_start_over(bases: list[Path]) -> None:
    train_on_two_nodes(bases)
    outputs = train_on_two_nodes(bases[::-1])
    second = bases[1] / "runs" / "tiny"
    assert "rank 1's machine has a checkpoint of step 11, rank 0's has no checkpoint" in outputs[0]
    assert status(second)["exit_code"] == 4
    assert not (second / "checkpoints").exists()


def test_a_machine_that_is_ahead_of_rank_0_is_named() -> None:
    resume.require_newest_on_rank0([617, 617, -1])
    with pytest.raises(
        CheckpointError, match="rank 2's machine has a checkpoint of step 617, rank 0's has none after"
    ):
        resume.require_newest_on_rank0([0, 0, 617])
    with pytest.raises(CheckpointError, match="rank 1's machine has a checkpoint of step 0, rank 0's has no check"):
        resume.require_newest_on_rank0([-1, 0])

"""Memory stays flat however long a token file is."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

READ_EVERYWHERE = """
import resource, sys
from pathlib import Path
from data import open_split, train_data
from harness.run.config import TrainConfig
from harness.run.plan import Plan

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

file = open_split(Path(sys.argv[1]), "big", "train")
train = TrainConfig(dataset="big", min_train_tokens=-1, start_train_token=0, start_val_token=0,
                    microbatch_size=2, checkpoint_interval=1, shuffle=sys.argv[2] == "shuffle")
plan = Plan(world_size=1, microbatch_size=2, accumulation_steps=1, context_length=2**18,
            global_steps=(file.length - 1) // 2**19)
source = train_data([file], train, plan)
for warm in range(3):
    source.microbatch(warm, 0, 0)
before = peak_mib()
read = 0
for step in range(3, plan.global_steps, plan.global_steps // 64):  # 1 MiB each, all over the file
    read += source.microbatch(step, 0, 0)[0].numel() * 2
print(file.length, read, peak_mib() - before)
"""


@pytest.mark.parametrize("order", ["in order", "shuffle"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, order: str) -> None:
    count = 2**31  # 4 GiB of zeros, which take no room on disk
    header = json.dumps({"tokens": {"dtype": "U16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "big" / "train.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * count)
    done = subprocess.run(
        [sys.executable, "-c", READ_EVERYWHERE, str(tmp_path), order],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    length, read, growth_mib = done.stdout.split()
    assert int(length) == count
    assert int(read) > 60 * 2**20
    assert float(growth_mib) < 50

"""What does reading data cost? Micro-batches from a sparse file of 20 GB, by 1 and 4 processes.

  python -m benchmarks.data_path

Every process reads micro-batches of 12 x 1024 tokens from all over its share of the file, as training does, and
reports the time of each and how its memory grew. The file has holes in place of data, so nothing waits for a disk;
what is measured is mapping, slicing and converting. Results go to benchmarks/results/data_path.md and .json.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from data import SequenceFile, TrainData
from harness.run.files import write_json
from harness.run.plan import Plan
from harness.tokens.mixture import Mixture
from harness.tokens.token_files import open_split

RESULTS = Path(__file__).parent / "results"
FILE_TOKENS = 10**10
LENGTH, SIZE = 1024, 12
MEBIBYTE = 2**20
CASES = (
    ("in order, read for the first time", False, 1),
    ("in order", False, 1),
    ("in order", False, 4),
    ("shuffled", True, 1),
    ("shuffled", True, 4),
)


@dataclass(frozen=True)
class Reading:
    """What one process measured."""

    milliseconds: float
    """Median for a micro-batch."""
    slowest_milliseconds: float
    growth_mib: float
    """How much more memory the process held at its end than after its first hundred micro-batches."""


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=3000)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_sparse(Path(place) / "sparse")
        for order, shuffled, processes in CASES:
            rows.append((order, processes, measure(Path(place), processes, shuffled, arguments.microbatches)))
    lines = [
        "| order | processes | ms per micro-batch | slowest | memory grew by |",
        "|---|---:|---:|---:|---:|",
    ]
    for order, processes, readings in rows:
        lines.append(
            f"| {order} | {processes} | "
            f"{median(reading.milliseconds for reading in readings):.2f} | "
            f"{max(reading.slowest_milliseconds for reading in readings):.1f} | "
            f"{max(reading.growth_mib for reading in readings):.1f} MiB |"
        )
    text = f"{FILE_TOKENS * 2 / 1e9:.0f} GB file, micro-batches of {SIZE} x {LENGTH} tokens\n\n" + "\n".join(lines)
    print(text)
    (RESULTS / "data_path.md").write_text(text + "\n")
    document = [
        {"order": order, "processes": processes, "readings": [asdict(reading) for reading in readings]}
        for order, processes, readings in rows
    ]
    write_json(RESULTS / "data_path.json", {"torch": torch.__version__, "rows": document})


def write_sparse(folder: Path) -> None:
    """Write a token file of holes: its header, and its last byte."""
    folder.mkdir()
    header = json.dumps({"tokens": {"dtype": "U16", "shape": [FILE_TOKENS], "data_offsets": [0, 2 * FILE_TOKENS]}})
    raw = header.encode().ljust((len(header) + 7) // 8 * 8)
    with (folder / "train.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 2 * FILE_TOKENS)


def measure(datasets_dir: Path, processes: int, shuffled: bool, microbatches: int) -> list[Reading]:
    """Let processes read at the same time, as the ranks of a machine do."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.starmap(
            read, [(datasets_dir, rank, processes, shuffled, microbatches) for rank in range(processes)]
        )


def read(datasets_dir: Path, rank: int, processes: int, shuffled: bool, microbatches: int) -> Reading:
    """Read one rank's micro-batches and time them."""
    file = open_split(datasets_dir, "sparse", "train")
    steps = (FILE_TOKENS - 1) // (SIZE * LENGTH * processes)
    plan = Plan(processes, SIZE, 1, LENGTH, steps)
    part = SequenceFile(file, 0, LENGTH, (FILE_TOKENS - 1) // LENGTH, 1 if shuffled else None)
    train = TrainData((part,), Mixture.of([1]), plan)
    seconds = []
    before = 0.0
    for number in range(microbatches):
        if number == 100:
            before = resident_mib()
        began = time.perf_counter()
        train.microbatch(number * (steps // microbatches), 0, rank)
        seconds.append(time.perf_counter() - began)
    return Reading(1000 * median(seconds), 1000 * max(seconds[1:]), resident_mib() - before)


def resident_mib() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE


if __name__ == "__main__":
    main()

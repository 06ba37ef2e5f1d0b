"""How fast is preparing a dataset, next to the loop that one would write without it?

  python -m benchmarks.prepare_dataset --copies 12

The corpus is Python's own `pydoc` topics, English prose, so many times over as a .jsonl file. Three ways take turns
on it, round after round, so that what else the machine does hits all alike: a plain tiktoken loop in one process, and
prepare_dataset.py with one worker and with all. Time is from start to end of each process, imports included. The
median of the rounds and their ratio go to benchmarks/results/prepare_dataset.json. Seconds of CPU go there too: they
tell what the work costs where the machine is busy with other things.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data import topics

from harness.run.files import ROOT, utc_now, write_json
from harness.tokens.token_files import SPLITS, open_split

RESULTS = Path(__file__).parent / "results" / "prepare_dataset.json"

PLAIN_LOOP = """
import json, sys
import numpy as np
from safetensors.numpy import save_file
from harness.tokens.gpt2 import END_OF_TEXT_ID, gpt2_encoding

encoding, tokens = gpt2_encoding(), []
for line in open(sys.argv[1], encoding="utf-8"):
    tokens += encoding.encode_ordinary(json.loads(line)["text"])
    tokens.append(END_OF_TEXT_ID)
save_file({"tokens": np.array(tokens, dtype=np.uint16)}, sys.argv[2])
"""


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--copies", type=int, default=12, help="of the topics in the corpus, 0.8 MB each (default 12)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments.copies, arguments.rounds)
    print(json.dumps(result, indent=2))
    write_json(RESULTS, result)


def measure(folder: Path, copies: int, rounds: int) -> dict[str, object]:
    """Return tokens per second of each way, and what they were measured on."""
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for number in range(copies):
            for topic, text in sorted(topics.topics.items()):
                file.write(json.dumps({"text": f"{topic} {number}\n{text}"}) + "\n")
    command = [sys.executable, "prepare_dataset.py", str(corpus), str(folder / "out"), "--workers"]
    cores = os.cpu_count() or 1
    ways = {
        "plain loop": [sys.executable, "-c", PLAIN_LOOP, str(corpus), str(folder / "plain.safetensors")],
        "1 worker": [*command, "1"],
        f"{cores} workers": [*command, str(cores)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        for name, words in ways.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            start, cpu_start = time.perf_counter(), cpu_of_children()
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(round(time.perf_counter() - start, 2))
            cpu_seconds[name].append(round(cpu_of_children() - cpu_start, 2))
    tokens = sum(open_split(folder, "out", split).length for split in SPLITS)
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    return {
        "time": utc_now(),
        "corpus_bytes": corpus.stat().st_size,
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "ratio_to_plain_loop": {name: round(speed / speeds["plain loop"], 2) for name, speed in speeds.items()},
        "load_before": load,
        "cores": cores,
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("tiktoken", "numpy")} | {"python": platform.python_version()},
    }


def cpu_of_children() -> float:
    """Return the seconds of CPU that all finished child processes took."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()

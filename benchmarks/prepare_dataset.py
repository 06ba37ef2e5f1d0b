"""How fast is preparing a dataset, next to the loop that one would write without it?

  python -m benchmarks.prepare_dataset --copies 12

The corpus is Python's own `pydoc` topics, English prose, so many times over as a .jsonl file. All ways take turns on
it, round after round, so that what else the machine does hits all alike: a plain tiktoken loop in one process, and
prepare_dataset.py with one worker, with all, and with each kind of tokenizer. Time is from start to end of each
process, imports included. The median of the rounds, their ratio and the largest resident memory go to
benchmarks/results/prepare_dataset.json. Seconds of CPU go there too: they tell what the work costs where the machine
is busy with other things.
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
        **{name: [*command, str(cores), "--tokenizer", name] for name in ("bytes", "train:4096")},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    tokens: dict[str, int] = {}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        for name, words in ways.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            start = time.perf_counter()
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{name}: failed")
            seconds[name].append(round(time.perf_counter() - start, 2))
            cpu_seconds[name].append(round(usage.ru_utime + usage.ru_stime, 2))
            memory[name] = max(memory.get(name, 0.0), round(usage.ru_maxrss / 1024, 1))  # of KiB on Linux
            if (folder / "out").exists():
                tokens[name] = sum(open_split(folder, "out", split).length for split in SPLITS)
    speeds = {name: corpus.stat().st_size / statistics.median(times) / 1e6 for name, times in seconds.items()}
    return {
        "time": utc_now(),
        "corpus_bytes": corpus.stat().st_size,
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes_per_second": {name: round(speed, 2) for name, speed in speeds.items()},
        "ratio_to_plain_loop": {name: round(speed / speeds["plain loop"], 2) for name, speed in speeds.items()},
        "peak_resident_mib": memory,
        "load_before": load,
        "cores": cores,
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("tiktoken", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    main()

"""A 20-step loss curve that guards against changes of the numerics that nobody meant.

Recorded with `python -m tests.test_golden`. Equal to the bit on the torch and the vector instructions of the record,
and to rounding elsewhere. An entry of the changelog says whether the numerics changed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch

import ddp_train
from harness.observers.charts import ChartPainter
from tests.helpers import metrics, write_run, write_toy_dataset

RECORD = Path(__file__).parent / "golden" / "tiny-20-steps.json"
RECIPE = {"clipping_max_norm": 0.8, "schedule_learning_rate": True, "warmup_period_percent": 10, "weight_decay": 0.05}


def platform() -> dict[str, str]:
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}


def curve(folder: Path, datasets_dir: Path) -> list[list[float]]:
    """Train on one thread and give loss and gradient norm of every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["ddp_train.py", folder.name, str(datasets_dir), "--runs-dir", str(folder.parent), "--device", "cpu"]
    try:
        with patch.object(sys, "argv", arguments), patch.object(ChartPainter, "_start"):
            ddp_train.main()
    finally:
        torch.set_num_threads(threads)
    return [[line["train/loss"], line["train/grad_norm"]] for line in metrics(folder)]


def test_the_loss_curve_is_the_recorded_one(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    record = json.loads(RECORD.read_text())
    found = curve(make_run("golden", train=RECIPE), datasets_dir)
    if record["platform"] == platform():
        assert found == record["curve"]
    else:
        np.testing.assert_allclose(found, record["curve"], rtol=1e-4)


def test_the_record_would_notice_a_change(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    record = json.loads(RECORD.read_text())
    found = curve(make_run("other", train={**RECIPE, "weight_decay": 0.06}), datasets_dir)
    assert not np.allclose(found, record["curve"], rtol=1e-4)


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        write_toy_dataset(Path(name))
        found = curve(write_run(Path(name) / "runs" / "golden", {}, RECIPE), Path(name))
    RECORD.write_text(json.dumps({"platform": platform(), "curve": found}, indent=1) + "\n")

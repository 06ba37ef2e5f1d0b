"""run.json: a run's configuration with defaults, its plan and data, and a record of every start."""

import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.run.config import ModelConfig, TrainConfig
from harness.run.files import ROOT, read_json, utc_now, write_json
from harness.run.plan import Plan
from harness.run.recipe import recipe_hash

PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "tokenizers", "huggingface_hub", "pydantic")


@dataclass(frozen=True)
class StartRecord:
    """One start of a run."""

    from_step: int
    restart: int
    """How often torchrun had restarted the launch."""
    device_names: list[str]
    dataset: list[dict[str, object]]
    """The tokens that were checked."""

    def describe(self) -> dict[str, object]:
        """Return the entry of run.json, with the current time, the code's commit and the installed versions."""
        return {
            "time": utc_now(),
            "from_step": self.from_step,
            "restart": self.restart,
            "world_size": len(self.device_names),
            "devices": self.device_names,
            "code": git_state(ROOT),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "platform": platform.platform(),
        }


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json; empty if the run never started."""

    model: dict[str, Any] = field(default_factory=dict)
    """The configuration with its defaults."""
    train: dict[str, Any] = field(default_factory=dict)
    recipe_hash: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    """Counts of the run, as `Plan.describe` gives them."""
    dataset: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read the file; what is missing or has a wrong type stays empty."""
        empty = cls()
        document = read_json(path)
        found = {
            key: document[key]
            for key in cls.__dataclass_fields__
            if isinstance(document.get(key), type(getattr(empty, key)))
        }
        if "starts" in found:
            found["starts"] = [start for start in found["starts"] if isinstance(start, dict)]
        return cls(**found)

    @property
    def global_steps(self) -> int | None:
        """Global steps of the whole plan; None if the run never started."""
        return self.plan.get("global_steps")

    @property
    def hardware(self) -> str:
        """The devices of the last start, as "8x NVIDIA A100"."""
        devices = self.starts[-1].get("devices", []) if self.starts else []
        return f"{len(devices)}x {devices[0]}" if devices else "unknown"


def record_start(path: Path, model: ModelConfig, train: TrainConfig, plan: Plan, start: StartRecord) -> None:
    """Write run.json, adding an entry for this start."""
    record = RunRecord(
        model=asdict(model),
        train=asdict(train),
        recipe_hash=recipe_hash(model, train),
        plan=plan.describe(),
        dataset=start.dataset,
        starts=[*RunRecord.read(path).starts, start.describe()],
    )
    write_json(path, asdict(record))


def git_state(folder: Path) -> dict[str, object]:
    """Return the commit of the code and the files changed since; None if git cannot tell."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed_files": None if changed is None else changed.splitlines(),
    }

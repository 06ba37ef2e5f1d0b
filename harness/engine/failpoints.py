"""Faults on purpose: a seam through which tests break a run at a named point, inert unless TRAIN_FAULT is set.

  TRAIN_FAULT=POINT[@STEP[-LAST]][#RANK]:ACTION

At POINT, after or at global STEP (any, where left out) and on RANK (every), the process does ACTION to itself:

  kill9      die at once, as if the power went            term, stop   send itself SIGTERM, SIGSTOP
  raise      raise RuntimeError                           enospc       raise what a full disk raises
  sleep:N    wait N seconds                               nan          a NaN in a gradient (step.backward) or a weight
  flipbit    flip one bit of one weight

POINTS lists where the program comes by. This is the only place outside the commands and `distributed` that looks at
an environment variable, because a fault must reach code that knows nothing of how it was started.
"""

import errno
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.run.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

VARIABLE = "TRAIN_FAULT"
POINTS = (
    "download", "step.start", "step.backward", "step.opt", "eval", "metrics", "ckpt.begin",
    "ckpt.file:model.safetensors", "ckpt.file:optimizer.safetensors", "ckpt.file:state.json", "ckpt.manifest",
    "ckpt.rename", "ckpt.latest", "ckpt.best", "ckpt.prune", "ckpt.end",
)  # fmt: skip
ACTIONS = ("kill9", "raise", "term", "stop", "enospc", "nan", "flipbit", "sleep")
PATTERN = re.compile(
    r"(?P<point>ckpt\.file:[\w.]+|[a-z.]+)(@(?P<first>\d+)(-(?P<last>\d+))?)?(#(?P<rank>\d+))?"
    r":(?P<action>[a-z]+\d?)(:(?P<seconds>\d+(\.\d+)?))?"
)


@dataclass(frozen=True)
class Fault:
    """One fault: where, when, on which rank, and what."""

    point: str
    steps: range | None
    rank: int | None
    action: str
    seconds: float

    def is_due(self, point: str, step: int | None) -> bool:
        """Say whether this process, coming by `point` at `step`, is to fail."""
        if point != self.point or (self.rank is not None and self.rank != int(os.environ.get("RANK", "0"))):
            return False
        return self.steps is None or step in self.steps


def configured() -> Fault | None:
    """Read TRAIN_FAULT; None where it is not set. Raises ConfigError."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    match = PATTERN.fullmatch(text)
    if match is None or match["point"] not in POINTS or match["action"] not in ACTIONS:
        raise ConfigError(f"{VARIABLE}: found {text[:80]!r}, wanted POINT[@STEP[-LAST]][#RANK]:ACTION")
    first, last = match["first"], match["last"] or match["first"]
    return Fault(
        point=match["point"],
        steps=None if first is None else range(int(first), int(last) + 1),
        rank=None if match["rank"] is None else int(match["rank"]),
        action=match["action"],
        seconds=float(match["seconds"] or 0),
    )


def announce() -> None:
    """Say so, in one line on stderr, where a fault is set."""
    if configured() is not None:
        print(f"warning: {VARIABLE} is set: this run breaks on purpose ({os.environ[VARIABLE]})", file=sys.stderr)


def failpoint(point: str, step: int | None = None, model: "nn.Module | None" = None) -> None:
    """Come by a point; `model` is what `nan` and `flipbit` damage. Returns at once unless a fault is due here."""
    fault = configured()
    if fault is None or not fault.is_due(point, step):
        return
    signals = {"kill9": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
    if fault.action in signals:
        os.kill(os.getpid(), signals[fault.action])
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{VARIABLE}, at {point}")
    elif fault.action == "raise" or model is None:
        raise RuntimeError(f"{VARIABLE}: raised at {point}, step {step}")
    else:
        _damage(model, fault.action, in_gradient=point == "step.backward")


def _damage(model: "nn.Module", action: str, in_gradient: bool) -> None:
    parameter = list(model.parameters())[len(list(model.parameters())) // 2]
    if action == "nan" and in_gradient:

        def poison(gradient: "Tensor") -> "Tensor":
            handle.remove()
            return gradient * float("nan")

        handle = parameter.register_hook(poison)  # type: ignore[no-untyped-call]
    elif action == "nan":
        parameter.data.view(-1)[0] = float("nan")
    else:
        import torch

        parameter.data.view(torch.int32).view(-1)[0] ^= 1 << 20

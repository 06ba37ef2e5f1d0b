"""What a global step reports, and metrics.jsonl.

Values stay on the device while the step runs: each step's numbers are copied to the host in the background and read
when the next step has been started, so that reading them never leaves the device idle. Every rank reads the same
numbers and therefore counts, warns and stops alike; rank 0 writes.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.engine.costs import GIB
from harness.engine.distributed import Launch, gather
from harness.engine.experts import routing_metrics
from harness.engine.failpoints import failpoint
from harness.engine.step import StepOutcome
from harness.run.config import TrainConfig
from harness.run.console import progress_bar
from harness.run.errors import NonFiniteError
from harness.run.files import json_number
from harness.run.metrics_file import MetricsFile
from harness.run.plan import Plan
from harness.run.train_state import TrainState

PROGRESS = "Training: {percentage:3.0f}% |{bar:24}| step {n_fmt} of {total_fmt}, {remaining} left{postfix}"


class PendingMetrics:
    """One step's numbers from all ranks on their way to the host; making it waits for nothing."""

    def __init__(
        self, launch: Launch, losses: Tensor, routing: Tensor | None, outcome: StepOutcome, stop: bool
    ) -> None:
        """Send each rank's losses, how its blocks routed tokens if they did, and whether it was asked to stop."""
        asked = torch.full_like(losses[0], float(stop))
        own = torch.stack([losses.mean(), losses.min(), losses.max(), asked])
        rows = gather(launch, own if routing is None else torch.cat([own, routing.flatten()]))
        values = torch.cat([rows.flatten(), outcome.grad_norm.view(1), outcome.is_finite.float().view(1)])
        self._ranks, self._blocks = len(rows), 0 if routing is None else len(routing)
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()
        else:
            self._host = values
            self._done_at = time.monotonic()

    def read(self) -> "StepMetrics":
        """Wait for the copy and give the numbers; the one host sync of a global step."""
        if self._ready is not None:
            self._ready.synchronize()
            self._done_at = time.monotonic()
        *values, grad_norm, is_finite = self._host.tolist()
        per_rank = len(values) // self._ranks
        means, lows, highs, stops, *routings = (values[column::per_rank] for column in range(per_rank))
        routing = [math.fsum(column) / len(column) for column in routings]
        return StepMetrics(
            loss=math.fsum(means) / len(means),
            loss_min=min(lows),
            loss_max=max(highs),
            stop_requested=any(stops),
            grad_norm=grad_norm,
            was_skipped=not is_finite,
            routing=routing_metrics(routing, self._blocks),
            done_at=self._done_at,
        )


@dataclass(frozen=True)
class StepMetrics:
    """A global step's numbers over all ranks and accumulation steps; losses in nats per token."""

    loss: float
    loss_min: float
    loss_max: float
    stop_requested: bool
    grad_norm: float
    was_skipped: bool
    routing: dict[str, float | None]
    """Of a mixture of experts, by the names of metrics.jsonl."""
    done_at: float
    """When the step was done, or known to be, on the monotonic clock."""


@dataclass
class StepLog:
    """Takes every step's metrics, moves the run's counters on, and writes metrics.jsonl on rank 0.

    They are read when the next one comes; `catch_up` reads it at once, which waits for the device.
    """

    launch: Launch
    plan: Plan
    config: TrainConfig
    progress: TrainState
    file: MetricsFile
    flops_per_token: int
    peak_flops_per_second: float | None
    """Of all devices together; None where unknown."""
    device: torch.device
    stop_agreed: bool = False
    """Whether any rank was asked to stop; the same on every rank."""
    last: StepMetrics | None = None
    _pending: tuple[int, PendingMetrics, float] | None = field(default=None, init=False)
    _line: dict[str, object] | None = field(default=None, init=False)
    _waiting: list[dict[str, object]] = field(default_factory=list, init=False)
    _has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        now = time.monotonic()
        self._began = now - self.progress.elapsed_seconds
        self._step_began = now
        self._bar = progress_bar(
            self.plan.global_steps,
            "step",
            initial=self.progress.next_step,
            disable=not self.launch.is_main,
            bar_format=PROGRESS,
        )

    def submit(self, step: int, pending: PendingMetrics, learning_rate: float) -> None:
        """Take a step's metrics and finish the one before; raises NonFiniteError as `settle` does."""
        self.settle()
        self._pending = (step, pending, learning_rate)

    def catch_up(self) -> None:
        """Wait for the pending step and count it; its line is still to be written, by `settle`."""
        if self._pending is None:
            return
        step, pending, learning_rate = self._pending
        self._pending = None
        self.last = metrics = pending.read()
        self.stop_agreed = self.stop_agreed or metrics.stop_requested
        self.progress.count(self.plan.tokens_per_global_step, metrics.loss, metrics.was_skipped)
        self.progress.elapsed_seconds = metrics.done_at - self._began
        tokens_per_second = self.plan.tokens_per_global_step / max(metrics.done_at - self._step_began, 1e-9)
        self._step_began = metrics.done_at
        self._line = self._describe(step, metrics, learning_rate, tokens_per_second)
        self._bar.set_postfix_str(f"loss {metrics.loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update(1)

    def settle(self, **extras: object) -> None:
        """Finish the pending step, with `extras` in its line; raises NonFiniteError when patience is at its end."""
        self.catch_up()
        if self._line is None:
            return
        line, self._line = self._line | extras, None
        if self.launch.is_main:
            self._waiting.append(line)
            self._write()
        if self.progress.consecutive_skips >= self.config.nonfinite_patience:
            raise NonFiniteError(
                f"global step {line['step']}: gradients were not finite for {self.progress.consecutive_skips} steps "
                "in a row (nonfinite_patience); the weights are those before them"
            )

    def _write(self) -> None:
        """Append the lines that wait; where that fails they wait on, because training is worth more than its log."""
        try:
            failpoint("metrics", self.progress.next_step - 1)
            self.file.append(self._waiting)
        except OSError as error:
            if not self._has_warned:
                print(f"warning: {self.file.path}: cannot be written for now ({error.strerror})", file=sys.stderr)
            self._has_warned = True
        else:
            self._waiting.clear()

    def restart_clock(self) -> None:
        """Leave what was done since the last step (a checkpoint, an observation) out of the next one's speed."""
        self._step_began = time.monotonic()

    def close(self) -> None:
        """Finish the progress bar."""
        self._bar.close()

    def _describe(
        self, step: int, metrics: StepMetrics, learning_rate: float, tokens_per_second: float
    ) -> dict[str, object]:
        elapsed, price = self.progress.elapsed_seconds, self.config.price_per_hour
        max_norm, peak = self.config.clipping_max_norm, self.peak_flops_per_second
        return {
            "step": step,
            "tokens": self.progress.tokens,
            "elapsed": round(elapsed, 3),
            "train/loss": json_number(metrics.loss),
            "train/loss_min": json_number(metrics.loss_min),
            "train/loss_max": json_number(metrics.loss_max),
            "train/lr": learning_rate,
            "train/grad_norm": json_number(metrics.grad_norm),
            "train/clipped": max_norm is not None and metrics.grad_norm > max_norm,
            "train/skipped": metrics.was_skipped,
            "train/tok_per_sec": round(tokens_per_second, 1),
            **metrics.routing,
            "train/mfu": None if peak is None else round(tokens_per_second * self.flops_per_token / peak, 4),
            "mem/peak_gib": round(peak_memory_gib(self.device), 3),
            "cost": None if price is None else round(elapsed / 3600 * price, 4),
        }


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process held: on the GPU where there is one, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

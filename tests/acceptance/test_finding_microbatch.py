"""-f finds the largest micro-batch in fresh processes, alike on all ranks, and leaves the run's folder alone."""

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import ddp_train
from harness.engine import distributed
from harness.run.errors import ConfigError
from harness.run.plan import Plan
from tests.conftest import Called
from tests.helpers import run, train_in_fork
from training import trials


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 64, 100, 1000])
@pytest.mark.parametrize("start", [1, 6, 64])
def test_search_finds_any_limit_in_few_trials(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert trials.largest_that_fits(fits, start) == limit
    assert len(tried) == len(set(tried)) <= 2 * (max(limit, start)).bit_length() + 2


def test_nothing_fits_is_an_error() -> None:
    assert trials.largest_that_fits(lambda _: False, 6) == 0
    with pytest.raises(ConfigError, match="not even one sequence"):
        trials.describe(0, Plan(1, 6, 16, 1024, 10))


@pytest.mark.parametrize(
    ("largest", "world_size", "advice"),
    [
        (70, 1, '"microbatch_size": 48, "gradient_accumulation_steps": 2'),
        (96, 1, '"microbatch_size": 96, "gradient_accumulation_steps": 1'),
        (500, 8, '"microbatch_size": 12, "gradient_accumulation_steps": 1'),
        (7, 8, '"microbatch_size": 6, "gradient_accumulation_steps": 2'),
    ],
)
def test_advice_keeps_the_global_batch(largest: int, world_size: int, advice: str) -> None:
    text = trials.describe(largest, Plan(world_size, 1, 96 // world_size, 1024, 10))
    assert advice in text
    assert f"Largest micro-batch that trains: {largest}" in text


def test_a_trial_tells_too_large_from_fitting(make_run: Callable[..., Path], datasets_dir: Path) -> None:
    """Real trials in fresh processes, under a limit that they inherit."""
    folder = make_run(model={"vocab_size": 5000, "context_length": 256, "emb_dim": 64})
    before = sorted(folder.iterdir())
    words = ["ddp_train.py", folder.name, str(datasets_dir), "--runs-dir", str(folder.parent), "--device", "cpu"]
    environment = distributed.environment_of_one(distributed.Launch())
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (1500 * 2**20,) * 2); "
        "import ddp_train; sys.exit(ddp_train.exit_status_of(ddp_train.main))"
    )
    trial = [sys.executable, "-c", script, *words[1:], "--try-microbatch-size"]
    assert trials.succeeds([*trial, "1"], environment)
    assert not trials.succeeds([*trial, "2000"], environment)
    assert sorted(folder.iterdir()) == before


def test_a_trial_validates_if_the_run_does(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of all positions may take more memory than training."""
    sizes: list[int] = []

    def losses(_: object, batches: list[tuple[Tensor, Tensor]], __: object) -> None:
        sizes.extend(len(tokens) for tokens, _ in batches)

    monkeypatch.setattr(trials, "sequence_losses", losses)
    monkeypatch.setattr(trials, "limit_memory", lambda _: None)
    for name, train in (("plain", {}), ("validates", {"validation_interval": 5, "validation_batches": 2})):
        folder = make_run(name, train=train)
        place = (folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu")
        assert call(ddp_train.main, *place, "--try-microbatch-size", 3).status == 0
    assert sizes == [3]


def test_a_trial_that_fails_for_another_reason_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        trials.succeeds([sys.executable, "-c", "raise ValueError('a defect')"], {})


def test_what_a_trial_refuses_is_refused_in_its_words(datasets_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUN: found no folder .*absent, wanted one with"):
        trials.succeeds([sys.executable, "ddp_train.py", "absent", str(datasets_dir)], {})


def limit_by_rank(unfit_rank: int) -> None:
    """Have memory run out above 5 sequences on one rank and above 11 on the other."""
    limit = 5 if os.environ["RANK"] == str(unfit_rank) else 11
    trials.succeeds = lambda command, environment: int(command[-1]) <= limit


@pytest.mark.fault("F38")
@pytest.mark.parametrize("unfit_rank", [0, 1])
def test_two_ranks_agree_on_the_smaller(make_run: Callable[..., Path], datasets_dir: Path, unfit_rank: int) -> None:
    """Both answer 5, neither hangs, and nothing of the run is touched."""
    folder = make_run(train={"microbatch_size": 4, "gradient_accumulation_steps": 6})
    before = sorted(folder.iterdir())
    ranks = train_in_fork(folder, datasets_dir, "-f", count=2, before=limit_by_rank, arguments=(unfit_rank,))
    assert "Largest micro-batch that trains: 5" in ranks[0].stdout
    # 48 sequences a global step on 2 processes: 24 each, of which 4 is the largest divisor up to 5.
    assert '"microbatch_size": 4, "gradient_accumulation_steps": 6' in ranks[0].stdout
    assert sorted(folder.iterdir()) == before


def test_flag_prints_sizes_and_advice(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(train={"min_train_tokens": -1})  # as many as the dataset has, which is not looked at
    monkeypatch.setattr(trials, "succeeds", lambda command, _: int(command[-1]) <= 3)
    done = call(ddp_train.main, folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu", "-f")
    assert done.status == 0
    assert done.stdout.splitlines()[:3] == [
        "micro-batch 2: trains",
        "micro-batch 4: does not fit",
        "micro-batch 3: trains",
    ]
    assert '"microbatch_size": 2, "gradient_accumulation_steps": 4' in done.stdout


def test_limit_that_is_set_counts() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    code = (
        "import resource; from training import trials; resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9)); "
        "trials.limit_memory(1); print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    )
    done = run("-c", code)
    assert int(done.stdout) <= 10**9
    assert resource.getrlimit(resource.RLIMIT_DATA) == before

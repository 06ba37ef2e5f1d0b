"""How few tokens take a recipe to another recipe's final loss, and a table in which its shorter runs are judged.

  python -m benchmarks.tokens_to_loss runs/published-s* --by runs/modern-*-s* --table tokens.csv

The first runs are the recipe that is to be reached; those after --by are the other recipe, trained from the start
for several lengths on the same seeds, each with its own schedule. For every seed, the tokens at which the second
recipe reaches the first one's final loss are interpolated between its lengths, the loss being taken as linear in the
logarithm of the tokens; the ratio to the first one's tokens is averaged over the seeds with a t interval, both in its
logarithm. `experiment.py compare --losses tokens.csv` then says whether so many tokens are enough; where they were
planned as changes of min_train_tokens in one experiment, `compare --experiment` does without the table.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.run.errors import ConfigError, exit_status_of
from harness.run.run_folder import RunFolder
from study.losses_table import COLUMNS
from study.results import Result, read_runs
from study.statistics import Estimate, sample_sd


def main() -> None:
    """Read the runs, print the ratio, and write the table; raises ConfigError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reached", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--by", nargs="+", type=Path, required=True, metavar="RUN_FOLDER")
    parser.add_argument("--table", type=Path, metavar="CSV")
    arguments = parser.parse_args()
    results = read_runs([RunFolder(path) for path in (*arguments.reached, *arguments.by)], "last")
    reached, by = results[: len(arguments.reached)], results[len(arguments.reached) :]
    print(in_words(ratios(reached, by)))
    if arguments.table:
        write_table(arguments.table, reached, by)


def ratios(reached: Sequence[Result], by: Sequence[Result]) -> dict[str, float]:
    """Return, for every run that is to be reached, the fraction of its tokens that reaches its loss; by its name.

    Raises ConfigError where the lengths on the run's seeds do not bracket its loss.
    """
    found, problems = {}, []
    for run in reached:
        lengths = sorted((tokens_of(other), loss_of(other)) for other in by if other.seeds == run.seeds)
        losses = [loss for _, loss in lengths]
        if len(lengths) < 2 or not min(losses) <= loss_of(run) <= max(losses):
            shown = ", ".join(f"{loss:.4f} at {tokens:,} tokens" for tokens, loss in lengths) or "none"
            problems.append(
                f"{run.run}: found runs on its seeds with losses {shown}; "
                f"wanted some above and some below {loss_of(run):.4f}"
            )
            continue
        # np.interp wants what it interpolates over to rise, and losses fall with the tokens.
        logs = np.interp(-loss_of(run), [-loss for loss in losses], np.log([tokens for tokens, _ in lengths]))
        found[run.run] = float(np.exp(logs)) / tokens_of(run)
    if problems:
        raise ConfigError(*problems)
    return found


def in_words(found: dict[str, float]) -> str:
    """Say the ratio of every seed, and their geometric mean with its 95% interval."""
    logs = np.log(list(found.values()))
    rows = [f"{run}: reached with {ratio:.1%} of its tokens" for run, ratio in found.items()]
    if len(logs) < 2:
        return "\n".join(rows)
    estimate = Estimate(float(logs.mean()), sample_sd(list(logs)) / len(logs) ** 0.5, len(logs) - 1)
    low, high = (float(np.exp(end)) for end in estimate.interval())
    return "\n".join(
        [
            *rows,
            f"On {len(logs)} seeds: {np.exp(estimate.difference):.1%} of the tokens, 95% CI {low:.1%} to {high:.1%}",
        ]
    )


def write_table(path: Path, reached: Sequence[Result], by: Sequence[Result]) -> None:
    """Write the losses as `experiment.py compare --losses` reads them, with numbers of tokens as recipes."""
    rows = [(item, "reached") for item in reached] + [(item, f"{tokens_of(item)} tokens") for item in by]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            (item.run, recipe, item.init_seed, item.train_seed, f"{loss_of(item):.6f}") for item, recipe in rows
        )


def tokens_of(result: Result) -> int:
    """Return the tokens that a run was trained on."""
    assert result.metadata is not None
    return result.metadata.tokens_seen


def loss_of(result: Result) -> float:
    """Return a run's test loss; raises ConfigError for one that diverged."""
    if result.loss is None:
        raise ConfigError(f"{result.run}: diverged, wanted a run with a loss")
    return result.loss


if __name__ == "__main__":
    sys.exit(exit_status_of(main))

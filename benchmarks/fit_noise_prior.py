"""Fit the noise prior to a table of replicated runs, and check it on recipes that the fit has not seen.

  python benchmarks/fit_noise_prior.py losses.csv

The table has the columns recipe and final_loss, and a row for each run; `steps` too, where one recipe was run at
several lengths. Every recipe is left out in turn, the prior is fitted to the others, and studies of three baseline
runs and five arms of one run are drawn from its runs: one arm better by 0.005, or none. The shipped prior is then
checked in the same way.
"""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from study.prior import PUBLIC_PRIOR, fit_prior
from study.results import Group, Result
from study.statistics import Floats, NoisePrior
from study.verdicts import HELPS, SLIGHTLY_BETTER, Rules, is_sign_told, judge

BASELINES, ARMS, EFFECT, STUDIES = 3, 5, 0.005, 400


def main() -> None:
    """Fit, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", type=Path, metavar="CSV")
    recipes = read(parser.parse_args().losses)
    variances = [float(x.var(ddof=1)) for x in recipes]
    dfs = [float(len(x) - 1) for x in recipes]
    sd, df = fit_prior(variances, dfs)
    print(f"{sum(map(len, recipes))} runs of {len(recipes)} recipes: sd {sd:.5f} on {df:.1f} df")
    whole = [place for place, losses in enumerate(recipes) if len(losses) >= BASELINES + ARMS]
    report("each recipe left out of the fit", recipes, whole, [fit_without(variances, dfs, place) for place in whole])
    report("the shipped prior", recipes, whole, [PUBLIC_PRIOR] * len(whole))
    report("no prior", recipes, whole, [None] * len(whole))


def read(path: Path) -> list[Floats]:
    """Give the final losses of every recipe with two or more runs."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["recipe"], row.get("steps", "")].append(float(row["final_loss"]))
    return [np.array(losses) for losses in found.values() if len(set(losses)) > 1]


def fit_without(variances: Sequence[float], dfs: Sequence[float], place: int) -> NoisePrior:
    """Fit the prior to all recipes but one."""
    others = [index for index in range(len(variances)) if index != place]
    return NoisePrior(*fit_prior([variances[i] for i in others], [dfs[i] for i in others]), "")


def report(title: str, recipes: list[Floats], whole: list[int], priors: Sequence[NoisePrior | None]) -> None:
    """Print how often the effect is called HELPS, and how often a study without effects has a false verdict."""
    generator = np.random.default_rng(1)
    rates = [
        [
            np.mean([judged(generator, recipes[place], prior, effect) for _ in range(STUDIES)])
            for effect in (EFFECT, 0.0)
        ]
        for place, prior in zip(whole, priors, strict=True)
    ]
    helps, wrong = np.mean(rates, axis=0)
    errors = np.std(rates, axis=0, ddof=1) / math.sqrt(len(rates))
    print(
        f"{title}, {len(whole)} recipes: HELPS for {EFFECT} in {100 * helps:.1f}% (se {100 * errors[0]:.1f}), "
        f"false verdicts in {100 * wrong:.1f}% (se {100 * errors[1]:.1f})"
    )


def judged(generator: np.random.Generator, losses: Floats, prior: NoisePrior | None, effect: float) -> bool:
    """Draw a study; say whether the first arm is called better, or without effect whether any arm is called."""
    drawn = generator.permutation(losses)[: BASELINES + ARMS].tolist()
    drawn[BASELINES] -= effect
    groups = [group_of("baseline", drawn[:BASELINES])]
    groups += [group_of(f"arm{arm}", [loss]) for arm, loss in enumerate(drawn[BASELINES:])]
    arms = judge(groups[0], groups[1:], Rules(find_prior=lambda *_: prior)).arms
    if effect:
        return arms[0].verdict.startswith((HELPS, SLIGHTLY_BETTER))
    return any(is_sign_told(item.verdict) for item in arms)


def group_of(recipe: str, losses: Sequence[float]) -> Group:
    """Make the replicates of a recipe whose seeds are not known."""
    return Group(recipe, tuple(Result(f"{recipe}-{n}", recipe, "", "", loss) for n, loss in enumerate(losses)))


if __name__ == "__main__":
    main()

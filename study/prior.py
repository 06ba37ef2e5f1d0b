"""What is known of the training noise before a comparison has shown its own: the prior of the moderated t.

A prior is a standard deviation and degrees of freedom, as if that many replicates had been seen already; the
variance that a comparison shows is averaged with it, each weighted by its degrees of freedom (Smyth 2004, Statistical
Applications in Genetics and Molecular Biology 3, article 3, equation 3 and section 6). It comes from the noise
ledger, or from public runs where the comparison is like them, and never from the arms that are being judged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, fdtrc, polygamma

from study.ledger import Entry, Scale, scale_distance
from study.statistics import Floats, Noise, NoisePrior

CONTRADICTION = 0.01
"""A prior is set aside where a noise as large as the comparison's own would be so unlikely under it."""
OUTLYING = 0.05
FEWEST_ARMS = 4
MANY_PAIRS = 4
"""So many pairs say more of their noise than single runs do, whose seeds cancel nothing."""
MOST_DF = 1000.0

PUBLIC_PRIOR = NoisePrior(
    sd=0.0012,
    df=9.0,
    source="public runs: 613 of 60 recipes at 124M parameters, learning rate decayed, data order fixed",
)
PUBLIC_PARAMETERS = (124e6, 163e6)
PUBLIC_TOKENS = (0.5e9, 3.3e9)


@dataclass(frozen=True)
class Subject:
    """What a comparison is about, as far as its noise is concerned."""

    recipe_hash: str
    """Of the baseline."""
    scale: Scale
    decays: bool
    """Whether the learning rate is low at the end, where a loss no longer jumps from step to step."""
    runs: frozenset[str]
    """The runs that are being judged; what the ledger learned from them is no prior."""


def find_run_prior(
    entries: Sequence[Entry], subject: Subject | None, public: bool | None = None
) -> NoisePrior | None:
    """Find the prior of the standard deviation of one run, in nats per token, with its source in words.

    The ledger's replicates of the same recipe come first, joined to the public prior where that applies: in a like
    comparison, or where the user says so (`public`; False forbids it). None where nothing is known. Without a
    subject, as for a table of numbers, the user's word alone decides.
    """
    own = None if subject is None else _own_entry(entries, subject)
    applies = public if public is not None else subject is not None and is_like_public(subject)
    if own is None:
        return PUBLIC_PRIOR if applies else None
    entry = NoisePrior(own.sd, own.df, f"{len(own.runs)} earlier runs of {own.recipe} in the noise ledger")
    if applies and not is_contradicted(PUBLIC_PRIOR, own.noise):
        return _joined(entry, PUBLIC_PRIOR)
    return entry


def find_pair_prior(
    entries: Sequence[Entry], subject: Subject | None, pairs: int, public: bool | None = None
) -> NoisePrior | None:
    """Find the prior for differences between arm and baseline on one seed, as the noise of one run of the two.

    From earlier experiments of this scale that shared seeds, four arms or more; else, for fewer than MANY_PAIRS or
    where the user says so, that of runs whose seeds cancel nothing.
    """
    if subject is not None:
        found = [
            entry
            for entry in entries
            if entry.component == "pairs"
            and entry.sd > 0
            and scale_distance(entry, subject.scale) <= 1
            and not subject.runs & set(entry.runs)
        ]
        if len(found) >= FEWEST_ARMS:
            sd, df = fit_prior([entry.sd**2 for entry in found], [entry.df for entry in found])
            return NoisePrior(
                sd, df, f"{len(found)} arms of earlier experiments on shared seeds, in the noise ledger"
            )
    run = find_run_prior(entries, subject, public)
    if run is None or (pairs >= MANY_PAIRS and not public):
        return None
    return NoisePrior(run.sd, run.df, f"{run.source}, as if seeds were not shared")


def is_like_public(subject: Subject) -> bool:
    """Say whether a comparison is like the public runs: size and budget within a factor of two, a decayed rate."""
    near = (
        low / 2 <= value <= 2 * high
        for value, (low, high) in (
            (subject.scale.parameters, PUBLIC_PARAMETERS),
            (subject.scale.train_tokens, PUBLIC_TOKENS),
        )
    )
    return subject.decays and all(near)


def is_contradicted(prior: NoisePrior, own: Noise) -> bool:
    """Say whether replicates show a noise larger than the prior makes likely (F test at 1%).

    A smaller noise does not contradict: a prior that is too large is merely careful, and setting it aside where a
    noise happens to look small would leave the comparison far too sure. `own` is of one run: of paired differences,
    their standard deviation over sqrt(2).
    """
    if own.df < 1 or own.sd <= 0:
        return False
    return bool(fdtrc(own.df, prior.df, (own.sd / prior.sd) ** 2) < CONTRADICTION)


def fit_prior(variances: Sequence[float], dfs: Sequence[float]) -> tuple[float, float]:
    """Fit a prior's standard deviation and degrees of freedom to the sample variances of several recipes.

    By the moments of their logarithms (Smyth 2004, section 6.2, as limma's fitFDist does): with z = log s^2, the mean
    of z - digamma(d/2) + log(d/2) gives the scale, and what its variance exceeds the mean of trigamma(d/2) by is
    trigamma(d0/2). Recipes that the prior so found all but excludes (F test at 5% over all of them) are left out and
    the rest is fitted again: their runs were not of one recipe, or are of another kind. At least two recipes.
    """
    variance, df = np.asarray(variances, dtype=np.float64), np.asarray(dfs, dtype=np.float64)
    kept = np.ones(len(variance), dtype=bool)
    while True:
        scale, prior_df = _fit_moments(variance[kept], df[kept])
        p = np.where(kept, fdtrc(df, prior_df, variance / scale), 1.0)
        worst = int(np.argmin(p))
        if p[worst] >= OUTLYING / len(variance) or kept.sum() <= 3:
            return math.sqrt(scale), prior_df
        kept[worst] = False


def _fit_moments(variance: Floats, df: Floats) -> tuple[float, float]:
    """Give the prior's variance and degrees of freedom (Smyth 2004, section 6.2)."""
    logs = np.log(variance) - digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, df / 2).mean())
    prior_df = MOST_DF if excess <= polygamma(1, MOST_DF / 2) else 2 * _inverse_trigamma(excess)
    return float(np.exp(logs.mean() + digamma(prior_df / 2) - np.log(prior_df / 2))), prior_df


def _inverse_trigamma(value: float) -> float:
    """Solve trigamma(x) = value > 0 by Newton's method (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def _own_entry(entries: Sequence[Entry], subject: Subject) -> Entry | None:
    """Give the ledger's entry of the same recipe with most degrees of freedom, from other runs than the judged."""
    own = [
        entry
        for entry in entries
        if entry.component == "all"
        and entry.recipe_hash == subject.recipe_hash
        and entry.sd > 0
        and not subject.runs & set(entry.runs)
    ]
    return max(own, key=lambda entry: (entry.hardware == subject.scale.hardware, entry.df), default=None)


def _joined(one: NoisePrior, other: NoisePrior) -> NoisePrior:
    """Join two priors as if their replicates had been seen together."""
    df = one.df + other.df
    sd = math.sqrt((one.df * one.sd**2 + other.df * other.sd**2) / df)
    return NoisePrior(sd, df, f"{one.source}; and {other.source}")

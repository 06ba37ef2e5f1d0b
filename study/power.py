"""How large an effect must be, to be called HELPS or HURTS four times in five by the analysis that will be used.

Numbers of seeds are counted by the word in the table, not by a test on its own: the word needs a p value below 5%
after Holm's adjustment for all comparisons of the family, which with one effect and otherwise null arms comes to 5%
over their number.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from study.lenth import critical, pseudo_standard_error
from study.statistics import ALPHA, POWER, Floats, power

DRAWS = 4000
LARGEST = 1e6
"""Of effects that are looked for, in standard errors."""
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Analysis:
    """How one comparison will be tested: what its standard error and degrees of freedom will be.

    Attributes:
        se: of the estimate, in any unit, such as standard deviations of the noise of one run.
        df: degrees of freedom of the comparison's own noise.
        family: comparisons that are adjusted together.
        prior_df: those of a prior of that noise; 0 where there is none.
        contrasts: of an unreplicated factorial, which Lenth's method judges; 0 elsewhere.
    """

    se: float
    df: float
    family: int
    prior_df: float = 0.0
    contrasts: int = 0

    def power(self, shift: float) -> float:
        """Give the chance of the word for a true effect of `shift` standard errors."""
        if self.contrasts:
            return _power_of_lenth(shift, self.contrasts, self.family)
        if self.df == 0 and self.prior_df < 1:
            return 0.0
        alpha = ALPHA / self.family
        if self.prior_df == 0:
            return power(shift, 1.0, self.df, alpha)
        return _power_of_moderated_t(shift, self.df, self.prior_df, alpha)

    def detectable(self) -> float:
        """Give the effect, in the unit of the standard error, called four times in five; infinite where none is."""
        high = 1.0
        while self.power(high) < POWER:
            high *= 2
            if high > LARGEST:
                return math.inf
        low = 0.0
        while high - low > TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.power(middle) >= POWER else (middle, high)
        return self.se * high


def _power_of_moderated_t(shift: float, df: float, prior_df: float, alpha: float) -> float:
    """Give the power of a moderated t test, over what the prior says of the noise (Smyth 2004, section 4).

    The variance is drawn as prior_df / chi^2(prior_df) in units of the prior's, and the comparison's own around it.
    """
    true, own = _drawn_variances(df, prior_df)
    seen = np.sqrt((prior_df + df * own) / (prior_df + df))
    threshold = float(stdtrit(df + prior_df, 1 - alpha / 2)) * seen
    sd = np.sqrt(true)
    return float(np.mean(ndtr((shift - threshold) / sd) + ndtr((-shift - threshold) / sd)))


@lru_cache(maxsize=64)
def _drawn_variances(df: float, prior_df: float) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(0)
    true = prior_df / generator.chisquare(prior_df, DRAWS)
    own = true * generator.chisquare(df, DRAWS) / df if df > 0 else np.zeros(DRAWS)
    return true, own


def _power_of_lenth(shift: float, contrasts: int, family: int) -> float:
    """Give the power of Lenth's test when one effect of the family is real and all other contrasts are null."""
    drawn = _drawn_contrasts(contrasts).copy()
    drawn[:, 0] += shift
    return float(np.mean(np.abs(drawn[:, 0]) / pseudo_standard_error(drawn) > critical(contrasts, family)))


@lru_cache(maxsize=8)
def _drawn_contrasts(contrasts: int) -> Floats:
    return np.random.default_rng(1).standard_normal((DRAWS, contrasts))

"""How often do 95% intervals over items and fine-tuning seeds hold the truth, and how often is a verdict false?

python -m benchmarks.simulate_crossed    (two minutes; prints, and writes benchmarks/results/simulate_crossed.json)

Simulated, with known truth: a model's score in a cell is an item's effect, plus the luck of a fine-tuning, plus noise
of standard deviation 1, and no model differs from the baseline. Both effects are given as standard deviations of a
difference. A study of four models and a baseline is wrong if any of them HELPS or HURTS.
"""

from pathlib import Path

import numpy as np

from harness.run.files import write_json
from instruction.compare import Cells, Metric, compare
from study.statistics import Floats
from study.verdicts import is_sign_told

RESULTS = Path(__file__).parent / "results" / "simulate_crossed.json"
TRIALS = 1000
MODELS = 5


def simulate(items: int, seeds: int, item_sd: float, luck_sd: float) -> dict[str, float]:
    """Return the share of intervals that hold 0, their median half width, and the share of studies that are wrong."""
    generator = np.random.default_rng([items, seeds, round(100 * item_sd), round(100 * luck_sd)])
    cells = Cells.of([(f"{item:04d}", seed) for item in range(items) for seed in range(seeds)])
    held, halves, wrong = 0, [], 0
    for _ in range(TRIALS):
        scores = {str(model): draw(generator, items, seeds, item_sd, luck_sd) for model in range(MODELS)}
        found = compare(Metric("score", "higher", 0.01), scores, cells, "0")[1:]
        wrong += any(is_sign_told(row.verdict) for row in found)
        for row in found:
            assert row.difference is not None
            held += abs(row.difference.difference) < row.difference.half_width()
            halves.append(row.difference.half_width())
    return {
        "coverage": held / len(halves),
        "half_width": round(float(np.median(halves)), 4),
        "wrong_studies": wrong / TRIALS,
    }


def draw(generator: np.random.Generator, items: int, seeds: int, item_sd: float, luck_sd: float) -> Floats:
    """Return one model's scores, (items x seeds,); the baseline's are drawn alike, each with half of the variance."""
    values = generator.normal(0, item_sd, (items, 1)) + generator.normal(0, luck_sd, (1, seeds))
    both: Floats = ((values + generator.normal(size=(items, seeds))) / np.sqrt(2)).ravel()
    return both


if __name__ == "__main__":
    rows = []
    for items, seeds in ((140, 2), (60, 3), (140, 3), (60, 5)):
        for item_sd in (0.0, 0.7):
            for luck_sd in (0.0, 0.1, 0.2, 0.5):
                row = {"items": items, "seeds": seeds, "item_sd": item_sd, "luck_sd": luck_sd}
                rows.append({**row, **simulate(items, seeds, item_sd, luck_sd)})
                print(*rows[-1].values(), sep="\t")
    write_json(RESULTS, rows)

"""How often do 95% intervals over items and fine-tuning seeds hold the truth? Simulated, with known truth.

python -m benchmarks.simulate_crossed    (under a minute; prints, and writes benchmarks/results/simulate_crossed.json)

A difference in a cell is an item's effect, plus the luck of a fine-tuning, plus noise of standard deviation 1; its
true mean is 0. Both effects are given as standard deviations.
"""

from pathlib import Path

import numpy as np

from harness.run_folder import write_json
from instruction.compare import Cells

RESULTS = Path(__file__).parent / "results" / "simulate_crossed.json"
TRIALS = 2000


def coverage(items: int, seeds: int, item_sd: float, luck_sd: float) -> dict[str, float]:
    """Give the share of intervals that hold 0, and their median half width."""
    generator = np.random.default_rng([items, seeds, round(100 * item_sd), round(100 * luck_sd)])
    cells = Cells.of([(f"{item:04d}", seed) for item in range(items) for seed in range(seeds)])
    held, halves = 0, []
    for _ in range(TRIALS):
        values = generator.normal(0, item_sd, (items, 1)) + generator.normal(0, luck_sd, (1, seeds))
        low, high = cells.mean((values + generator.normal(size=(items, seeds))).ravel())[0].interval()
        held += low < 0 < high
        halves.append((high - low) / 2)
    return {"coverage": held / TRIALS, "half_width": round(float(np.median(halves)), 4)}


if __name__ == "__main__":
    rows = []
    for items, seeds in ((60, 3), (140, 3), (60, 5)):
        for item_sd in (0.0, 0.7):
            for luck_sd in (0.0, 0.1, 0.2, 0.5):
                row = {"items": items, "seeds": seeds, "item_sd": item_sd, "luck_sd": luck_sd}
                rows.append({**row, **coverage(items, seeds, item_sd, luck_sd)})
                print(*rows[-1].values(), sep="\t")
    write_json(RESULTS, rows)

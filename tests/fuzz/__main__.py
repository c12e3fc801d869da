"""``python -m tests.fuzz --minutes 30 --seed 1`` walks on from a seed; ``--walk 7`` repeats one walk."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.compare import Tally
from tests.fuzz.pool import Pool
from tests.fuzz.run import report, run, shrink
from tests.fuzz.walk import draw


def summary(walks: int, failures: int, tally: Tally) -> str:
    """What was done, in a line."""
    return (
        f"{walks} walks, {tally.events} events, {failures} failures; {tally.numbers:,} numbers compared, "
        f"{tally.sharp / max(tally.numbers, 1):.3f} of them to within 1e-3; largest error {tally.worst:.2g} of its "
        f"bound; {dict(tally.kinds)}"
    )


def main() -> int:
    """Run walks until the time is up; the exit code says whether one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the first walk")
    parser.add_argument("--walk", type=int, help="run only the walk of this seed")
    parser.add_argument("--events", help="of that walk only these, such as 0,3,4")
    parser.add_argument("--short", action="store_true", help="short walks, as pytest runs them")
    parser.add_argument("--stop", action="store_true", help="end at the first failure")
    args = parser.parse_args()
    pool, tally, failures, walks = Pool(), Tally(), 0, 0
    seed, end = args.seed if args.walk is None else args.walk, time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        walk = draw(seed, args.short)
        if args.events is not None:
            walk = walk.only([int(number) for number in args.events.split(",") if number])
        failure = run(walk, pool, tally)
        walks += 1
        if failure is not None:
            failures += 1
            pool.close()
            smaller = (walk, failure) if args.walk is not None else shrink(walk, failure, pool)
            pool.close()
            print(report(*smaller, args.short), flush=True)
        if args.walk is not None or (failure is not None and args.stop):
            break
        seed += 1
        if walks % 100 == 0:
            print(f"so far {summary(walks, failures, tally)}", flush=True)
    pool.close()
    print(summary(walks, failures, tally))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw what a run reported of its steps and its noise, and signal fractions read and measured side by side.

    python examples/plot_noise.py run runs/quickstart/version_0 --out docs/readings.png
    python examples/plot_noise.py measured noise_0.009.csv noise_0.001.csv --out docs/noise_scale.png

The first reads TensorBoard files that `ReadingLog` wrote, the second the tables of examples/benchmarks/noise_scale.py.
Needs matplotlib and tensorboard.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from plot_curves import read_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def plot_run(folder: Path, out: Path) -> None:
    """Step scales of all matrices on the left, the median signal fraction and what it is on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    tags = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Tags()["scalars"]
    matrices = [tag for tag in tags if tag.startswith("step_scale/") and tag.endswith(".weight")]
    colors = mpl.colormaps["viridis"]
    for number, tag in enumerate(matrices):
        left.plot(*read_curve(folder, tag), linewidth=0.9, color=colors(number / max(len(matrices) - 1, 1)))
    left.axhline(0.174, color="0.4", linestyle=":", label="noise alone: 0.174")
    left.set(xlabel="step", ylabel="step_scale of each matrix", yscale="log")
    left.legend()
    kinds = {"signal_fraction": "value", "signal_fraction_at_most": "at most", "signal_fraction_negative": "negative"}
    for name, label in kinds.items():
        if f"{name}/median" in tags:
            right.plot(*read_curve(folder, f"{name}/median"), ".", markersize=4, label=label)
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set(xlabel="step", ylabel="median signal fraction", ylim=(-0.1, 1))
    right.set_yscale("symlog", linthresh=0.01)
    right.legend()
    figure.savefig(out, dpi=130)


def plot_measured(files: list[Path], out: Path) -> None:
    """For each table and moment: read and measured, a dot for each matrix."""
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), constrained_layout=True, squeeze=False)
    for ax, file in zip(axes[0], files, strict=True):
        with file.open(newline="") as table:
            rows = list(csv.DictReader(table))
        for step in dict.fromkeys(row["step"] for row in rows):
            found = [row for row in rows if row["step"] == step]
            reads, error, direct = ([100 * float(row[key]) for row in found] for key in ("reads", "error", "direct"))
            ax.errorbar(direct, reads, yerr=[3 * e for e in error], fmt=".", linewidth=0.8, label=f"step {step}")
        ax.plot([0, 100], [0, 100], color="0.4", linewidth=0.8, label="agreement")
        ax.set(title=file.stem, xlabel="measured signal fraction (%)", ylabel="read, with 3 standard errors (%)")
        ax.set(xlim=(0, 100), ylim=(-20, 60))
        ax.legend()
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "measured"])
    parser.add_argument("files", nargs="+", type=Path, help="a run's folder, or tables")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if args.what == "run":
        plot_run(args.files[0], args.out)
    else:
        plot_measured(args.files, args.out)


if __name__ == "__main__":
    main()

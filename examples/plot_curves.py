"""Draw the loss curves of finished runs from their TensorBoard files.

    python examples/plot_curves.py --out docs/quickstart.png AdamW=runs/adamw Muon=runs/muon NAMO=runs/namo

Each run is a label and a folder with event files of `train/loss` and `val/loss`; of several versions in the folder
the newest is drawn. Needs matplotlib and tensorboard.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_curve(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a scalar in the newest event file under a folder."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise SystemExit(f"Expected TensorBoard files under {folder}. Got none.")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise SystemExit(f"Expected the curve {tag} in {files[-1]}. Got {events.Tags()['scalars']}.")
    points = events.Scalars(tag)
    return [point.step for point in points], [point.value for point in points]


def plot(runs: dict[str, Path], out: Path) -> None:
    """Training loss on the left, validation loss on the right, its last value in the legend."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for label, folder in runs.items():
        left.plot(*read_curve(folder, "train/loss"), linewidth=1.2)
        steps, losses = read_curve(folder, "val/loss")
        right.plot(steps, losses, marker="o", markersize=3, label=f"{label}: {losses[-1]:.2f}")
    left.set(title="Training loss", xlabel="step", ylabel="cross-entropy, nats per token")
    right.set(title="Validation loss", xlabel="step")
    right.legend(title="at the end")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="Picture to write (.png, .svg, .pdf).")
    args = parser.parse_args()
    plot({label: Path(folder) for label, _, folder in (run.partition("=") for run in args.runs)}, args.out)


if __name__ == "__main__":
    main()

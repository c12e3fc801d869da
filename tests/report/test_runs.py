"""Runs: found, named, and what they had as settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_namo.report.runs import by_loss, names, read_runs
from lightning_namo.report.settings import differing, of_optimizer, read_settings, shortened
from tests.report.logged import logged_run, optimizer, write


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["runs/muon/version_0", "runs/namo/version_0"], ["muon", "namo"]),
        (["runs/muon/version_0", "runs/muon/version_1"], ["version_0", "version_1"]),
        (["runs/a/x/version_0", "runs/b/y/version_0", "runs/a/y/version_0"], ["a/x", "b/y", "a/y"]),
        (["runs/a/version_0", "runs/sweep/lr=1/version_0"], ["a", "sweep/lr=1"]),
        (["runs/a", "runs/a/inner"], ["a", "inner"]),
        (["runs/a", "runs/a/a"], ["a", "a/a"]),
        (["runs/quickstart/version_3"], ["quickstart/version_3"]),
        (["sweep/lr=0.1"], ["lr=0.1"]),
    ],
)
def test_a_run_is_named_by_what_tells_it_apart(folders: list[str], expected: list[str]) -> None:
    assert names([Path("/somewhere") / folder for folder in folders]) == expected


def test_runs_are_found_at_and_below_paths_once(tmp_path: Path) -> None:
    for name in ("b/version_0", "a/version_0", "c/version_0"):
        write(tmp_path / name, {"train/loss": {0: 1.0}})
    paths = [str(tmp_path / "b" / "version_0"), str(tmp_path / "a"), str(tmp_path / "b")]
    assert [run.name for run in read_runs(paths)] == ["b", "a"]
    assert [run.name for run in read_runs([str(tmp_path)])] == ["a", "b", "c"]


def test_a_path_without_event_files_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", {"train/loss": {0: 1.0}})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Expected event files .* in or below .*/empty\. Got none"):
        read_runs([str(tmp_path / "a"), str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"Expected a folder of runs\. Got .*nowhere, which is not there"):
        read_runs([str(tmp_path / "nowhere")])


def test_tokens_go_on_in_a_resumed_run_and_count_all_devices(tmp_path: Path) -> None:
    """The monitor of a session counts from 0, per device, and begins to log with its second batch."""
    lengths = {step: 100.0 * (step + 1) for step in range(1, 10, 2)}
    resumed = {step: 100.0 * (step + 1 - 8) for step in range(9, 20, 2)}
    rates = {"train/items_per_sec": {9: 800.0}, "train/device/items_per_sec": {9: 200.0}}
    write(tmp_path, {"train/lengths": lengths, "train/loss": {0: 1.0, 9: 1.0}}, began=1000)
    write(tmp_path, {"train/lengths": resumed, **rates, "train/loss": {20: 1.0}}, began=5000)
    (run,) = read_runs([str(tmp_path)])
    tokens = run.tokens(run.curves["train/loss"].steps)
    assert tokens is not None
    assert tokens.tolist() == [400, 21 * 400]
    assert run.tokens() == [21 * 400]
    assert run.steps == 21
    assert run.seconds == 7 + 11  # up to step 7, and from step 9 on


def test_tokens_that_nobody_counted_are_not_known() -> None:
    assert logged_run("a", {"train/loss": {0: 1.0}}).tokens() is None
    assert logged_run("a", {"train/lengths": {4: 50.0}}).tokens() == [50]


def test_a_run_that_began_elsewhere_counts_the_tokens_of_its_steps() -> None:
    """Resumed into a folder of its own, from a checkpoint after 100 steps."""
    assert logged_run("a", {"train/lengths": {104: 50.0, 109: 100.0, 114: 150.0}}).tokens() == [1150]


def test_runs_are_in_the_order_of_their_last_loss() -> None:
    runs = [
        logged_run("nan", {"val/loss": {1: float("nan")}}),
        logged_run("high", {"val/loss": {1: 1.0, 2: 3.0}, "train/loss": {1: 0.0}}),
        logged_run("none", {}),
        logged_run("low", {"train/loss": {1: 2.0}}),
    ]
    assert [run.name for run in by_loss(runs)] == ["high", "low", "nan", "none"]


def test_config_wins_over_hparams_and_classes_have_short_names(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("lr: 0.5\n")
    assert read_settings(tmp_path) == ({"lr": 0.5}, None)
    callbacks = [{"class_path": "a.b.Stop", "init_args": {"after": 3}}, *2 * [{"class_path": "Other"}]]
    config = {"optim": optimizer(lr=0.1, betas=[0.9, 0.95]), "trainer": {"callbacks": callbacks, "plugins": []}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings, complaint = read_settings(tmp_path)
    assert complaint is None
    assert settings == {
        "optim.optimizer": "NAMOD",
        "optim.optimizer.lr": 0.1,
        "optim.optimizer.betas": [0.9, 0.95],
        "trainer.callbacks.Stop": "Stop",
        "trainer.callbacks.Stop.after": 3,
        "trainer.callbacks.1": "Other",
        "trainer.callbacks.2": "Other",
        "trainer.plugins": [],
    }


@pytest.mark.parametrize("content", ["a: [1", "when: 2026-99-99", "a: \x00", "[" * 2000])
def test_settings_that_cannot_be_read_are_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    settings, complaint = read_settings(tmp_path)
    assert settings == {}
    assert complaint is not None
    assert complaint.startswith("config.yaml: ")


def settings_of(**config: object) -> dict[str, object]:
    return logged_run("", {}, **config).settings


def test_settings_that_differ_are_those_of_values_and_not_of_folders_or_other_classes() -> None:
    namod = settings_of(
        optim=optimizer(lr=0.1, clamp=0.2), trainer={"logger": {"name": "a"}, "devices": 1}, ckpt_path="x"
    )
    muon = settings_of(optim=optimizer("Muon", lr=0.1), trainer={"logger": {"name": "b"}, "devices": 1, "max_steps": 5})
    assert differing([namod, muon]) == ["optim.optimizer", "trainer.max_steps"]
    assert differing([namod, {}]) == []
    stop = {"class_path": "a.Stop", "init_args": {"after": 3}}
    stopping = settings_of(optim=optimizer(lr=0.1, clamp=0.2), trainer={"callbacks": [stop], "devices": 1})
    assert differing([namod, stopping]) == ["trainer.callbacks.Stop"]
    warming, not_warming = settings_of(schedule={"warmup": 0.1, "decay": 0.2}), settings_of(schedule=None)
    assert differing([warming, not_warming]) == ["schedule"]
    assert differing([namod, namod]) == []


def test_keys_are_as_short_as_tells_them_apart() -> None:
    keys = ["optim.optimizer", "optim.optimizer.lr", "model.lr", "data.init.seed"]
    assert list(shortened(keys).values()) == ["optimizer", "optimizer.lr", "model.lr", "seed"]
    assert shortened(["lr", "optim.lr"]) == {"lr": "lr", "optim.lr": "optim.lr"}


def test_of_one_run_the_optimizers_settings_are_shown() -> None:
    assert of_optimizer(settings_of(optim=optimizer(lr=0.1), seed=1)) == ["optim.optimizer", "optim.optimizer.lr"]
    assert of_optimizer({"lr": 1, "_instantiator": "x"}) == ["lr"]


def test_hparams_with_tuples_and_paths_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    path = "!!python/object/apply:pathlib.PosixPath [/, data]"
    harm = f"!!python/object/apply:os.system ['touch {tmp_path}/harm']"
    (tmp_path / "config.yaml").mkdir()
    (tmp_path / "hparams.yaml").write_text(f"betas: !!python/tuple [0.9, 0.95]\nlr: 0.1\ndata: {path}\nharm: {harm}\n")
    settings, complaint = read_settings(tmp_path)
    assert (settings["lr"], settings["betas"], settings["data"]) == (0.1, [0.9, 0.95], ["/", "data"])
    assert complaint is not None
    assert complaint.startswith("config.yaml: ")
    assert not (tmp_path / "harm").exists()


def test_linked_folders_are_followed_once_and_folders_of_a_writer_s_own_left_out(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a", {"train/loss": {0: 1.0}}, lr=0.1)
    write(tmp_path / "real" / "a" / "losses_train", {"losses": {0: 1.0}})  # SummaryWriter.add_scalars
    links = tmp_path / "links"
    links.mkdir()
    (links / "to_a").symlink_to(tmp_path / "real" / "a")
    (links / "back").symlink_to(links)
    assert [run.name for run in read_runs([str(links)])] == ["a"]
    assert [run.name for run in read_runs([str(tmp_path)])] == ["a"]


def test_batches_of_other_lengths_are_counted(tmp_path: Path) -> None:
    total, lengths = 0.0, {}
    for step in range(20):
        total += 10 if step % 2 else 400
        lengths[step] = total
    write(tmp_path, {"train/lengths": {s: lengths[s] for s in range(3, 20, 4)}, "train/loss": {19: 1.0}})
    (run,) = read_runs([str(tmp_path)])
    assert run.tokens() == [total]


def test_a_test_after_training_is_no_step(tmp_path: Path) -> None:
    write(tmp_path, {"train/loss": dict.fromkeys(range(60), 1.0), "test/loss": {60: 1.0}})
    (run,) = read_runs([str(tmp_path)])
    assert (run.steps, run.seconds) == (60, 59.0)

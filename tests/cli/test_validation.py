"""Wrong input to `fit` ends with one clear message before a run starts."""

from __future__ import annotations

import sys

import pytest

from lightning_namo.cli import NamoCLI, main
from tests.helpers.command_line import OWN, QUIET, SMALL, complaint
from tests.helpers.paths import CONFIGS

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")

OURS = "--optim.optimizer=NAMOD"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([OURS, "--optim.optimizer.lr=-1"], "Expected --optim.optimizer.lr to be a finite number >= 0. Got -1.0."),
        ([OURS, "--optim.optimizer.lr=fast"], 'Parser key "lr"'),
        ([OURS, "--optim.optimizer.momentum=1.5"], "Expected --optim.optimizer.momentum to be in [0, 1). Got 1.5."),
        (
            [OURS, "--optim.optimizer.clamp=2"],
            "Expected --optim.optimizer.clamp to be in (0, 1], or None or 0 for none. Got 2.0.",
        ),
        ([OURS, "--optim.optimizer.momentum=0.999"], "expected beta2 to be above momentum^2 = 0.998001"),
        (
            [OURS, "--optim.optimizer.clmp=1"],
            "Expected an option of lightning_namo.NAMOD under optim.optimizer. Got clmp. Nearest: clamp.",
        ),
        (
            ["--optim.optimizer=NAMO", "--optim.optimizer.clamp=0.1"],
            "Expected an option of lightning_namo.NAMO under optim.optimizer. Got clamp.",
        ),
        (
            ["--optim.optimizer=NAMI"],
            "Expected --optim.optimizer to be an optimizer. Got 'NAMI', which does not exist. Nearest: NAMO, NAMOD",
        ),
        (["--optim.optimizer=adamw"], "Got 'adamw', which does not exist. Nearest: AdamW, "),
        (
            ['--config={"optim": {"optimizer": {"class_path": "lightning_namo.NAMI"}}}'],
            "Got 'lightning_namo.NAMI', which does not exist. Nearest: NAMO, NAMOD",
        ),
        (["--optim.optimizer=my_package.Nothing"], 'Parser key "optim.optimizer"'),
        (["--optim.optimizer=torch.optim.AdamW", "--optim.optimizer.lr=-1"], "Invalid learning rate: -1"),
        (
            ["--optim.schedule.warmup=-1"],
            "Expected warmup to be steps (a whole number) or a share in [0, 1] but got -1",
        ),
        (["--optim.schedule.warmup=1.5"], "a share in [0, 1] but got 1.5"),
        (["--optim.schedule.warm=3"], "WarmupStableDecay under optim.schedule. Got warm. Nearest: warmup."),
        (["--model.n_layr=3"], "GPT2Module under model. Got n_layr. Nearest: n_layer."),
        (["--data.blok_size=3"], "TextDataModule under data. Got blok_size. Nearest: block_size, "),
        (["--optim.adamw=*.nothing"], "Expected '*.nothing' in adamw to match a parameter"),
        (
            ["--optim.schedule.warmup=9", "--trainer.max_steps=5", "--optim.schedule.decay=0.1"],
            "Expected a run of at least",
        ),
        (["--optimizer", "AdamW"], "Expected the optimizer under --optim.optimizer"),
        (["--optimizer.lr=0.1"], "Got --optimizer.lr=0.1"),
        (["--lr_scheduler=StepLR"], "its schedule under --optim.schedule"),
        (
            ['--config={"optimizer": {"class_path": "torch.optim.AdamW"}}'],
            "Expected the optimizer under --optim.optimizer",
        ),
        (['--config={"optim": {"optimiser": "NAMO"}}'], "optim.optimiser"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--trainer.max_step=3"], "unrecognized arguments: --trainer.max_step=3. Nearest: --trainer.max_steps, "),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--model.n_embd=0"], "Expected n_embd of at least 1. Got 0."),
        (["--model.n_head=5"], "Expected n_embd to be a multiple of n_head. Got 12 and 5."),
        (["--model=Unknown"], "Unknown"),
        (["--optim.optimizer={class_path: NAMO"], "optim.optimizer"),
        (["--optim.optimizer"], "expected one argument"),
        (["--data.data_dir=nowhere"], "Expected nowhere/meta.json"),
        (
            ["--data.data_dir=nowhere", "--data.vocab_size=9"],
            "Expected token ids in nowhere/train.bin",
        ),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--data.global_batch_size=40"], "batch_size 16 x 1 data-parallel ranks. Got 16 sequences at a time"),
        (
            [f"--config={CONFIGS / 'strategy' / 'fsdp2_tp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=3"],
            "to be the number of processes (devices * num_nodes). Got 3 processes.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.slow  # test_yaml_fuzz.py has fast ones
def test_wrong_input_to_fit_is_one_clear_message(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capsys, "fit", *QUIET, *SMALL, *options)


def test_loaders_of_a_module_do_not_give_way_to_the_recipes_text(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, "fit", *QUIET, OWN[0], "--trainer.max_steps=1")
    assert message.startswith("Expected one source of training data, but Toy has a train_dataloader and --data is")


@pytest.mark.parametrize(
    "layers",
    [[], ["optim/muon"], ["scale/one_node", "optim/muon"], ["strategy/hsdp"], ["telemetry/spectra", "scale/laptop"]],
)
def test_fit_trains_nothing_that_was_not_named(layers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "fit", *(f"--config={layer}" for layer in layers))
    assert said.startswith("Expected a recipe or a model to train, as --config quickstart or --model ")


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps=0"],
        ["--model.n_layer=2"],
        [*OWN],
        ["--data.data_dir=x"],
        ["--config=quickstart"],
    ],
)
def test_fit_trains_what_was_named(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NamoCLI, "instantiate_classes", lambda cli: sys.exit(0))
    monkeypatch.setattr("lightning_namo.cli.lightning_cli._follow_data", lambda model, data: None)  # there is none
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("command", "nearest"), [("repor", "report, export, prepare"), ("prepar", "prepare, report"), ("fitt", "fit")]
)
def test_a_misspelt_command_is_told_the_nearest(command: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, command) == f"Expected a command. Got {command}. Nearest: {nearest}.\n"


def test_the_commands_without_a_trainer_are_told_the_nearest_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nearest: --prompt." in complaint(capsys, "generate", "x.ckpt", "--promt=x")
    said = complaint(capsys, "plan", "--ranks=2", "--config=quickstart", "--optim.optimizer.clmp=1")
    assert said == "Expected an option of lightning_namo.NAMOD under optim.optimizer. Got clmp. Nearest: clamp.\n"


def test_errors_end_with_a_tip_that_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "plan"):
        with pytest.raises(SystemExit):
            main([command, "--nothing=1"])
        assert f"run: lightning-namo {command} --help" in capsys.readouterr().err

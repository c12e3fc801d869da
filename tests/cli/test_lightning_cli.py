"""The command line: layers of configs, what it builds from them, and what it says to wrong input."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import Namespace

import lightning_namo
from lightning_namo import OptimizerCallback, WarmupStableDecay, split_parameters
from lightning_namo.cli import main
from lightning_namo.cli.lightning_cli import _follow_root
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.module import GPT2Module
from tests.helpers.command_line import OWN, QUICKSTART, SMALL, Toy
from tests.helpers.paths import CONFIGS, ROOT

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")

Fit = Callable[..., Any]

PAGES = {  # with commands, and how many of these a test can run
    "README.md": 3,
    "docs/quickstart.md": 5,
    "docs/command_line.md": 7,
    "docs/optimizers.md": 2,
    "docs/gpt2.md": 3,
}


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Parse and build as `lightning-namo fit` does, and return the Trainer in place of running it."""
    calls = []

    @functools.wraps(pl.Trainer.fit)  # the command line reads the signature
    def record(trainer: pl.Trainer, model: Any, **kwargs: Any) -> None:
        calls.append((trainer, model, kwargs["datamodule"]))

    monkeypatch.setattr(pl.Trainer, "fit", record)

    def fit(*options: str) -> Any:
        main(["fit", "--trainer.max_steps=1", *options])  # without a limit a default GPT-2 is refused
        return calls.pop()

    return fit


def callback_of(trainer: pl.Trainer) -> OptimizerCallback:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, OptimizerCallback))
    return callback


def group_of(trainer: pl.Trainer) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and the hyper-parameters of its matrices."""
    optimizer = callback_of(trainer).optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    return type(optimizer), optimizer.param_groups[0]


def test_help_of_fit_explains_the_optimizer_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = capsys.readouterr().out
    assert "--optim.optimizer" in out
    assert "Globs over parameter names that take AdamW" in out
    assert " --optimizer" not in out


def test_help_of_an_optimizer_lists_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--optim.optimizer.help=lightning_namo.NAMOD"])
    out = capsys.readouterr().out
    assert "c in (0, 1]: 1 scales all columns alike" in out
    assert "--optim.optimizer.params" not in out


def test_a_printed_config_gives_itself_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = []
    for options in ([QUICKSTART, "--optim.optimizer.lr=0.02"], [f"--config={tmp_path / 'printed.yaml'}"]):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *options, "--print_config"])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    config = yaml.safe_load(printed[0])
    assert config["optim"]["optimizer"]["class_path"] == "lightning_namo.NAMOD"
    assert config["optim"]["optimizer"]["init_args"]["lr"] == 0.02
    assert config["trainer"]["gradient_clip_val"] == 1.0


RECIPES = {
    # ALGORITHMS: the learning rates published for GPT-2 small; momentum and decays are the official code's.
    "adamw": ("AdamW", {"lr": 0.0013, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "muon": ("Muon", {"lr": 0.0013, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1}),
    "adamuon": ("AdaMuon", {"lr": 0.001, "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.1}),
    "namo": ("NAMO", {"lr": 0.012, "momentum": 0.95, "beta2": 0.99, "weight_decay": 0.1, "decay": "adaptive"}),
    "namo_d": ("NAMOD", {"lr": 0.009, "clamp": 0.1, "momentum": 0.95, "beta2": 0.99, "weight_decay": 0.1}),
    "separate_adamw_lr": ("NAMOD", {"lr": 0.009, "clamp": 0.1}),  # the quickstart's; test_configs.py has the rest
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "optim").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_optimizer_config_layers_over_the_quickstart(fit: Fit, path: Path) -> None:
    trainer, model, data = fit(QUICKSTART, f"--config={path}")
    name, expected = RECIPES[path.stem]
    cls, group = group_of(trainer)
    assert cls is (torch.optim.AdamW if name == "AdamW" else getattr(lightning_namo, name))
    assert {key: group[key] for key in expected} == expected
    assert callback_of(trainer).schedule == WarmupStableDecay(warmup=0.05, decay=0.3)
    assert (model.config.n_layer, model.config.vocab_size, model.config.block_size) == (4, 4096, 128)
    assert (data.batch_size, trainer.gradient_clip_val) == (16, 1.0)


def test_every_optimizer_has_a_config() -> None:
    assert {path.stem for path in (CONFIGS / "optim").glob("*.yaml")} == set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--optim.optimizer", "AdaMuon", "--optim.optimizer.eps", "1e-6"],
        ["--optim.optimizer=AdaMuon", "--optim.optimizer.init_args.eps=1e-6"],
        ["--optim.optimizer=lightning_namo.AdaMuon", "--optim.optimizer.eps=1e-6"],
        ['--config={"optim": {"optimizer": {"class_path": "AdaMuon", "init_args": {"eps": 1e-6}}}}'],
        ["--optim.optimizer={class_path: AdaMuon, init_args: {eps: 1e-6}}"],
        ["--optim=only_optim.yaml"],
    ],
)
@pytest.mark.parametrize("below", [[], [QUICKSTART, "--optim.optimizer.beta2=0.98"]], ids=["default", "quickstart"])
def test_another_optimizer_starts_from_its_own_defaults(
    fit: Fit, below: list[str], options: list[str], tmp_path: Path
) -> None:
    section = {"optimizer": {"class_path": "lightning_namo.AdaMuon", "init_args": {"eps": 1e-6}}}
    (tmp_path / "only_optim.yaml").write_text(yaml.safe_dump(section))
    cls, group = group_of(fit(*below, *options)[0])
    assert cls is lightning_namo.AdaMuon
    assert (group["lr"], group["beta2"], group["eps"]) == (0.001, 0.95, 1e-6)


def test_muon_is_ours_and_not_torch_s(fit: Fit) -> None:
    assert group_of(fit("--optim.optimizer", "Muon", "--optim.optimizer.lr", "0.002")[0])[0] is lightning_namo.Muon


def test_the_same_optimizer_keeps_what_lower_layers_say(fit: Fit) -> None:
    _, group = group_of(fit(QUICKSTART, "--optim.optimizer=NAMOD", "--optim.optimizer.momentum=0.9")[0])
    assert (group["lr"], group["momentum"]) == (0.009, 0.9)


def test_the_rest_of_the_optimizer_section_reaches_the_callback(fit: Fit) -> None:
    options = ["--optim.adamw+=*.wte.weight", "--optim.adamw+=*.c_fc.weight", '--optim.blocks={"*.c_attn.weight": 3}']
    callback = callback_of(fit(*options, "--optim.schedule.warmup=10", "--optim.schedule.decay=0.5")[0])
    assert list(callback.adamw) == ["*.wte.weight", "*.c_fc.weight"]
    assert callback.blocks == {"*.c_attn.weight": 3}
    assert callback.schedule == WarmupStableDecay(warmup=10, decay=0.5)


class Experts(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.tensor = (torch.nn.Parameter(torch.zeros(4, 3, 2)) for _ in range(2))


def test_globs_of_batches_decide_how_parameters_are_split(fit: Fit) -> None:
    options = ["--optim.batched=experts", '--optim.transposed=["exp*"]', "--optim.matrix+=tensor"]
    trainer, model, _ = fit(f"--model={__name__}.Experts", OWN[1], *options)
    groups = {group["name"]: group for group in split_parameters(model, **callback_of(trainer).routing)}
    assert [name for name, _ in groups["matrices_batched_transposed"]["params"]] == ["experts"]
    assert [name for name, _ in groups["matrices"]["params"]] == ["tensor"]


def test_a_scheduler_of_torch_can_be_the_schedule(fit: Fit) -> None:
    options = ["--optim.schedule=torch.optim.lr_scheduler.StepLR", "--optim.schedule.step_size=7"]
    schedule = callback_of(fit(*options)[0]).schedule
    assert schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0)).step_size == 7


# ---------------------------------------------------------------------- model and data


def test_a_module_of_the_user_s_own_takes_the_model_s_place(fit: Fit) -> None:
    options = [*OWN, "--model.width=6"]
    trainer, model, _ = fit(*options, "--optim.optimizer=NAMOD")
    assert isinstance(model, Toy)
    assert (model.layer.in_features, model.vocab_size) == (6, 7)
    assert group_of(trainer)[0] is lightning_namo.NAMOD


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ([], (4096, 256)),
        (["--data.block_size=64"], (4096, 64)),
        (["--model.vocab_size=5000", "--model.block_size=512"], (5000, 512)),
        (["--data.data_dir=elsewhere", "--data.vocab_size=50257"], (50304, 256)),
    ],
)
def test_a_gpt2_follows_its_data_unless_told_otherwise(fit: Fit, options: list[str], sizes: tuple[int, int]) -> None:
    _, model, data = fit(*SMALL, *options)
    assert isinstance(model, GPT2Module)
    assert isinstance(data, TextDataModule)
    assert (model.config.vocab_size, model.config.block_size) == sizes


def test_runs_are_seeded_unless_told_otherwise(fit: Fit) -> None:
    draws = []
    for seed in ([], [], ["--seed_everything=1"]):
        fit(*SMALL, *seed)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[1] != draws[2]


def test_a_second_run_in_the_same_folder_overwrites_the_saved_config(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One nation, and one text. " * 400)
    main(["prepare", '--inputs=["text.txt"]', "--out_dir=tokens", "--vocab_size=300"])
    sizes = [
        "--data.data_dir=tokens",
        "--data.block_size=16",
        "--model.n_layer=1",
        "--model.n_head=1",
        "--model.n_embd=8",
    ]
    logger = '{"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "logs", "version": "same"}}'
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
    for lr in (0.01, 0.02):
        options = ["--trainer.max_steps=1", f"--trainer.logger={logger}", f"--optim.optimizer.lr={lr}"]
        main(["fit", *sizes, *quiet, *options])
    saved = yaml.safe_load((tmp_path / "logs" / "same" / "config.yaml").read_text())
    assert saved["optim"]["optimizer"]["init_args"]["lr"] == 0.02
    assert saved["model"]["init_args"]["vocab_size"] == 320  # 300, rounded up to a multiple of 64


def test_numbers_reach_the_optimizer_and_the_data_as_plain_numbers(fit: Fit) -> None:
    trainer, model, data = fit(QUICKSTART, *SMALL, "--data.seed=3", "--optim.optimizer.eps=0")
    _, group = group_of(trainer)
    values = [*group.values(), *vars(model.config).values(), *vars(data).values()]
    numbers = [value for value in values if isinstance(value, int | float)]
    assert len(numbers) > 15
    assert {type(number) for number in numbers} <= {int, float, bool}  # a checkpoint with others cannot be loaded


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_of(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the Python of a page defines; it prints what the page says."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # for pickles of its classes
    names, printed = vars(module), io.StringIO()
    blocks = re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    assert blocks
    assert not printed.getvalue() or f"```text\n{printed.getvalue()}```" in text_of(page)
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_python_of_the_first_pages_runs_as_written(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = python_of(page, monkeypatch)
    batch = (torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    before = names["model"][0].weight.clone()
    names["model"](torch.ones(2, 8)).sum().backward()
    names["optimizer"].step()
    assert not torch.equal(before, names["model"][0].weight)
    module = names["LitModel"]()
    module.training_step(batch, 0).backward()
    if page == "README.md":
        assert isinstance(module.configure_optimizers(), lightning_namo.NAMOD)


@pytest.mark.parametrize("page", ["docs/routing.md", "docs/clipping.md"])
def test_the_python_of_a_page_runs_as_written(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python_of(page, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "count"), PAGES.items())
def test_the_commands_of_a_page_parse(
    page: str, count: int, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_text.txt").write_text("Some text of one's own. " * 2000)
    (tmp_path / "configs").symlink_to(CONFIGS)
    commands = re.findall(r"^(?:.*&& )?lightning-namo (.*?)(?: +#.*)?$", text_of(page), flags=re.MULTILINE)
    # Not here: what needs the network, GPUs, a checkpoint, runs or several processes; other tests have those.
    elsewhere = re.compile(
        r"prepare openwebtext|report runs|fit --config gpt2_|fit .*data/mine|fit .*strategy/|\w+ CKPT"
    )
    runnable = [command for command in commands if not elsewhere.match(command)]
    assert len(runnable) == count
    for command in runnable:
        code: object = 0
        try:
            main(command.split())
        except SystemExit as stop:  # of --print_config and help
            code = stop.code
        assert code == 0, command


@pytest.mark.parametrize(
    ("root", "folder", "expected"),
    [
        ("elsewhere", "runs", "{here}/elsewhere/runs"),
        ("s3://bucket/x", "runs", "s3://bucket/x/runs"),
        ("elsewhere", "/logs", "/logs"),
        ("elsewhere", "s3://bucket/runs", "s3://bucket/runs"),
        (None, "runs", "runs"),
    ],
)
def test_default_root_dir_moves_the_runs(
    root: str | None, folder: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = Namespace(class_path="TensorBoardLogger", init_args=Namespace(save_dir=folder))
    trainer = Namespace(default_root_dir=root, logger=[logger, True])
    _follow_root(trainer)
    assert logger.init_args.save_dir == expected.format(here=tmp_path)
    _follow_root(trainer)  # a run's own config.yaml, used again
    assert logger.init_args.save_dir == expected.format(here=tmp_path)


def test_the_quickstart_runs_where_default_root_dir_says(fit: Fit, tmp_path: Path) -> None:
    trainer, *_ = fit(QUICKSTART, "--trainer.default_root_dir=elsewhere")
    assert trainer.logger.save_dir == str(tmp_path / "elsewhere" / "runs")

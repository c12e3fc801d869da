"""Wrong configs and checkpoints end the command line with one message and exit code 2, before a run or a file.

Lightning's training loop is replaced here, to see where a run would begin: that is the only mock. All before it
(parser, constructors, Trainer, routing, configure_optimizers, the loggers' files) is real. For speed the parsers of
other subcommands are left out.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loops.fit_loop import _FitLoop

import lightning_namo
from lightning_namo.cli import NamoCLI, main
from lightning_namo.cli.validation import check_checkpoint
from tests.helpers.rules import BUILT_IN

pytestmark = pytest.mark.usefixtures("kept_parsers")

OPTIMIZERS = [cls.__name__ for cls in BUILT_IN]
MODEL = (f"--model={__name__}.Tiny", f"--data={__name__}.Nothing")
GPT2 = ("--model.n_layer=1", "--model.n_embd=12", "--model.n_head=2")
OPTIONS = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_steps=9",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=logs",
)
CONFIG = "config.yaml"
FIT = NamoCLI.subcommands()["fit"]


class Tiny(pl.LightningModule):
    """Two matrices, one of them fused of three, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.out = torch.nn.Linear(12, 4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the training loop is replaced")

    def train_dataloader(self) -> list[int]:
        return [0]


class Nothing(pl.LightningDataModule):
    """The data are the module's own."""

    def train_dataloader(self) -> list[int]:
        return [0]


class CommandLine:
    """Runs command lines in a folder; says whether training would have begun, and whether files were made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun: list[pl.Trainer] = []

    def run(self, config: str | bytes | None, *options: str, model: tuple[str, ...] = MODEL) -> pl.Trainer:
        """Fit up to where training begins; gives the trainer."""
        self._write(config)
        self.begun.clear()
        given = () if config is None else (f"--config={CONFIG}",)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NamoCLI, "subcommands", staticmethod(lambda: {"fit": FIT}))
            main(["fit", *OPTIONS, *model, *given, *options])
        for path in self._files() - {CONFIG}:
            shutil.rmtree(path)
        (trainer,) = self.begun
        return trainer

    def refused(self, config: str | bytes | None, *options: str, model: tuple[str, ...] = MODEL) -> str:
        """A command line that must be refused; gives what it said."""
        self._write(config)
        before = self._files()
        error = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
            self.run(config, *options, model=model)
        assert stop.value.code == 2
        assert not self.begun
        assert self._files() == before
        message = error.getvalue()
        assert "Traceback" not in message
        assert message.count("error: ") == 1
        said = message.partition("error: ")[2].strip()
        assert len(said) > 10
        return said

    def _write(self, config: str | bytes | None) -> None:
        if config is not None:
            text = config if isinstance(config, bytes) else config.encode("utf-8", "surrogatepass")
            Path(CONFIG).write_bytes(text)

    def _files(self) -> set[str]:
        return set(os.listdir(self.folder))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(command_line.folder):
        patch.setattr(_FitLoop, "run", lambda loop: command_line.begun.append(loop.trainer))
        yield command_line


def optimizer_config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"optim": {"optimizer": {"class_path": f"lightning_namo.{name}", "init_args": arguments}}}


# --- every option of every optimizer ---------------------------------------------------------------

NO_NUMBER = ["xyz", [0.1], {"a": 1}, True, math.nan, math.inf, -math.inf, 10**400, "0.1.2", b"\xff", [], "", [[]]]
NO_RATE = [*NO_NUMBER, -1, -1e-9, None]
NO_UNIT = [*NO_RATE, 1, 1.5, 7]
NO_BETAS = [0.9, [0.9], [0.9, 0.9, 0.9], [0.9, 1], [math.nan, 0], "ab", None, {}, [[], []]]
RATES = st.floats(0, 10)
UNITS = st.floats(0, 0.5) | st.just(0)
VALUES_OF: dict[str, tuple[list[Any], st.SearchStrategy[Any]]] = {  # option: wrong values, right ones
    "lr": (NO_RATE, RATES),
    "weight_decay": (NO_RATE, RATES),
    "momentum": (NO_UNIT, UNITS),
    "beta2": (NO_UNIT, st.just(0.9)),  # above the square of any momentum here
    "eps": (NO_RATE, RATES),
    "nesterov": ([0, 1, "xyz", [], {}, None, 0.5, [True], math.nan], st.booleans()),
    "ns_steps": ([*(value for value in NO_RATE if value != 10**400), 0, 2.5, 1e-3], st.integers(1, 9)),
    "ns_coefficients": (
        ["xyz", 3, [], [1, 2], [1, 2, "a"], [[1, 2, 3]] * 9, {"a": 1}, [math.nan] * 3, None, True, [None]],
        st.sampled_from(["quintic", "polar_express", [3.0, -4, 2.0]]),
    ),
    "orthogonalizer": (["qr", 0, [], ["svd"], None, {}, True], st.sampled_from(["newton_schulz", "svd"])),
    "momentum_dtype": (
        ["float16", "xyz", 0, [], {}, True],
        st.sampled_from(["float32", "bfloat16", None]),
    ),
    "shape_scale": ([*NO_NUMBER, 0, -1], st.floats(1e-3, 10) | st.none()),
    "max_step": ([*NO_NUMBER, 0, -1], st.floats(1e-3, 10) | st.none()),
    "clamp": ([*NO_NUMBER, -0.1, 1.0001], st.floats(0, 1) | st.none()),
    "decay": (["xyz", 0, [], None, "LR", {}, True], st.sampled_from(["adaptive", "lr"])),
    "order": (["xyz", 0, [], None, "PRE", {}, True], st.sampled_from(["pre", "none", "post"])),
    "adamw_lr": ([*NO_NUMBER, -1], RATES | st.none()),
    "adamw_betas": (NO_BETAS, st.lists(st.floats(0, 0.99), min_size=2, max_size=2)),
    "adamw_eps": (NO_RATE, RATES),
    "adamw_weight_decay": (NO_RATE, RATES),
}


def options_of(name: str) -> list[str]:
    """An optimizer's arguments."""
    return [option for option in inspect.signature(getattr(lightning_namo, name)).parameters if option != "params"]


CASES = [(name, option) for name in OPTIMIZERS for option in options_of(name)]


def test_every_option_has_wrong_and_right_values() -> None:
    assert {option for _, option in CASES} == set(VALUES_OF)


fuzz = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


VALUES = [(option, value) for option, (wrong, _) in VALUES_OF.items() for value in wrong]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(VALUES)), ids=[f"{option}-{value!r:.40}" for option, value in VALUES])
def test_a_wrong_value_is_refused(line: CommandLine, number: int) -> None:
    """Each by one of the optimizers that have the option: all of them take their turn."""
    option, value = VALUES[number]
    having = [name for name in OPTIMIZERS if option in options_of(name)]
    said = line.refused(yaml.safe_dump(optimizer_config(having[number % len(having)], {option: value})))
    assert option in said or said == "int too large to convert to float"


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=1, max_size=3) | st.dictionaries(st.text("xqz", min_size=1), values, min_size=1)


@pytest.mark.slow
@settings(fuzz, max_examples=40)
@given(
    case=st.sampled_from(CASES),
    value=st.recursive(st.text("xqz ", min_size=1) | st.dates() | st.binary(min_size=1), nested, max_leaves=6),
)
def test_a_value_of_nested_junk_is_refused(line: CommandLine, case: tuple[str, str], value: Any) -> None:
    name, option = case
    line.refused(yaml.safe_dump(optimizer_config(name, {option: value})))


@pytest.mark.slow
@settings(fuzz, max_examples=8)
@given(data=st.data(), name=st.sampled_from(OPTIMIZERS))
def test_right_values_reach_the_optimizer(line: CommandLine, data: st.DataObject, name: str) -> None:
    wanted = {option: data.draw(VALUES_OF[option][1]) for option in options_of(name)}
    trainer = line.run(yaml.safe_dump(optimizer_config(name, wanted)))
    matrices, adamw = trainer.optimizers[0].param_groups
    assert type(trainer.optimizers[0]).__name__ == name
    for option, value in wanted.items():
        if option == "adamw_betas":
            assert [adamw["momentum"], adamw["beta2"]] == value
        elif option == "adamw_lr":
            assert adamw["lr"] == (wanted["lr"] if value is None else value)
        elif option.startswith("adamw_"):
            assert adamw[option.removeprefix("adamw_")] == value
        elif not isinstance(value, list):
            fixed = type(trainer.optimizers[0]).fixed  # a group leaves out what its absence means
            assert (matrices[option] if option in matrices else fixed[option]) == value


@pytest.mark.slow
@settings(fuzz, max_examples=8)
@given(name=st.sampled_from(OPTIMIZERS), key=st.text("abcdlmotwyr_2. -", max_size=12), at=st.sampled_from("123"))
@example(name="NAMO", key="learning_rate", at="1")
@example(name="NAMO", key="clamp", at="1")  # NAMO-D's
@example(name="Muon", key="x" * 100_000, at="1")
def test_a_misspelt_key_is_refused(line: CommandLine, name: str, key: str, at: str) -> None:
    optim: dict[str, Any] = optimizer_config(name, {})["optim"]
    config = {"1": optim["optimizer"]["init_args"], "2": optim["optimizer"], "3": optim}[at]
    assume(key not in {*options_of(name), *config, "schedule", "adamw", "orthogonalize", "blocks", "adopt_state"})
    config[key] = 0.1
    line.refused(yaml.safe_dump({"optim": optim}))


# --- the sections around them ----------------------------------------------------------------------

SCHEDULE = "lightning_namo.WarmupStableDecay"
WRONG_SECTIONS: list[tuple[str, str]] = [  # a section, and a part of what is said
    # the optimizer
    ("optimizer: null", "--optim.optimizer to have a value"),
    ("optimizer: [NAMO]", "subclass spec"),
    ("optimizer: 3", "subclass spec"),
    ("optimizer: ''", "import path"),
    ("optimizer: NAMI", "NAMI"),
    ("optimizer: lightning_namo.NAMI", "NAMI"),
    ("optimizer: lightning_namo.OptimizerCallback", "OptimizerCallback"),
    ("optimizer: torch.nn.Linear", "torch.nn.Linear"),
    ("optimizer: builtins.print", "print"),
    ("optimizer: os.system", "os.system"),
    ("optimizer: lightning_namo.split_parameters", "split_parameters"),
    ("optimizer: torch.optim.Optimizer", "defaults"),
    ("optimizer: lightning_namo.OrthogonalizedOptimizer", "defaults"),
    ("optimizer: {class_path: null}", "optim.optimizer"),
    ("optimizer: {class_path: [NAMO]}", "optim.optimizer"),
    ("optimizer: {class_path: 'lightning_namo.NAMO '}", "does not exist"),
    ("optimizer: {class_path: ../namo}", "import path"),
    (f"optimizer: {{class_path: {'a' * 50_000}}}", "does not exist"),
    ("optimizer: {class_path: lightning_namo.NAMO, init_args: null}", "optim.optimizer"),
    ("optimizer: {class_path: lightning_namo.NAMO, init_args: []}", "optim.optimizer"),
    ("optimizer: {class_path: lightning_namo.NAMO, init_args: {params: []}}", "params"),
    ("optimizer: {class_path: lightning_namo.NAMO, dict_kwargs: {rate: 3}}", "rate"),
    ("optimizer: {class_path: lightning_namo.NAMO, initargs: {}}", "not accepted"),
    (f"optimizer: {{class_path: lightning_namo.NAMO, init_args: {{ns_steps: {10**40}}}}}", "to make an optimizer"),
    ("optimizer: {optimizer: {optimizer: NAMO}}", "optimizer.optimizer"),
    ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: .nan}}", "Invalid learning rate: nan"),
    ("optimizer: {class_path: torch.optim.AdamW, init_args: {lr: .inf}}", "finite numbers. Got lr=inf"),
    ("optimizer: {class_path: torch.optim.AdamW, init_args: {betas: [2, 3]}}", "Invalid beta parameter"),
    ("optimizer: {class_path: torch.optim.AdamW, init_args: {betas: null}}", "betas to have a value"),
    (
        "optimizer: {class_path: torch.optim.AdamW, init_args: {fused: true, foreach: true}}",
        "cannot be `True` together",
    ),
    ("optimizer: torch.optim.LBFGS", "parameter groups"),
    # the schedule
    ("schedule: 3", "optim.schedule"),
    ("schedule: []", "optim.schedule"),
    ("schedule: {warmup: -1}", "warmup to be steps"),
    ("schedule: {warmup: .nan}", "warmup to be steps"),
    ("schedule: {warmup: .inf}", "warmup to be steps"),
    ("schedule: {warmup: null}", "warmup to have a value"),
    ("schedule: {decay: 1.5}", "decay to be steps"),
    ("schedule: {decay: true}", "optim.schedule"),
    ("schedule: {floor: .nan}", "floor to be in [0, 1]"),
    ("schedule: {total_steps: 0}", "total_steps to be at least 1"),
    ("schedule: {total_steps: 1.5}", "optim.schedule"),
    ("schedule: {shape: round}", "optim.schedule"),
    ("schedule: {warm: 1}", "warm"),
    (f"schedule: {{class_path: {SCHEDULE}, init_args: {{warmup: 4, decay: 4, total_steps: 5}}}}", "a run of at least"),
    (f"schedule: {{class_path: {SCHEDULE}, init_args: {{floor: null}}}}", "floor to have a value"),
    ("schedule: lightning_namo.NAMO", "optim.schedule"),
    ("schedule: torch.optim.lr_scheduler.StepLR", "optim.schedule"),
    ("schedule: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: a}}", "optim.schedule"),
    # the routing
    ("adamw: null", "--optim.adamw to have a value"),
    ("adamw: 3", "optim.adamw"),
    ("adamw: [3]", "optim.adamw"),
    ("adamw: {out.weight: 1}", "optim.adamw"),
    ("adamw: [[out.weight]]", "optim.adamw"),
    ("adamw: nothing", "'nothing' in adamw to match"),
    ("adamw: ''", "'' in adamw to match"),
    ("adamw: '*'", "a trainable matrix to orthogonalize in Tiny"),
    ("orthogonalize: true", "optim.orthogonalize"),
    ("orthogonalize: norm.weight", "two or more dimensions"),
    ("{adamw: out.*, orthogonalize: out.weight}", "one glob to decide"),
    ("blocks: 3", "optim.blocks"),
    ("blocks: [qkv.weight]", "optim.blocks"),
    ("blocks: {3: 3}", "globs over parameter names. Got 3"),
    ("blocks: {nothing: 3}", "'nothing' in blocks to match"),
    ("blocks: {norm.weight: 3}", "norm.weight takes AdamW"),
    ("adopt_state: 3", "optim.adopt_state"),
    ("adopt_state: null", "--optim.adopt_state to have a value"),
    (
        "{adopt_state: true, optimizer: torch.optim.AdamW}",
        "adopt_state=True with a subclass",
    ),
    *(
        (f"blocks: {{qkv.weight: {blocks}}}", "blocks")
        for blocks in (0, -3, 5, 2.5, "true", "[]", "[6, 5]", "[24, -12]")
    ),
    *((junk, "optim") for junk in ("null", "[]", "3", "NAMO", "''", "[{}]", "!!set {a}", "2024-01-01")),
    ("optimiser: NAMO", "optim.optimiser"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("section", "message"), WRONG_SECTIONS, ids=lambda text: text[:60])
def test_a_wrong_section_is_refused(line: CommandLine, section: str, message: str) -> None:
    assert message in line.refused("optim:\n  " + section)


RIGHT_SECTIONS = [
    "{}",
    "schedule: null",
    "schedule: {}",
    "schedule: {warmup: 2, decay: 0.5}",
    "{optimizer: NAMO, adopt_state: yes}",
    "{adamw: [], orthogonalize: [], blocks: {}}",
    "{adamw: out.weight, blocks: {qkv.weight: [3, 9]}}",
    "{blocks: null, optimizer: {class_path: torch.optim.AdamW, init_args: {foreach: null, lr: 1e-3}}}",
    "optimizer: {class_path: lightning_namo.NAMOD, init_args: {lr: &rate 0.1, adamw_lr: *rate, shape_scale: null}}",
    "schedule: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}",
]


@pytest.mark.parametrize("section", RIGHT_SECTIONS)
def test_a_right_section_reaches_the_run(line: CommandLine, section: str) -> None:
    assert len(line.run("optim:\n  " + section).optimizers) == 1


def test_a_gpt2_is_routed_before_its_run(line: CommandLine) -> None:
    said = line.refused("optim: {adamw: '*.nothing'}", model=GPT2)
    assert "Expected '*.nothing' in adamw to match a parameter" in said
    assert "orthogonalize in GPT2Module" in line.refused("optim: {adamw: '*'}", model=GPT2)


# --- files that are no configs ---------------------------------------------------------------------

NO_CONFIGS: list[tuple[str | bytes, str]] = [
    ("", "Got an empty file"),
    ("# nothing but a comment", "Got an empty file"),
    ("null", "to be a mapping of sections"),
    ("[]", "to be a mapping of sections"),
    ("3", "to be a mapping of sections"),
    ("a text", "to be a mapping of sections"),
    ("--- {optim: {}}\n--- {optim: {}}", "single document"),
    ("optim: {", "config.yaml"),
    ("optim:\n\tadamw: []", "cannot start any token"),
    ("optim: *anchor", "undefined alias"),
    ("optim: {}\ntrainer: {}\noptim: {adamw: out.weight}", "Got 'optim' 2 times in the mapping that begins in line 1"),
    ("optim:\n  adamw: []\n  adamw: out.weight", "Got 'adamw' 2 times in the mapping that begins in line 2"),
    ("%YAML 9.9\n---\noptim: {}", "incompatible YAML"),
    ("? {a: b}\n: c", "unhashable key"),
    ("1: 2", "must be a string"),
    ("optim: !!python/name:os.system", "could not determine a constructor"),
    ("optim: {optimizer: !!python/object/apply:os.system [ls]}", "could not determine a constructor"),
    (b"\xff\xfe\x00", "to be a text in UTF-8"),
    (b"optim: '\xff'", "to be a text in UTF-8"),
    ("optim: {}".encode("utf-16"), "to be a text in UTF-8"),
    ("optim: \0", "control characters"),
    ("a: " + "[" * 3000 + "]" * 3000, "nested less deeply"),
    ("optim: " + "{a: " * 50 + "1" + "}" * 50, "optim.a.a"),
    ("optim: {optimizer: {class_path: lightning_namo.NAMO, init_args: {lr: " + "9" * 5000 + "}}}", "digits"),
    ("optimizer: NAMO", "Expected the optimizer under --optim.optimizer"),
    ("config: config.yaml", "loop"),
    ("trainer: 3", "Expected options under trainer:. Got 3"),
    ("trainer: null", "Expected options under trainer:. Got None"),
    ("model: null", "model"),
    ("data: 3", "data"),
    ("nonsense: 1", "nonsense"),
]


@pytest.mark.parametrize(("config", "message"), NO_CONFIGS, ids=[repr(config)[:50] for config, _ in NO_CONFIGS])
def test_what_is_no_config_is_refused(line: CommandLine, config: str | bytes, message: str) -> None:
    assert message.replace("config.yaml", "") in line.refused(config).replace("config.yaml", "")


def parsed(text: str | bytes) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None


@pytest.mark.slow
@settings(fuzz, max_examples=16)
@given(junk=st.binary(max_size=40) | st.text("optim:-{}[]&*!|>'\"%@`#\t\n ,?a1~=<", max_size=40) | st.text(max_size=40))
def test_junk_is_refused(line: CommandLine, junk: str | bytes) -> None:
    assume(parsed(junk) != {})  # an empty mapping is a config
    line.refused(junk)


@pytest.mark.slow
@settings(fuzz, max_examples=10)
@given(data=st.data(), cut=st.integers(1, 400))
def test_a_config_with_a_piece_cut_out_is_refused_or_another_config(
    line: CommandLine, data: st.DataObject, cut: int
) -> None:
    """Whatever is left, there is no traceback: it is refused, or it is YAML and begins a run."""
    text = yaml.safe_dump(optimizer_config("NAMOD", {"lr": 0.01, "clamp": 0.2, "adamw_betas": [0.8, 0.9]}))
    start = data.draw(st.integers(0, len(text) - 1))
    text = text[:start] + text[start + cut :]
    code: object = 0
    with contextlib.redirect_stderr(error := io.StringIO()):
        try:
            line.run(text)
        except SystemExit as stop:
            code = stop.code
    if code:
        assert (code, line.begun) == (2, [])
        assert "error: " in error.getvalue()
    else:
        assert isinstance(parsed(text), dict)


# --- checkpoints -----------------------------------------------------------------------------------


class Own:
    """A class that only this module knows."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a checkpoint of the toy above."""
    path = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=9)
    trainer.strategy.connect(Tiny())
    trainer.save_checkpoint(path, weights_only=True)
    return path.read_bytes()


def saved(obj: object, **options: Any) -> bytes:
    torch.save(obj, file := io.BytesIO(), **options)
    return file.getvalue()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "without its first half": lambda whole: whole[len(whole) // 2 :],
    "one byte": lambda whole: whole[:1],
    "empty": lambda whole: b"",
    "a text": lambda whole: b"not a checkpoint\n" * 9,
    "zeros": lambda whole: bytes(5000),
    "another zip": lambda whole: b"PK\x05\x06" + bytes(18),
    "weights alone": lambda whole: saved({"layer.weight": torch.zeros(2)}),
    "no dictionary": lambda whole: saved([1, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_refused(line: CommandLine, whole: bytes, broken: str, command: str) -> None:
    path = line.folder.parent / "broken.ckpt"
    path.write_bytes(BROKEN[broken](whole))
    if command == "fit":
        said = line.refused(None, f"--ckpt_path={path}")
    else:
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error := io.StringIO()):
            main(["validate", *OPTIONS[:2], *MODEL, f"--ckpt_path={path}"])
        assert stop.value.code == 2
        said = error.getvalue().partition("error: ")[2].strip()
    assert said.startswith(f"Expected --ckpt_path to be a whole checkpoint of Lightning. Got {path}, ")
    assert len(said.splitlines()) == 1


def test_a_missing_path_and_a_folder_without_a_checkpoint_are_refused(line: CommandLine, tmp_path: Path) -> None:
    assert line.refused(None, "--ckpt_path=nowhere.ckpt").endswith("Got nowhere.ckpt, which does not exist.")
    assert f"Got {tmp_path}, a folder without meta.pt" in line.refused(None, f"--ckpt_path={tmp_path}")


def test_a_whole_checkpoint_is_loaded(line: CommandLine) -> None:
    path = line.folder.parent / "whole.ckpt"
    trainer = line.run(None)
    torch.nn.init.constant_(trainer.model.out.bias, 7)
    trainer.save_checkpoint(path)
    trainer = line.run(None, f"--ckpt_path={path}")
    assert trainer.model.out.bias.eq(7).all()


def test_what_may_be_a_checkpoint_is_left_to_the_run(tmp_path: Path) -> None:
    for path in (None, "last", "best", "hpc", "registry:model", "s3://bucket/a.ckpt"):
        check_checkpoint(path)
    (tmp_path / "own.ckpt").write_bytes(saved({"state_dict": {}, "hyper_parameters": {"own": Own()}}))
    check_checkpoint(tmp_path / "own.ckpt")
    (tmp_path / "old.ckpt").write_bytes(saved({"state_dict": {}}, _use_new_zipfile_serialization=False))
    check_checkpoint(tmp_path / "old.ckpt")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "meta.pt").touch()
    check_checkpoint(tmp_path / "sharded")

"""LightningCLI with a section for the optimizer, and configs as layers."""

from __future__ import annotations

import contextlib
import json
import os
import pydoc
from collections.abc import Iterable, Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_namo
from lightning_namo.cli.commands import COMMANDS, PROGRAM
from lightning_namo.cli.parsers import RunParser
from lightning_namo.cli.validation import (
    check_checkpoint,
    check_config,
    check_data,
    check_is_described,
    check_optimizer,
    check_port,
    check_routing,
    check_sections,
)
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.streaming import StreamingTextDataModule
from lightning_namo.gpt2.model import GPT2Config
from lightning_namo.gpt2.module import GPT2Module, follow_data
from lightning_namo.integration.optimizer_callback import OptimizerCallback
from lightning_namo.integration.preemption import SaveOnSigterm
from lightning_namo.sharding.process_group import initialized

SECTIONS = ("model", "data", "optim", "optim.optimizer")
"""Options that take a class, or a file that may name one."""

REFUSED = ("optimizer", "lr_scheduler")
"""LightningCLI's own sections, which build an optimizer before a strategy shards the module; it would train nothing."""


class Layer(ActionConfigFile):
    """A config on top of those before it; where it names another class, that starts from its own defaults.

    jsonargparse keeps every value of the last class that the new one accepts, defaults included: AdaMuon in place of
    NAMO would get NAMO's ``lr`` and ``beta2`` (mauvilsa/jsonargparse#460).
    """

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        """Add a config, a file or YAML as a string, to what is parsed so far."""
        try:
            check_config(value)
        except ValueError as error:
            raise TypeError(str(error)) from error
        merged = cfg.clone()
        ActionConfigFile.apply_config(parser, merged, dest, value)
        for section in REFUSED:
            if section in merged:
                raise TypeError(_refusal(f"{section}:"))
        for key, class_path in list(cfg.items()):
            if key.endswith(".class_path") and merged.get(key) != class_path:
                cfg.pop(key.removesuffix(".class_path"), None)
        ActionConfigFile.apply_config(parser, cfg, dest, value)


class NamoCLI(LightningCLI):
    """LightningCLI with `OptimizerCallback` as its section ``optim``.

    Model and data are any LightningModule and LightningDataModule; without a class they are a GPT-2 and text, and
    the GPT-2's vocabulary and block size follow the data where they are left at their defaults.

    Args:
        args: The arguments after the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        commands = ", ".join(f"`{PROGRAM} {name} --help`" for name in COMMANDS)
        # An error comes with the usage, which should not fill a screen; --help lists the options. No abbreviations:
        # a mistyped option must not pass for another one.
        subparsers = {
            name: {"usage": f"{PROGRAM} {name} [--config FILE] [--OPTION VALUE]", "allow_abbrev": False}
            for name in self.subcommands()
        }
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_kwargs={"overwrite": True},  # the same folder may be run in again
            seed_everything_default=0,
            trainer_defaults={"callbacks": SaveOnSigterm()},  # always there, whatever callbacks a config lists
            parser_kwargs={
                "prog": PROGRAM,
                "description": "Train with NAMO, NAMO-D, Muon, AdaMuon, a rule of your own or any optimizer of torch.",
                "epilog": f"Commands without a Trainer: {commands}.",
                "allow_abbrev": False,
                **subparsers,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            parser_class=RunParser,
        )

    def setup_parser(self, *args: Any) -> None:
        """Make the parsers; the usage has the commands without a Trainer, too."""
        super().setup_parser(*args)
        names = dict.fromkeys([*self.subcommands(), *(name.split()[0] for name in COMMANDS)])
        self.parser.usage = f"{PROGRAM} {{{','.join(names)}}} [--OPTION VALUE]"

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser without ``--config``, which only the subcommands have."""
        return self.parser_class(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--config`` as a `Layer`, the section of the optimizer, and defaults for model and data."""
        parser.add_argument("-c", "--config", action=Layer, help="A YAML file. Of several, later ones win.")
        parser.add_lightning_class_args(OptimizerCallback, "optim")
        defaults = {"model": GPT2Module, "data": TextDataModule}
        parser.set_defaults({key: {"class_path": f"{c.__module__}.{c.__name__}"} for key, c in defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, refuse LightningCLI's own optimizer, and let a GPT-2 follow its data."""
        assert isinstance(args, list)
        for option in args:
            if option.startswith("--") and option.strip("-").partition("=")[0].partition(".")[0] in REFUSED:
                parser.error(_refusal(option))
        try:
            self.config = parser.parse_args(list(_as_layers(args)))
            sections = self.config[self.config.subcommand]
            check_sections(sections)
            check_checkpoint(sections.get("ckpt_path"))
            if self.config.subcommand == "fit":
                check_is_described(sections)
        except (OverflowError, RecursionError, ValueError) as error:
            parser.error(str(error))
        _follow_data(sections.model, sections.data)
        _follow_root(sections.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; a port that is taken ends the command before other processes are started."""
        trainer = super().instantiate_trainer(**kwargs)
        if not initialized():  # they have met already, and hold the port
            check_port(trainer)
        return trainer

    def before_fit(self) -> None:
        """What only constructors and the routing refuse ends the command before the run starts."""
        check_data(self.model, self.datamodule)
        check_optimizer(self.config_init.fit.optim)
        check_routing(self.config_init.fit.optim, self.model)


def _refusal(option: str) -> str:
    return (
        f"Expected the optimizer under --optim.optimizer and its schedule under --optim.schedule. Got {option}, which "
        "would take the parameters before the strategy shards them. Example: --optim.optimizer NAMOD "
        "--optim.optimizer.lr 0.009"
    )


def _as_layers(args: Iterable[str]) -> Iterator[str]:
    """Turn ``--model X`` and the like into ``--config='{model: X}'``: a class named here is a `Layer` too."""
    options = iter(args)
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or name not in SECTIONS:
            yield option
        elif not equals and (value := next(options, "")) == "":
            yield option  # without a value; the parser says so
        else:
            ours = name == "optim.optimizer" and value in lightning_namo.__all__  # torch has a Muon too
            layer: Any = f"lightning_namo.{value}" if ours else value
            if value.startswith("{"):
                with contextlib.suppress(yaml.YAMLError):  # the parser says so
                    layer = yaml.safe_load(value)
            for key in reversed(name.split(".")):
                layer = {key: layer}
            yield f"--config={json.dumps(layer)}"


def _follow_data(model: Namespace, data: Namespace) -> None:
    """Set a GPT-2's vocabulary and block size, where they have their defaults, to what the data need."""
    classes = (TextDataModule, StreamingTextDataModule)
    text = next((cls for cls in classes if _names(data, cls)), None)
    if text is None or not _names(model, GPT2Module):
        return
    sizes = model.init_args
    config = GPT2Config(vocab_size=sizes.vocab_size, block_size=sizes.block_size)
    config = follow_data(config, text(**data.init_args.as_dict()))
    sizes.vocab_size, sizes.block_size = config.vocab_size, config.block_size


def _follow_root(trainer: Namespace) -> None:
    """Put the folders of loggers below ``default_root_dir``, if that is given; absolute ones stay."""
    root = trainer.get("default_root_dir")
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers if root is not None else ():
        folder = logger.get("init_args.save_dir") if isinstance(logger, Namespace) else None
        if folder is not None and "://" not in str(folder):
            below = os.path.join(root, folder)
            logger.init_args.save_dir = below if "://" in str(root) else os.path.abspath(below)


def _names(section: Namespace, cls: type) -> bool:
    return pydoc.locate(section.class_path) is cls  # which has several paths: of its module, of a package, a former one

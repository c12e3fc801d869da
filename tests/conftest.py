"""What all tests share: the dtype of the iteration, and a line about the machine's own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.iteration import ITERATIONS, iterating_in

OPTIMIZERS = ("NAMO", "NAMOD", "Muon", "AdaMuon")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's turns with each optimizer one is fast, another from test to test; the others are marked slow."""
    turns: dict[Any, dict[str, list[pytest.Item]]] = {}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = [getattr(getattr(value, "func", value), "__name__", value) for value in values]
        for name in OPTIMIZERS:
            if name in names and "distributed" not in item.path.parts:
                turns.setdefault(item.function, {}).setdefault(name, []).append(item)
    for function, by_name in turns.items():
        fast = zlib.crc32(function.__name__.encode()) % len(by_name)
        for number, name in enumerate(by_name):
            for item in by_name[name] if number != fast else ():
                item.add_marker("slow")


@pytest.fixture(params=ITERATIONS)
def iteration(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each dtype of the iteration; gives its name."""
    with iterating_in(request.param):
        yield request.param


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the embedded corpus' token files, sotu: a link to it saves a run the seconds to make them."""
    from lightning_namo.gpt2.data.prepare import prepare_speeches

    folder = tmp_path_factory.mktemp("data")
    prepare_speeches(folder / "sotu")
    return folder


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def kept_parsers() -> Iterator[None]:
    """Let command lines share the parsers of subcommands, which take longer to make than a command line to parse."""
    from lightning_namo.cli import NamoCLI

    make, kept = NamoCLI._prepare_subcommand_parser, {}

    def keep(cli: NamoCLI, trainer: type, name: str, **options: object) -> object:
        if name not in kept:
            kept[name] = make(cli, trainer, name, **options), cli._subcommand_method_arguments[name]
        parser, cli._subcommand_method_arguments[name] = kept[name]
        return parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NamoCLI, "_prepare_subcommand_parser", keep)
        yield


@pytest.fixture
def fake_world() -> Iterator[None]:
    """A world of two of which only rank 0 exists: enough to shard, no collective does anything."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def native() -> str:
    from lightning_namo.polar.iteration_dtype import iteration_dtype

    with iterating_in(None):
        dtype = iteration_dtype("cpu")
    return f"Newton-Schulz on this CPU iterates in {str(dtype).removeprefix('torch.')} by itself."


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say it in a line of its own: with -q, as in pyproject.toml, pytest prints no header.

    The process that only distributes tests leaves it to the first worker: it need not import the package.
    """
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["native"] = native()
    elif not session.config.getoption("numprocesses", None):
        session.config.pluginmanager.get_plugin("terminalreporter").write_line(native())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if node.gateway.id == "gw0":
        node.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{node.workeroutput['native']}")

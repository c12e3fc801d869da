"""Commands on a checkpoint: the exported GPT-2 computes what the trained one does, and wrong input is said in words."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from lightning_namo.atomic_io import replacing
from lightning_namo.checkpoint.consolidate import consolidate
from lightning_namo.cli import main
from lightning_namo.gpt2.data.encoding import END_OF_TEXT
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.export import export, to_transformers
from lightning_namo.gpt2.generate import generate
from lightning_namo.gpt2.load import Vocabulary, find_vocabulary, load_network
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "
VERSION = "pytorch-lightning_version"


def train(folder: Path, *options: str) -> Path:
    """Three steps of `lightning-namo fit` on a text of its own; the checkpoint."""
    (folder / "text.txt").write_text(TEXT * 60)
    vocabulary = prepare([str(folder / "text.txt")], str(folder / "data"), vocab_size=270)["vocab_size"]
    assert vocabulary % 64  # so that the network's is padded
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu"]
    sizes = ["--model.n_layer=2", "--model.n_embd=32", "--model.n_head=2", "--data.block_size=16"]
    saver = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3"]
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {folder}}}}}"
    data = ["--data.data_dir", str(folder / "data"), "--data.batch_size=2"]
    main(["fit", f"--config={QUICKSTART}", *sizes, *data, *steps, *saver, logger, *options])
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint


@pytest.fixture(scope="module", params=["false", "true"], ids=["no-bias", "bias"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), f"--model.bias={request.param}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nothing but itself is known of."""
    path = tmp_path_factory.mktemp("lone") / "lone.ckpt"
    torch.save(contents(), path)
    return path


def contents(**changes: Any) -> dict[str, Any]:
    """What a checkpoint of an untrained GPT2Module holds."""
    torch.manual_seed(0)
    module = GPT2Module(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=8)
    module.configure_model()
    return {VERSION: "2", "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), **changes}


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


# ---------------------------------------------------------------------- export


def test_the_exported_model_computes_the_same_logits_and_generates(trained: Path, tmp_path: Path) -> None:
    main(["export", "--ckpt_path", str(trained), "--out_dir", str(tmp_path / "hf")])
    module = GPT2Module.load_from_checkpoint(trained, map_location="cpu").eval()
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.vocab_size == len(tokenizer) < module.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids = torch.randint(len(tokenizer), (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = module(ids)[..., : len(tokenizer)], model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert ours.std() > 0.1  # an agreement on something
    assert model.generate(ids[:, :4], max_new_tokens=5, pad_token_id=0).shape[1] <= 9


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_equal_where_the_approximate_gelu_would_differ(bias: bool) -> None:
    torch.manual_seed(0)
    network = GPT2(GPT2Config(64, 8, 2, 2, 8, bias=bias)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        ids = torch.randint(60, (2, 8))
        ours, theirs = network(ids)[..., :60], to_transformers(network, Vocabulary(60, None))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_the_exported_tokenizer_is_the_run_s(trained: Path, tmp_path: Path) -> None:
    export(str(trained), str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = find_vocabulary(trained, 320).tokenizer
    assert own is not None
    for text in (TEXT, " \n two\tlines, naïve — ok", f"a{END_OF_TEXT}b"):
        assert tokenizer(text).input_ids == own.encode(text).ids
    assert tokenizer.decode(own.encode(TEXT).ids) == TEXT


def test_the_exported_model_keeps_its_precision(tmp_path: Path) -> None:
    data = contents()
    data["state_dict"] = {name: weight.bfloat16() for name, weight in data["state_dict"].items()}
    report = export(str(saved(tmp_path / "bf16.ckpt", data)), str(tmp_path / "hf"))
    assert report["tokenizer"] is False
    assert report["vocab_size"] == 64
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_vocabulary_can_be_trimmed_to_gpt2_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = GPT2Module(block_size=4, n_layer=1, n_head=1, n_embd=2)
    module.configure_model()
    data = {VERSION: "2", "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    export(str(saved(tmp_path / "padded.ckpt", data)), str(tmp_path / "hf"), vocab_size=50257)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, module.model.lm_head.weight[:50257])
    assert model.config.eos_token_id == 50256


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model.", "module._forward_module.model._orig_mod."])
@pytest.mark.parametrize("without", ["lm_head.weight", "transformer.wte.weight", None])
def test_names_of_wrappers_and_either_name_of_the_tied_weight_make_no_difference(
    prefix: str, without: str | None, tmp_path: Path
) -> None:
    data = contents()
    expected = {name.removeprefix("model."): weight for name, weight in data["state_dict"].items()}
    data["state_dict"] = {
        prefix + name.replace("h.0.", "h.0._orig_mod."): w for name, w in expected.items() if name != without
    }
    network = load_network(saved(tmp_path / "wrapped.ckpt", data))
    torch.testing.assert_close(dict(network.state_dict()), expected, rtol=0, atol=0)
    assert network.lm_head.weight is network.transformer["wte"].weight


# ---------------------------------------------------------------------- generate


def test_generate_prints_the_text_that_transformers_generates(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(str(trained), "It was the", max_new_tokens=12, temperature=0.0)
    export(str(trained), str(tmp_path / "hf"))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = model.generate(**tokenizer("It was the", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("It was the")
    assert len(text) > 15
    capsys.readouterr()
    main(["generate", "--ckpt_path", str(trained), "--prompt", "It was the", "--max_new_tokens=12", "--temperature=0"])
    assert text.split()[-1] in capsys.readouterr().out


def test_generate_repeats_itself_with_the_same_seed_only(trained: Path) -> None:
    one, again, other = (generate(str(trained), "It", max_new_tokens=20, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_generate_takes_the_tokenizer_of_a_folder_as_well(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(trained.read_bytes())
    data = next(folder for folder in trained.parents if (folder / "text.txt").exists()) / "data"
    assert generate(str(alone), "It", 8, data_dir=str(data)) == generate(str(trained), "It", 8)


def test_generate_starts_a_document_without_a_prompt_and_ends_with_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "data"), vocab_size=257)
    torch.manual_seed(0)
    data = {VERSION: "2", "hyper_parameters": {**vars(GPT2Config(257, 8, 1, 1, 4))}}
    network = GPT2(GPT2Config(257, 8, 1, 1, 4))
    vocabulary = find_vocabulary(Path("x"), 257, str(tmp_path / "data"))
    with torch.no_grad():  # the end of a document is the only token that anything speaks for
        network.transformer["wte"].weight.zero_()[vocabulary.end] = torch.tensor([9.0, -9.0, 9.0, -9.0])
    path = saved(tmp_path / "ends.ckpt", {**data, "state_dict": network.state_dict()})
    assert generate(str(path), "", 5, temperature=0.0, data_dir=str(tmp_path / "data")) == ""


def test_the_embedded_corpus_is_known_by_the_config_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    data = {"class_path": "lightning_namo.gpt2.data.TextDataModule", "init_args": {"data_dir": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    vocabulary = find_vocabulary(tmp_path / "checkpoints" / "step=1.ckpt", 4096)
    assert vocabulary.tokenizer is not None
    assert vocabulary.size == 4096
    assert vocabulary.tokenizer.decode(vocabulary.tokenizer.encode("My fellow Americans").ids) == "My fellow Americans"


def test_generate_takes_gpt2_s_ids_from_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    encoding = SimpleNamespace(encode_ordinary=lambda text: [15496], decode=lambda ids: f"Hello {len(ids)}")
    fake = SimpleNamespace(get_encoding=lambda name: asked.append(name) or encoding)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)  # the real one downloads
    module = GPT2Module(block_size=4, n_layer=1, n_head=1, n_embd=2)
    module.configure_model()
    data = {VERSION: "2", "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    path = str(saved(tmp_path / "gpt2.ckpt", data))
    assert generate(path, "Hello", 3, vocab_size=50257) == "Hello 4"
    assert asked == ["gpt2"]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        ValueError, match=r"Expected GPT-2's tokenizer of tiktoken: pip install 'lightning-namo\[data\]"
    ):
        generate(path, "Hello", 3, vocab_size=50257)


# ---------------------------------------------------------------------- refusals


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class Toy(pl.LightningModule):
    def __init__(self, vocab_size: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def head_untied(data: dict[str, Any]) -> dict[str, Tensor]:
    return {**data["state_dict"], "model.lm_head.weight": data["state_dict"]["model.lm_head.weight"] + 1}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no torch file": (lambda: b"text", "cannot be read: "),
    "empty": (lambda: b"", "cannot be read: "),
    "cut short": (lambda: b"PK\x03\x04" + bytes(100), "cannot be read: "),
    "code": (lambda: {**contents(), "callbacks": Evil()}, "cannot be read: "),
    "a list": (lambda: [1], "with <class 'list'>"),
    "weights only": (lambda: contents()["state_dict"], "with the keys ['model.lm_head.weight', "),
    "no shape": (lambda: contents(hyper_parameters={"vocab_size": 64}), "without the hyperparameter block_size"),
    "another module": (lambda: contents(state_dict=Toy().state_dict()), "without transformer.wte.weight"),
    "more weights": (
        lambda: contents(state_dict={**contents()["state_dict"], "ema": torch.ones(1)}),
        "with ema beside",
    ),
    "another size": (
        lambda: contents(hyper_parameters={**contents()["hyper_parameters"], "block_size": 9}),
        "with transformer.wpe.weight of shape (8, 8) and not (9, 8)",
    ),
    "another head": (lambda: contents(state_dict=head_untied(contents())), "a head that is not tied"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["export", "generate"])
def test_what_is_no_checkpoint_of_a_gpt2_is_refused_before_anything_is_written(
    command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    data = make()
    if isinstance(data, bytes):
        Path("bad.ckpt").write_bytes(data)
    else:
        torch.save(data, "bad.ckpt")
    assert message in refused(capsys, command, "--ckpt_path", "bad.ckpt", *OUTPUT[command])
    assert os.listdir() == ["bad.ckpt"]


OUTPUT = {"export": ("--out_dir", "hf"), "generate": ("--prompt", "Hello"), "consolidate": ("--out", "whole.ckpt")}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command line says that ends with exit code 2: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lightning-namo: error: Expected ")
    assert "Got " in lines[0]
    return lines[0]


@pytest.mark.parametrize("command", OUTPUT)
def test_a_path_without_a_checkpoint_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, command, "--ckpt_path", "nowhere.ckpt", *OUTPUT[command])
    assert message.endswith("Expected a checkpoint. Got nowhere.ckpt, which does not exist.")
    Path("folder").mkdir()
    message = refused(capsys, command, "--ckpt_path", "folder", *OUTPUT[command])
    assert message.endswith("Expected a checkpoint: a file, or a folder with .metadata. Got the folder folder.")
    for name in (".metadata", "meta.pt"):
        Path("folder", name).write_bytes(pickle.dumps({}))
    message = refused(capsys, command, "--ckpt_path", "folder", *OUTPUT[command])
    assert "Got folder, which cannot be read: " in message
    assert os.listdir() == ["folder"]


def test_one_file_needs_no_consolidation(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "consolidate", "--ckpt_path", str(checkpoint), "--out", str(checkpoint) + ".whole")
    assert "Expected a sharded checkpoint, which is a folder." in message


@pytest.mark.parametrize(("command", "option"), [("export", "--out_dir"), ("consolidate", "--out")])
def test_an_output_that_exists_is_kept(
    command: str, option: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    args = [command, "--ckpt_path", str(checkpoint), option, str(tmp_path / "mine")]
    assert "Expected a new path to write to." in refused(capsys, *args)
    assert "Got " in refused(capsys, *args, "--overwrite", "true")  # it is not what the command makes
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_an_earlier_export_is_replaced_if_asked_and_kept_if_the_new_one_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "hf"
    export(str(checkpoint), str(target))
    (target / "old.txt").write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            export(str(checkpoint), str(target), overwrite=True)
    assert (target / "old.txt").exists()
    report = export(str(checkpoint), str(target), overwrite=True)
    assert (
        report["files"] == sorted(os.listdir(target)) == ["config.json", "generation_config.json", "model.safetensors"]
    )
    assert os.listdir(tmp_path) == ["hf"]


def test_a_file_takes_its_place_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "whole.ckpt"

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(path.parent) == []
    for text in ("half", "whole"):
        with replacing(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "whole"


def test_without_transformers_export_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-namo\[export\]'"):
        export(str(checkpoint), str(tmp_path / "hf"))


def test_a_tokenizer_that_cannot_be_the_run_s_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected the tokenizer of the run. Got none"):
        generate(str(checkpoint), "Hello")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"Expected data_dir to have a tokenizer.json"):
        generate(str(checkpoint), "Hello", data_dir=str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "data"), vocab_size=257)
    with pytest.raises(ValueError, match=r"at most 64 tokens, as the network has. Got 257"):
        export(str(checkpoint), str(tmp_path / "hf"), data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"Expected vocab_size to be that of the tokenizer, 257. Got 60"):
        export(str(checkpoint), str(tmp_path / "hf"), data_dir=str(tmp_path / "data"), vocab_size=60)
    with pytest.raises(ValueError, match=r"at most 64 tokens, as the network has. Got 65"):
        export(str(checkpoint), str(tmp_path / "hf"), vocab_size=65)
    assert not (tmp_path / "hf").exists()


def test_consolidate_refuses_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a file to write to. Got .*, which is a folder"):
        consolidate(str(tmp_path / "nowhere"), str(tmp_path), overwrite=True)

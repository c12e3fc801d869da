"""GPT-2 against Hugging Face's, its published size, and what a causal language model must do."""

import math

import pytest
import torch
from torch import nn

from lightning_namo.gpt2.model import GPT2, GPT2Config, sample

SMALL = GPT2Config(vocab_size=97, block_size=16, n_layer=2, n_head=4, n_embd=32)


def _small(seed: int = 0, **changes: object) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(GPT2Config(**{**vars(SMALL), **changes}))


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def _copy_to_hugging_face(model: GPT2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu",
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)  # the biases that ours does not have
    state = theirs.state_dict()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, value in model.state_dict().items():
        state[name].copy_(value.T if name.endswith(transposed) else value)
    return theirs


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_hugging_faces_on_the_same_weights(bias: bool) -> None:
    model = _small(bias=bias).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # far from the start, where differences would be small
    theirs = _copy_to_hugging_face(model)
    idx = _ids(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bias", "expected"), [(False, 124_373_760), (True, 124_475_904)])
def test_gpt2_small_has_the_published_number_of_parameters(bias: bool, expected: int) -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(bias=bias))
    V, T, C, layers = 50304, 1024, 768, 12
    matrices = (V + T) * C + layers * 12 * C**2  # tied head; 3 + 1 + 4 + 4 squares of C in a block
    norms = (2 * layers + 1) * C
    biases = (layers * (3 + 1 + 4 + 1) * C + norms) if bias else 0
    assert matrices + norms + biases == expected
    assert sum(p.numel() for p in model.parameters()) == expected


def test_names_are_nanogpts() -> None:
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    names += [f"transformer.h.{n}.{part}" for n in range(2) for part in block]
    assert {*_small().state_dict()} == {f"{name}.weight" for name in names}


def test_the_tied_head_is_one_parameter() -> None:
    model = _small()
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == []


@pytest.mark.parametrize("on_meta", [False, True], ids=["direct", "meta_device_then_reset"])
def test_initialization_has_gpt2s_scales(on_meta: bool) -> None:
    config = GPT2Config(vocab_size=512, block_size=128, n_layer=8, n_head=2, n_embd=128, bias=True)
    torch.manual_seed(0)
    if on_meta:
        with torch.device("meta"):
            model = GPT2(config)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        model = GPT2(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


def test_the_untrained_model_is_undecided() -> None:
    idx = _ids(8, 16)
    logits = _small()(idx)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(SMALL.vocab_size), abs=0.1)


def test_a_token_does_not_see_what_follows() -> None:
    model = _small()
    idx = _ids(1, 12)
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % SMALL.vocab_size
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_samples_depend_on_the_seed_alone() -> None:
    model, idx = _small().eval(), _ids(2, 3)
    first, again, other = (
        sample(model, idx, 8, block_size=16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert first.shape == (2, 11)
    assert torch.equal(first[:, :3], idx)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_sees_the_last_block_size_tokens() -> None:
    model, seen = _small(), []

    def forward(idx: torch.Tensor) -> torch.Tensor:
        seen.append(idx)
        return model(idx)

    ids = sample(forward, _ids(1, 10), 20, block_size=16)
    assert ids.shape == (1, 30)
    for step, idx in enumerate(seen):
        assert torch.equal(idx, ids[:, max(0, step - 6) : 10 + step])


def test_temperature_zero_and_top_k_one_take_the_likeliest_token() -> None:
    model = _small().eval()
    idx = _ids(2, 5)
    expected = model(idx)[:, -1].argmax(dim=-1)
    assert torch.equal(sample(model, idx, 1, block_size=16, temperature=0.0)[:, -1], expected)
    assert torch.equal(sample(model, idx, 1, block_size=16, top_k=1)[:, -1], expected)


def test_top_k_draws_from_the_likeliest_only() -> None:
    logits = torch.arange(10.0).expand(1, 1, 10)
    drawn = sample(lambda idx: logits, torch.zeros(1, 1, dtype=torch.long), 200, block_size=1, top_k=3)
    assert set(drawn[0, 1:].tolist()) == {7, 8, 9}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPT2Config(n_embd=100, n_head=3), "multiple of n_head. Got 100 and 3"),
        (lambda: GPT2Config(n_layer=0), "n_layer of at least 1. Got 0"),
        (lambda: GPT2Config(dropout=1.0), r"dropout in \[0, 1\). Got 1.0"),
        (lambda: _small()(_ids(1, 17)), "block_size=16 tokens. Got 17"),
        (lambda: sample(_small(), _ids(1, 0), 1, block_size=16), r"at least one token. Got shape \(1, 0\)"),
        (
            lambda: sample(_small(), _ids(1, 1), 1, block_size=16, temperature=-1.0),
            "temperature of at least 0. Got -1.0",
        ),
        (lambda: sample(_small(), _ids(1, 1), 1, block_size=16, top_k=0), "top_k of at least 1, or None. Got 0"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]

"""Tests the options that give the published settings (docs/deviations.md), and the config files that set them."""

import os
from dataclasses import asdict, fields

import pytest
import torch

from configurator import ConfigError, load_config, read_config_file
from conftest import ROOT
from engine import runlog
from engine.resuming import check_same_model
from model import GPT
from optim import lr_multipliers, make_optimizers
from options import GPTConfig, RunConfig, TrainConfig
from train import TokenTask

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, d_model=36)


@pytest.mark.parametrize("options, std", [({}, 1.0), ({"embedding_std": 0.02}, 0.02), ({"d_embed": 32}, 1.0)], ids=str)
def test_embedding_std_sets_the_initial_size_of_embeddings(options, std):
    torch.manual_seed(0)
    config = GPTConfig(**{**SMALL, "vocab_size": 2048, "block_size": 512, "d_model": 64}, **options)
    model = GPT(config)
    for embedding in (model.token_embedding, model.position_embedding):
        assert embedding.weight.std().item() == pytest.approx(std, rel=0.02)
    (row,) = (line for line in runlog.model_table(model, lr_multipliers(model), 1e-3) if line.startswith("embeddings"))
    assert row.split()[-1] == f"{std:g}"


@pytest.mark.parametrize(
    "kind", [dict(rank=2), dict(structure="low_rank", moe="linear"), dict(normalize_dense=True)], ids=str
)
def test_without_gains_the_caps_still_act(kind):
    """The logits are the same, only the gains are missing, and a core's size above its cap does not matter."""
    torch.manual_seed(0)
    idx = torch.randint(SMALL["vocab_size"], (2, 8))
    shape = {**SMALL, "structured_layers": ("ffn",), **kind}
    models = []
    for gains in (True, False):
        torch.manual_seed(1)
        models.append(GPT(GPTConfig(**shape, gains=gains)).eval())
    plain, model = models
    missing = plain.state_dict().keys() - model.state_dict().keys()
    assert missing and missing == {name for name in plain.state_dict() if name.endswith(".gains")}
    assert set(lr_multipliers(model)) == set(dict(model.named_parameters()))
    with torch.no_grad():
        for each in models:
            for name, parameter in each.named_parameters():
                if "weight" in name or "cores" in name:
                    parameter.normal_(std=10.0, generator=torch.Generator().manual_seed(len(name)))
    before = model(idx)[0]
    torch.testing.assert_close(before, plain(idx)[0], atol=1e-3, rtol=1e-4)
    capped = [layer for layer in model.modules() if getattr(layer, "normalize", False)]
    for layer in capped:
        layer.cores[0].data *= 3
    torch.testing.assert_close(model(idx)[0], before, atol=1e-3, rtol=1e-4)
    assert capped and model.flops_per_token() == plain.flops_per_token()


@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_q_that_starts_at_zero_attends_uniformly_and_learns(structure):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "d_model": 64}, structure=structure, zero_init_q=True, bias=True, qkv_bias=False))
    attention, x = model.blocks[0].attn, torch.randn(2, 8, 64)
    assert attention.q.cores[-1].abs().max() == 0 and attention.k.cores[-1].abs().max() > 0
    torch.nn.init.eye_(attention.proj.weight) if structure == "dense" else attention.proj.load_dense(torch.eye(64))
    means = attention.v(x).cumsum(dim=1) / torch.arange(1, 9)[:, None]  # over the positions up to each one
    torch.testing.assert_close(attention(x), attention.proj(means), atol=1e-5, rtol=1e-4)
    optimizer, idx = make_optimizers(model, RunConfig(lr=1e-3)), torch.randint(SMALL["vocab_size"], (4, 9))
    for _ in range(4):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    moved = attention.q.cores[-1].abs().max().item()
    assert (
        0
        < moved
        < 10 * 1e-3 * lr_multipliers(model)[f"blocks.0.attn.q.{'weight' if structure == 'dense' else 'cores.1'}"]
    )


def test_qkv_bias_switches_the_biases_of_q_k_and_v():
    shape = dict(SMALL, bias=True, qkv_bias=False)
    names = {name for name, _ in GPT(GPTConfig(**shape)).named_parameters() if name.endswith("bias")}
    every = {
        name for name, _ in GPT(GPTConfig(**{**shape, "qkv_bias": True})).named_parameters() if name.endswith("bias")
    }
    assert every - names == {f"blocks.{i}.attn.{role}.bias" for i in range(SMALL["n_layer"]) for role in "qkv"}
    one = GPT(GPTConfig(**shape, overrides={"attn.q": {"structure": "dense", "bias": True}})).blocks[0].attn
    assert one.q.bias is not None and one.k.bias is None  # an override wins


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(qkv_bias=False), ["qkv_bias=False", "bias=False", "bias=True"]),
        (dict(zero_init_q=True, parametrization="standard"), ["zero_init_q=True", "standard"]),
        (dict(gains=False, structure="dense"), ["gains=False", "no layer has an RMS cap"]),
        (dict(embedding_std=0.02, parametrization="standard"), ["embedding_std=0.02", "standard"]),
        (dict(embedding_std=0.0), ["embedding_std=0.0", "more than 0"]),
        (dict(router_init="zero"), ["router_init=zero", "moe='linear' or 'ffn'"]),
        (dict(expert_init="single"), ["expert_init=single", "take moe='linear'"]),
        (dict(expert_init="single", moe="ffn"), ["expert_init=single", "moe='ffn'"]),
        (dict(expert_init="single", moe="linear", top_k=1), ["expert_init=single", "top_k=1"]),
        (dict(router_balance=0.0), ["router_balance=0.0", "moe='none'"]),
        (dict(scale_decay=True, weight_decay=0.0), ["scale_decay=True", "weight_decay=0"]),
        (dict(scale_decay=True, parametrization="standard"), ["scale_decay=True", "standard"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**SMALL, **options})
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


ROUTERS = {"router_init", "router_balance", "expert_init"}


@pytest.mark.parametrize(
    "file, unread",
    [
        ("char_btt", ROUTERS),
        ("gpt2_btt", ROUTERS),
        ("gpt2_btt_moe", set()),
        ("gpt2_moe", {"expert_init", "gains"}),
        ("gpt2_dense", ROUTERS | {"gains", "embedding_std", "scale_decay"}),  # GPT-2's own parametrisation
    ],
)
def test_published_settings_follow_another_config_file(file, unread, capsys):
    """Each option of the file is set, or left out with a note because the model does not read it."""
    paths = [os.path.join(ROOT, f"config/{name}.py") for name in (file, "published", "published_theta")]
    config = load_config(TrainConfig, paths)
    wanted = read_config_file(paths[1]) | read_config_file(paths[2])
    assert {name for name, value in wanted.items() if getattr(config, name) != value} == unread
    notes = capsys.readouterr().out.splitlines()
    assert {note.removeprefix("note: ").partition("=")[0] for note in notes} == unread


def test_a_run_saved_before_these_options_existed_has_the_same_model():
    switches = {"gains", "embedding_std", "zero_init_q", "qkv_bias", "router_init", "expert_init", "scale_decay"}
    config = TrainConfig(**SMALL)
    saved = {name: value for name, value in asdict(config).items() if name not in switches | {"router_balance"}}
    assert switches <= {field.name for field in fields(TrainConfig)}
    said = []
    check_same_model(config, saved, TokenTask.shape, said.append)
    assert not said

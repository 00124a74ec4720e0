"""Tests the GPT against Hugging Face's GPT-2, its cache against recomputation, its FLOPs against the executed graph."""

import ast
import math
import random
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from configurator import ConfigError
from einsum_linear import Dense, EinsumLinear, apply_together, make_linear, multiplied_out
from engine.huggingface import load_gpt2
from generate import KVCache, generate, sample_token
from model import GPT
from optim import make_optimizers
from options import GPTConfig, RunConfig
from test_einsum_linear import SWEEP

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, d_model=36)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A small random GPT-2 of transformers, and the folder it is saved in."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=24, n_embd=20, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that biases and norms are not at their initial values
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, str(folder)


def test_dense_standard_equals_hugging_face(hugging_face):
    theirs, folder = hugging_face
    ours = load_gpt2(folder).eval()
    idx = torch.randint(101, (5, 24))
    logits, loss = ours(idx, idx.roll(-1, 1))
    expected = theirs(idx).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten()))
    assert ours.lm_head.weight is ours.token_embedding.weight


def test_a_model_that_is_no_plain_gpt2_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, activation_function="relu")
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="activation_function=relu.*gelu_new"):
        load_gpt2(str(tmp_path))
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)  # our head shares the embedding's weights
    with pytest.raises(ConfigError, match="tie_word_embeddings=False"):
        load_gpt2(str(tmp_path))


def test_standard_is_initialised_as_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, "d_model": 256, "n_layer": 8}, parametrization="standard", structure="dense"))
    for parameter, std in [
        (model.token_embedding.weight, 0.02),
        (model.position_embedding.weight, 0.02),
        (model.blocks[0].attn.q.weight, 0.02),
        (model.blocks[7].ffn.up.weight, 0.02),
        (model.blocks[0].attn.proj.weight, 0.02 / 4),
        (model.blocks[7].ffn.down.weight, 0.02 / 4),
    ]:
        assert parameter.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("structure", ["dense", "low_rank", "btt"])
def test_mup_starts_from_uniform_predictions(structure):
    model = GPT(GPTConfig(**SMALL, structure=structure))
    idx = torch.randint(96, (2, 32))
    _, loss = model(idx, idx)
    assert loss.item() == pytest.approx(math.log(96), abs=1e-5)


def make_random_model(**kwargs):
    """A GPT with noise added to every parameter, so that none stays at its initial zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **kwargs})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "kwargs", [dict(rank=2), dict(structure="dense", parametrization="standard", bias=True), dict(d_head=10)], ids=str
)
def test_cached_logits_equal_recomputed_ones(kwargs):
    model = make_random_model(**kwargs).double()
    idx = torch.randint(96, (3, 32))
    expected, _ = model(idx)
    cache, got = KVCache(model.config, idx.device), []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 20), (20, 32)]:  # a prompt, single tokens, further chunks
        got.append(model.lm_head(model.trunk(idx[:, start:stop], cache)))
    torch.testing.assert_close(torch.cat(got, dim=1), expected)


def test_no_position_sees_the_future():
    model = make_random_model()
    idx = torch.randint(96, (1, 32))
    changed = idx.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 96
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


def test_greedy_generation_equals_recomputing_every_step():
    model = make_random_model().double()
    idx = torch.randint(96, (2, 5))
    got = generate(model, idx, 20, temperature=0)
    for _ in range(20):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, idx)


def test_generation_continues_past_the_context():
    model = make_random_model()
    prompt = torch.randint(96, (1, 32))
    out = generate(model, prompt, 70, temperature=1.0, generator=torch.Generator().manual_seed(1))
    again = generate(model, prompt, 70, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert out.shape == (1, 102) and torch.equal(out, again) and torch.equal(out[:, :32], prompt)
    assert len(set(out[0, 32:].tolist())) > 10


def test_generate_leaves_the_mode_as_it_was():
    model = make_random_model(dropout=0.5).train()
    generate(model, torch.zeros(1, 1, dtype=torch.long), 2)
    assert model.training


def test_sampling_draws_from_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]]).repeat(40_000, 1)
    generator = torch.Generator().manual_seed(0)
    p = logits[0].softmax(-1)

    def frequencies(**kwargs):
        return torch.bincount(sample_token(logits, generator=generator, **kwargs).flatten(), minlength=5) / len(logits)

    def renormalised(keep):
        kept = torch.where(torch.arange(5) < keep, p, 0.0)
        return kept / kept.sum()

    torch.testing.assert_close(frequencies(), p, atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(temperature=0.5), (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), renormalised(2), atol=0.01, rtol=0)
    assert p[:2].sum() < 0.85 < p[:3].sum()
    torch.testing.assert_close(
        frequencies(top_p=0.85), renormalised(3), atol=0.01, rtol=0
    )  # the third takes the sum past 0.85
    torch.testing.assert_close(frequencies(top_p=0.01), renormalised(1), atol=0, rtol=0)
    for extreme in (dict(top_p=1e-300), dict(temperature=1e-45), dict(top_k=1)):
        torch.testing.assert_close(frequencies(**extreme), renormalised(1), atol=0, rtol=0)
    equal = sample_token(torch.zeros(1000, 5), top_k=2, generator=generator)
    assert len(equal.unique()) == 2  # top_k keeps no more, even if all are equally likely
    torch.testing.assert_close(frequencies(temperature=0), renormalised(1), atol=0, rtol=0)


@pytest.mark.parametrize(
    "kwargs", [dict(rank=2), dict(structure="dense"), dict(structured_layers=("ffn",), d_head=10)], ids=str
)
def test_flops_are_those_of_the_executed_graph(kwargs):
    model = GPT(GPTConfig(**{**SMALL, **kwargs}))
    idx = torch.zeros(3, 32, dtype=torch.long)
    # Not every version of torch counts the CPU's fused attention; the MATH backend runs it as two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == 3 * 32 * model.flops_per_token()


def test_structured_layers_choose_the_layers():
    model = GPT(GPTConfig(**SMALL, structured_layers=("attn.q", "ffn")))
    attn, ffn = model.blocks[1].attn, model.blocks[1].ffn
    assert all(isinstance(layer, EinsumLinear) for layer in (attn.q, ffn.up, ffn.down))
    assert all(isinstance(layer, Dense) for layer in (attn.k, attn.v, attn.proj, model.lm_head))


def test_overrides_set_the_structure_of_single_layers():
    overrides = {"attn.q": "dense", "ffn": {"structure": "low_rank", "rank": 3}}
    model = GPT(GPTConfig(**SMALL, rank=2, overrides=overrides))
    block = model.blocks[0]
    assert isinstance(block.attn.q, Dense) and block.attn.k.sizes.rho == 2
    assert block.ffn.up.sizes == (36, 1, 1, 1, 144, 1, 3)


def test_an_override_keeps_the_models_structure_and_the_narrowest_one_counts():
    overrides = {"ffn": {"rank": 3}, "attn": "btt", "attn.q": "dense"}
    model = GPT(GPTConfig(**SMALL, structure="low_rank", rank=2, overrides=overrides))
    attn, ffn = model.blocks[0].attn, model.blocks[0].ffn
    assert ffn.up.sizes == (36, 1, 1, 1, 144, 1, 3) and model.lm_head.sizes.rho == 2
    assert isinstance(attn.q, Dense) and attn.k.sizes.alpha == 6


@pytest.mark.parametrize("override", [None, 5, ["btt"], {"gain": True}])
def test_an_invalid_override_is_one_clear_line(override):
    with pytest.raises(
        ConfigError, match="overrides: ffn=.*give a structure, or a dict with keys among structure, rank"
    ):
        GPTConfig(**SMALL, overrides={"ffn": override})


def test_q_k_and_v_are_right_if_only_one_has_a_bias():
    """In training, dense layers on one input are computed as one product, which must not drop a bias."""
    layers = [make_linear(8, 6, "dense", bias=bias) for bias in (True, False, False)]
    torch.nn.init.normal_(layers[0].bias)
    x = torch.randn(3, 8)
    for y, layer in zip(apply_together(layers, x), layers):
        torch.testing.assert_close(y, x @ layer.weight.T + (0 if layer.bias is None else layer.bias))


def test_a_narrow_embedding_is_widened_to_the_models_width():
    for layers in (("attn", "ffn", "lm_head"), ("embed",)):
        model = GPT(GPTConfig(**SMALL, d_embed=16, structured_layers=layers))
        assert isinstance(model.embed, EinsumLinear) == ("embed" in layers)
        assert model.token_embedding.weight.shape == (96, 16) and model.embed.materialize().shape == (36, 16)
    idx = torch.randint(96, (2, 32))
    hidden = model.token_embedding(idx) @ model.embed.materialize().T + model.position_embedding(torch.arange(32))
    torch.testing.assert_close(model.trunk(idx), model.final_norm(hidden))  # the branches are zero at initialisation


def test_align_heads_gives_each_head_a_block_of_q_k_v_and_proj():
    one = {"attn": "dense", "attn.k": "btt"}
    assert GPTConfig(**{**SMALL, "d_model": 48, "n_head": 6}, align_heads=True, overrides=one).align_heads
    model = GPT(GPTConfig(**{**SMALL, "d_model": 48, "n_head": 6}, align_heads=True))
    attn = model.blocks[0].attn
    assert [layer.sizes.phi for layer in (attn.q, attn.k, attn.v)] == [6] * 3 and attn.q.sizes.epsilon == 8
    assert attn.proj.sizes.gamma == 6 and attn.proj.sizes.alpha == 8


@pytest.mark.parametrize("theta", SWEEP, ids=lambda theta: str(theta).replace(" ", ""))
def test_the_published_sweep_builds_and_trains(theta):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=96, n_layer=1, n_head=2, d_model=64)
    model = GPT(GPTConfig(**shape, structure="einsum", theta=theta, structured_layers=("attn", "ffn")))
    optimizer = make_optimizers(model, RunConfig(lr=5e-3, weight_decay=0.0))
    idx = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_every_parameter_gets_a_gradient_once_nothing_is_zero():
    model = make_random_model(rank=2, bias=True)
    idx = torch.randint(96, (2, 32))
    model(idx, idx)[1].backward()
    for name, parameter in model.named_parameters():
        if "k" in name.split(".") and name.endswith(".bias"):
            continue  # a shift of all keys leaves the softmax as it is
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(n_head=5), ["n_head=5", "d_model=36", "n_head=4"]),
        (dict(n_layer=0), ["n_layer=0", "at least 1"]),
        (dict(dropout=1.0), ["dropout=1.0"]),
        (dict(structured_layers=("mlp",)), ["structured_layers", "mlp", "ffn"]),
        (dict(overrides={"attn.w": "dense"}), ["overrides", "attn.w", "did you mean"]),
        (dict(d_embed=8, parametrization="standard"), ["d_embed=8", "mup"]),
    ],
)
def test_impossible_configs_are_refused(kwargs, words):
    with pytest.raises(ConfigError) as caught:
        GPTConfig(**{**SMALL, **kwargs})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(align_heads=True, structure="low_rank"), ["align_heads", "low_rank", "btt"]),
        (dict(align_heads=True, structure="dense"), ["align_heads", "dense q, k, v and proj", "btt"]),
        (dict(align_heads=True, structured_layers=("ffn",)), ["align_heads", "dense q, k, v and proj", "btt"]),
        (dict(overrides={"ffn": {"structure": "btt", "ranks": 2}}), ["overrides: ffn=", "ranks", "num_cores"]),
        (dict(overrides={"ffn": "butterfly"}), ["ffn.up", "butterfly", "monarch"]),
        (dict(structure="dense", rank=2), ["attn.q", "rank=2", "dense"]),
    ],
)
def test_impossible_structures_are_refused_and_name_the_layer(kwargs, words):
    with pytest.raises(ConfigError) as caught:
        GPT(GPTConfig(**{**SMALL, **kwargs}))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def apply_remedy(remedy, options):
    """The options after a remedy from a message is applied, such as "d_model=96 and vocab_size=98" or "rank <= 4"."""
    for name, value in re.findall(r"(\w+)(?:=| <= )(\{.*\}|\d+)", remedy):
        options = {**options, name: ast.literal_eval(value)}
    return options


def remedies(message):
    """The remedies that a message offers, one by one."""
    for text in re.split(r", or ", message.rpartition(": take ")[2]):
        first, *more = re.split(r" or (?=\d)", text)
        yield from [first, *(f"{first.partition('=')[0]}={value}" for value in more)]


def test_the_remedies_that_messages_offer_work():
    draw, tried = random.Random(0), Counter()
    for _ in range(150):
        options = dict(
            structure=draw.choice(("btt", "kronecker", "monarch", "low_rank", "tt")), n_head=draw.randint(1, 6),
            d_model=draw.choice((64, 60, 97, 72, 101, 120)), vocab_size=draw.choice((96, 97, 256)), n_layer=1,
        )  # fmt: skip
        more = {"btt": dict(rank=draw.randint(1, 20)), "tt": dict(rank=draw.randint(1, 200)), "low_rank": dict(rank=90)}
        options.update(more.get(options["structure"], {}))
        if options["structure"] == "monarch":
            options["num_blocks"] = draw.choice((None, 3, 5))
        if draw.random() < 0.3:
            options["overrides"] = {"ffn": {"structure": "btt", "rank": draw.randint(1, 20)}}
        if options.keys() & {"rank", "num_blocks", "overrides"}:
            options["n_head"] = 1  # heads that do not divide would be a second mistake of another kind
        if draw.random() < 0.2:
            options["d_head"] = draw.choice((8, 12, 17))
        try:
            GPTConfig(**options).check_layers()
        except ConfigError as error:
            assert ": take " in str(error), str(error)
            for remedy in remedies(str(error)):
                GPTConfig(**apply_remedy(remedy, options)).check_layers()
                tried[remedy.partition("=")[0].partition(" ")[0]] += 1
    assert {"d_model", "n_head", "d_head", "vocab_size", "rank", "num_blocks", "overrides"} <= tried.keys(), tried


def test_a_size_error_names_the_layer_and_offers_a_remedy():
    with pytest.raises(ConfigError, match="lm_head: d_out=97 .* take vocab_size=98"):
        GPT(GPTConfig(**{**SMALL, "vocab_size": 97}))


@pytest.mark.parametrize(
    "kwargs", [dict(rank=2), dict(structure="dense", parametrization="standard", bias=True)], ids=str
)
def test_chunked_loss_equals_whole_logits(kwargs, monkeypatch):
    """With more logits than LOGITS_AT_ONCE none are returned; loss and gradients stay the same."""
    fused, whole = make_random_model(**kwargs), make_random_model(**kwargs, fused_loss=False)
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 96 * 1024)  # chunks of 1024 tokens
    idx, targets = torch.randint(96, (2, 40, 32)).unbind()
    targets = targets.masked_fill(torch.rand(targets.shape) < 0.1, -1)
    logits, loss = fused(idx, targets)
    assert logits is None
    want_logits, want = whole(idx, targets)
    assert want_logits.shape == (40, 32, 96)
    torch.testing.assert_close(loss, want)
    loss.backward(), want.backward()
    for (name, a), b in zip(fused.named_parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_activation_checkpointing_changes_memory_only():
    model, other = (
        make_random_model(dropout=0.2).train(),
        make_random_model(dropout=0.2, activation_checkpointing=True).train(),
    )
    idx, kept = torch.randint(96, (2, 4, 32)), {}
    for m in (model, other):
        torch.manual_seed(3)
        sizes = kept[m] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        )
        with hooks:
            _, loss = m(idx[0], idx[1])
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert sum(kept[other]) < 0.5 * sum(kept[model])


def test_under_autocast_the_residual_stream_is_bfloat16_and_gradients_stay_right():
    model = make_random_model(structure="dense", n_layer=6)
    idx, targets = torch.randint(96, (2, 8, 32)).unbind()
    seen = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    def loss_and_gradient():
        loss = model(idx, targets)[1]
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    want, exact = loss_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        got, gradient = loss_and_gradient()
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16] and got == pytest.approx(want, rel=5e-3)
    assert (gradient - exact).norm() < 0.03 * exact.norm()


class Operations(TorchDispatchMode):
    """Records every operator that runs, with shapes, strides and dtypes of the tensors it reads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [(tuple(a.shape), a.stride(), a.dtype) for a in args if isinstance(a, torch.Tensor)]
        self.seen.append((str(function), tensors))
        return function(*args, **(kwargs or {}))


def test_a_token_costs_a_structured_model_what_it_costs_a_dense_one():
    seen = []
    for structure in ("dense", "btt"):
        model = GPT(
            GPTConfig(structure=structure, n_layer=2, n_head=2, d_model=64, vocab_size=96, block_size=32)
        ).eval()
        idx = torch.zeros(3, 5, dtype=torch.long)
        with torch.no_grad(), multiplied_out(model):
            cache = KVCache(model.config, idx.device)
            model.trunk(idx, cache)
            with Operations() as operations:
                model.lm_head(model.trunk(idx[:, :1], cache)[:, -1])
        seen.append(operations.seen)
    assert seen[0] == seen[1] and len(seen[0]) > 50


def test_normalize_dense_caps_the_size_of_dense_layers_only_where_it_is_exceeded():
    shape = dict(block_size=8, vocab_size=32, n_layer=1, n_head=2, d_model=16)
    idx = torch.randint(32, (2, 8))
    for moe in ("none", "linear", "ffn"):
        options = dict(**shape, structure="dense", moe=moe)
        torch.manual_seed(0)
        plain = GPT(GPTConfig(**options))
        torch.manual_seed(0)
        model = GPT(GPTConfig(**options, normalize_dense=True))
        added = model.state_dict().keys() - plain.state_dict().keys()
        assert added and all(name.endswith(".gains") for name in added)
        for each in (
            plain,
            model,
        ):  # below the cap nothing changes; far above it, the size of a matrix does not matter
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.uniform_(
                        -0.1, 0.1, generator=torch.Generator().manual_seed(1)
                    ) if parameter.dim() > 1 else None
        torch.testing.assert_close(model.eval()(idx)[0], plain.eval()(idx)[0])
        for core in (core for layer in model.modules() if getattr(layer, "normalize", False) for core in layer.cores):
            core.data *= 100
        before = model(idx)[0]
        for core in (core for layer in model.modules() if getattr(layer, "normalize", False) for core in layer.cores):
            core.data *= 100
        torch.testing.assert_close(model(idx)[0], before)
        assert not torch.allclose(before, plain(idx)[0])
    one = GPTConfig(**shape, structure="btt", overrides={"attn.v": {"structure": "dense", "normalize": True}})
    assert GPT(one).blocks[0].attn.v.gains is not None and one.layer_options("lm_head")["normalize"]
    with pytest.raises(ConfigError, match="normalize_dense=True, but no layer is dense"):
        GPTConfig(**shape, normalize_dense=True)
    for options in (dict(normalize_dense=True), dict(overrides={"attn.v": {"structure": "dense", "normalize": True}})):
        with pytest.raises(ConfigError, match="take parametrization='mup'"):
            GPTConfig(**shape, structure="dense", parametrization="standard", **options)

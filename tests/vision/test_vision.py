"""Tests vision/: models against plain re-implementations, augmentation against loops and PIL, real runs of tiny models.

One more test runs if CIFAR10_PARQUET, or ../shared/data beside the repository, is a folder with CIFAR-10's parquet
files.
"""

import glob
import io
import itertools
import json
import math
import os
import re
import signal
from dataclasses import asdict, fields, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import optim
import train
import vision.data
import vision.images
import vision.regression
import vision.train
from configurator import ConfigError, load_config, read_config_file
from conftest import FILES_OF_A_RUN, ROOT, losses, read_rows, run_forked, run_script, start_script
from data import TokenData
from engine import checkpoint
from engine.parallel import split_batch
from kernels.cuda_graph import Graphed
from model import GPT
from optim import Optimizers
from train import TrainConfig, Trainer
from vision.augment import OPERATION_NAMES, Augment, crop_boxes, erase_boxes, inside, mix_boxes, moved, rand_operation
from vision.data import Held, Order, Streamed, rng
from vision.images import random_box
from vision.mlp import MLP
from vision.regression import RegressionConfig
from vision.sources import Split, open_splits
from vision.train import ImageTask, ImageTrainConfig
from vision.vit import ViT, patches

CPU = torch.device("cpu")
TINY = dict(
    dataset="digits", model="mlp", image_size=8, channels=1, n_classes=10, n_layer=2, d_model=36, batch_size=64, micro_batch=32,
    max_steps=20, eval_interval=10, log_interval=1, warmup_steps=5, lr=3e-3, base_width=64, device="cpu", compile=False,
)  # fmt: skip
TINY_VIT = dict(TINY, model="vit", patch_size=4, n_head=2)
AUGMENTED = dict(
    crop_padding=1, flip=True, mixup=0.4, cutmix=1.0, label_smoothing=0.1, random_erasing=0.3, rand_augment=2
)


def words(options):
    return [f"--{key}={value}" for key, value in options.items()]


def add_noise(model, scale=0.3):
    """Add noise to every parameter, so that none is zero and every path counts -> the model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(autouse=True)
def cache_in_temporary_folder(tmp_path_factory, monkeypatch):
    """Keep the cache of `datasets` in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


# -- models


@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_the_mlp_equals_its_formula(structure):
    config = ImageTrainConfig(**{**TINY, "structure": structure})
    model = add_noise(MLP(config))
    x = torch.randn(5, 1, 8, 8)
    order = np.random.default_rng(42).permutation(64)  # the published shuffle

    def dense(layer, x):
        return x @ layer.materialize().T + layer.bias

    h = F.gelu(dense(model.input, x.flatten(1)[:, order]), approximate="tanh")
    h = F.layer_norm(h, (36,), model.input_norm.weight, model.input_norm.bias)
    for block in model.blocks:
        n = F.layer_norm(h, (36,), block.norm.weight, block.norm.bias)
        h = h + math.sqrt(3 / 2) * dense(block.ffn.down, F.gelu(dense(block.ffn.up, n), approximate="tanh"))
    want = dense(model.head, h)
    got, loss = model(x, torch.arange(5))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, F.cross_entropy(want, torch.arange(5)))


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_the_vit_equals_its_formula(structure, pool):
    """Patches by loops, and attention written out: no mask, a LayerNorm per head, logits times 8 / d_head."""
    options = dict(TINY_VIT, structure=structure, pool=pool, image_size=12, channels=3, bias=structure == "dense")
    model = add_noise(ViT(ImageTrainConfig(**options)))
    x = torch.randn(3, 3, 12, 12)

    def dense(layer, x):
        y = x @ layer.materialize().T
        return y if layer.bias is None else y + layer.bias

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)

    cut = [x[:, :, i : i + 4, j : j + 4].permute(0, 2, 3, 1).flatten(1) for i in (0, 4, 8) for j in (0, 4, 8)]
    cut = torch.stack(cut, dim=1)
    assert torch.equal(patches(x, 4), cut)
    h = norm(model.input_norm, dense(model.input, norm(model.patch_norm, cut)))
    if pool == "token":
        h = torch.cat((model.class_embedding.expand(3, 1, -1), h), dim=1)
    h = h + model.position_embedding
    for block in model.blocks:
        n = norm(block.attn_norm, h)
        heads = []
        for head in (slice(0, 18), slice(18, 36)):
            q, k, v = (dense(layer, n)[..., head] for layer in (block.attn.q, block.attn.k, block.attn.v))
            q, k = norm(block.attn.q_norm, q), norm(block.attn.k_norm, k)
            heads.append((q @ k.transpose(1, 2) * 8 / 18).softmax(dim=-1) @ v)
        h = h + math.sqrt(3 / 2) * dense(block.attn.proj, torch.cat(heads, dim=-1))
        f = F.gelu(dense(block.ffn.up, norm(block.ffn_norm, h)), approximate="tanh")
        h = h + math.sqrt(3 / 2) * dense(block.ffn.down, f)
    h = norm(model.final_norm, h)
    want = dense(model.head, h[:, 0] if pool == "token" else h.mean(1))
    torch.testing.assert_close(model(x)[0], want, atol=2e-4, rtol=1e-4)
    probabilities = torch.rand(3, 10).softmax(1)
    torch.testing.assert_close(model(x, probabilities)[1], -(probabilities * want.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("options", [TINY, TINY_VIT, dict(TINY_VIT, pool="mean", patch_size=2, structure="dense")])
def test_flops_are_those_of_the_executed_graph(options):
    config = ImageTrainConfig(**options, overrides={"ffn": {"structure": "low_rank", "rank": 4}})
    model = vision.train.MODELS[config.model](config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(7, 1, 8, 8))
    assert counter.get_total_flops() == 7 * model.flops()


def test_mlps_shuffle_pixels_by_default():
    assert ImageTrainConfig(**TINY).shuffle_pixels is True and not ImageTrainConfig(**TINY_VIT).shuffle_pixels
    for name in ("mlp_cifar10", "mlp_cifar100", "quickstart"):
        assert load_config(ImageTrainConfig, [f"vision/config/{name}.py"]).shuffle_pixels is True
    as_they_are = ImageTrainConfig(**TINY, shuffle_pixels=False)
    assert not hasattr(MLP(as_they_are), "order") and hasattr(MLP(ImageTrainConfig(**TINY)), "order")
    for options in (TINY, TINY_VIT):  # the options in a run's config.json make the same run
        config = ImageTrainConfig(**options)
        assert asdict(ImageTrainConfig(**asdict(config))) == asdict(config)


def test_a_run_with_unshuffled_pixels_resumes_only_unshuffled(tmp_path, capsys):
    options = {**TINY, "max_steps": 2, "eval_interval": 2, "warmup_steps": 0, "out_dir": tmp_path / "run"}
    vision.train.main(words({**options, "shuffle_pixels": False}))
    more = {**options, "max_steps": 4, "resume": True}
    with pytest.raises(ConfigError, match="shuffle_pixels=True, but the checkpoint in .* has False: give that"):
        vision.train.main(words(more))
    capsys.readouterr()
    vision.train.main(words({**more, "shuffle_pixels": False}))
    assert "resuming from step 2" in capsys.readouterr().out


def test_models_start_at_zero_and_input_lr_sets_the_rates_of_the_input_layer():
    config = ImageTrainConfig(**{**TINY, "structure": "btt"}, input_lr=0.1)
    model = MLP(config)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x)[0], torch.zeros(4, 10))
    h = model.input_norm(F.gelu(model.input(x.flatten(1)), approximate="tanh"))
    assert torch.equal(model.blocks[0](h), h)
    rates = vision.train.image_lr_multipliers(config, model)
    # 64 = 8 x 8 -> 36: two cores, each with fan-in 8; a dense layer would have the rate 0.1
    assert rates["input.cores.0"] == pytest.approx(0.1 * 64 / (8 * 2)) and rates["input.bias"] == 0.1
    assert rates["head.weight"] == 64 / 36 and rates["input_norm.weight"] == 1
    dense = MLP(ImageTrainConfig(**{**TINY, "structure": "dense"}, input_lr=0.1))
    assert vision.train.image_lr_multipliers(dense.config, dense)["input.weight"] == pytest.approx(0.1)


@pytest.mark.parametrize("config_file", ["mlp_cifar10", "mlp_cifar100", "vit_cifar100", "regression", "pixels"])
def test_ffn_down_learns_at_the_published_rates(config_file):
    """At width 1024 the code of "Compute Better Spent" has these multipliers: its base model has FFNs of 64 x 4."""
    cls, model = {"regression": (RegressionConfig, MLP), "pixels": (TrainConfig, GPT)}.get(
        config_file, (ImageTrainConfig, None)
    )
    for structure, down, up in (("dense", [0.0625], [0.0625]), ("btt", [2.0, 2.0], [1.0, 1.0])):
        config = load_config(cls, [f"vision/config/{config_file}.py", "--d_model=1024", f"--structure={structure}"])
        with torch.device("meta"):
            built = (model or vision.train.MODELS[config.model])(config)
        rates = optim.lr_multipliers(built, config.base_width, config.base_ffn_expansion)
        for role, want in (("ffn.down", down), ("ffn.up", up)):
            assert [
                value for name, value in rates.items() if f"blocks.2.{role}." in name and not is_bias_or_gain(name)
            ] == want
        if model is not GPT:
            ours = vision.train.image_lr_multipliers(config, built)
            assert all(ours[name] == rates[name] for name in rates if not name.startswith("input."))


def test_train_py_uses_base_width_and_base_ffn_expansion(char_data, tmp_path):
    options = dict(data_dir=char_data, device="cpu", base_width=64, base_ffn_expansion=4, out_dir=tmp_path, vocab_size=96,
                   d_model=64, n_head=4, block_size=8, micro_batch=2, batch_tokens=16)  # fmt: skip
    config = load_config(TrainConfig, words(options))
    trainer = Trainer(config, train.TokenTask(config, CPU, TokenData(char_data, 8)), CPU)
    assert trainer.optimizers.multipliers == optim.lr_multipliers(trainer.model, 64, 4)
    assert trainer.optimizers.multipliers != optim.lr_multipliers(trainer.model)


def is_bias_or_gain(name):
    return name.endswith(("bias", "gains"))


def test_other_configs_keep_their_rates():
    for cls, path in ((ImageTrainConfig, "vision/config/vit_s32_imagenet.py"), (TrainConfig, "config/gpt2_btt.py")):
        assert load_config(cls, [path]).base_ffn_expansion == 1
    imagenet = load_config(
        ImageTrainConfig, ["vision/config/vit_s32_imagenet.py"]
    )  # as published: no depth scaling, and the published betas of Adam
    assert (imagenet.branch_scale, imagenet.beta2, imagenet.base_width) == (1, 0.95, 256)
    with pytest.raises(ConfigError, match="base_ffn_expansion=4 with parametrization='standard'"):
        TrainConfig(parametrization="standard", structure="dense", base_ffn_expansion=4)


def test_a_checkpoint_older_than_base_ffn_expansion_keeps_its_rates(tmp_path):
    """A checkpoint without the option was trained with 1, while the config files now set 4."""
    options = {**TINY, "out_dir": tmp_path / "run", "max_steps": 2, "eval_interval": 2}
    vision.train.main(words({**options, "base_ffn_expansion": 1}))
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["base_ffn_expansion"]
    torch.save(saved, path)
    options.update(max_steps=4, resume=True)
    with pytest.raises(ConfigError, match="base_ffn_expansion=4, but the checkpoint in .*run has 1: give that"):
        vision.train.main(words({**options, "base_ffn_expansion": 4}))
    vision.train.main(words({**options, "base_ffn_expansion": 1}))
    assert torch.load(path, weights_only=True)["step"] == 4


def test_an_input_layer_with_rate_zero_does_not_change(digits_held):
    _, _, held = digits_held
    config = ImageTrainConfig(**TINY, structure="btt", input_lr=0.0, weight_decay=0.1)
    task = ImageTask(config, CPU, held)
    run = Trainer(config, task, CPU)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    for step in range(3):
        run.update(*task.batch(step))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("input."), name


NUMBERS = [
    field.name
    for field in fields(ImageTrainConfig)
    if {int, float}
    & {get_type_hints(ImageTrainConfig)[field.name], *get_args(get_type_hints(ImageTrainConfig)[field.name])}
]


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_for_any_number_trains_or_is_one_clear_line(name, digits_held):
    _, _, held = digits_held
    try:
        config = ImageTrainConfig(**{**TINY_VIT, "d_head": 18, name: 0})
        task = ImageTask(config, CPU, held)
    except ConfigError as error:
        assert name in str(error) or name in ("top_k", "num_experts"), error
        return
    loss, _, norm = Trainer(config, task, CPU).update(*task.batch(0))
    assert loss.isfinite() and norm.isfinite()


PUBLISHED = ("published.py", "published_pixels.py")  # these are given after another config file


@pytest.mark.parametrize("path", sorted(glob.glob(f"{ROOT}/vision/config/*.py")), ids=os.path.basename)
def test_config_files_are_valid_at_every_published_width(path):
    if os.path.basename(path) in PUBLISHED:
        pytest.skip("not a config of its own: test_published_settings_of_images_and_pixels")
    import train

    kind = {"regression.py": vision.regression.RegressionConfig, "pixels.py": train.TrainConfig}.get(
        os.path.basename(path), ImageTrainConfig
    )
    config = load_config(kind, [path])
    if "imagenet" in path:
        for width in (784, 1936):
            load_config(kind, [path, f"--d_model={width}"])
        for width in (144, 484, 1296):
            load_config(kind, [path, "--rank=2", f"--d_model={width}"])
    assert config.max_steps != kind.max_steps


@pytest.mark.parametrize("file", ["mlp_cifar10", "mlp_cifar100", "vit_cifar10", "vit_cifar100", "vit_s32_imagenet"])
def test_published_settings_of_images_and_pixels(file, capsys):
    """Each option of the file is set, or left out with a note because the run does not read it."""
    paths = [f"{ROOT}/vision/config/{name}.py" for name in (file, "published")]
    config = load_config(ImageTrainConfig, paths)
    notes = capsys.readouterr().out
    for name, value in read_config_file(paths[1]).items():
        assert (getattr(config, name) == value) != (f"note: {name}={value}" in notes), name
    streamed = "imagenet" in file
    assert config.mixup_mode == "batch" and config.resized_crop != streamed and config.crop_padding == 0
    assert (config.model == "vit") == config.zero_init_q == (not config.qkv_bias) == config.input_norm


def test_published_settings_of_next_pixel_prediction():
    paths = [f"{ROOT}/vision/config/{name}.py" for name in ("pixels", "published_pixels")]
    config = load_config(TrainConfig, [*paths, "--structure=einsum", "--theta=.5,0,.5,0,.5,.5,0", "--d_model=64"])
    biased = {name for name, _ in GPT(config).named_parameters() if name.endswith("bias")}
    layers = {f"blocks.{i}.{role}.bias" for i in range(3) for role in ("attn.proj", "ffn.up", "ffn.down")}
    assert {name for name in biased if "norm" not in name} == layers | {"lm_head.bias"}
    assert {f"blocks.0.attn.{q}_norm.bias" for q in "qk"} < biased


# -- which images


def test_epochs_are_permutations_that_follow_each_other():
    order = Order(10, seed=3)
    epochs = [order.stretch(10 * e, 10).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert order.stretch(7, 20).tolist() == sum(epochs, [])[7:27]
    assert Order(10, seed=4).stretch(0, 10).tolist() != epochs[0]


@pytest.fixture(scope="module")
def digits_held():
    config = ImageTrainConfig(**{**TINY, **AUGMENTED})
    splits, classes = open_splits(config)
    return config, splits, Held(config, splits, CPU)


def test_held_batches_equal_a_loop(digits_held):
    config, splits, held = digits_held
    pixels = np.stack([splits["train"].read(i) for i in range(held.n)])
    x, y = held.images(*held.draw(5, 64, 0, 64))
    chosen = Order(held.n, config.seed).stretch(5 * 64, 64)
    shifts = rng(config.seed, vision.data.CROP, 5).integers(3, size=(64, 2))
    flips = rng(config.seed, vision.data.FLIP, 5).integers(2, size=64)
    assert 0 < flips.sum() < 64
    for row, i in enumerate(chosen):
        framed = np.pad(pixels[i], 1)
        top, left = shifts[row]
        want = framed[top : top + 8, left : left + 8]
        want = want[:, ::-1] if flips[row] else want
        assert np.array_equal(x[row, 0].numpy(), want) and y[row] == splits["train"].labels[i]
    assert held.mean[0] == pytest.approx(pixels.mean() / 255, abs=1e-6)


def test_a_batch_is_the_same_for_any_number_of_processes(digits_held):
    config, _, held = digits_held
    augment = Augment(config, held.mean, held.std, CPU)

    def share(start, stop):
        place = (64, start, stop)
        return augment(*held.images(*held.draw(3, *place)), augment.draw(3, *place))

    whole, parts = share(0, 64), [share(0, 16), share(16, 48), share(48, 64)]
    for k in (0, 1):
        torch.testing.assert_close(torch.cat([part[k] for part in parts]), whole[k], rtol=1e-6, atol=1e-6)
    val = [list(held.val_batches(rank, 2, 50)) for rank in (0, 1)]
    assert [len(batches) for batches in val] == [4, 4]
    labels = torch.cat([y for batches in val for _, y in batches])
    assert sorted(labels[labels >= 0].tolist()) == sorted(held.val_labels.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_held_images_become_rgb_and_square(monkeypatch, workers):
    monkeypatch.setattr(vision.data, "WORTH_A_WORKER", 1)
    monkeypatch.setattr(vision.data, "PIECE", 2)
    images = [
        Image.new("L", (20, 10), 7),
        Image.new("RGBA", (10, 10), (1, 2, 3, 4)),
        Image.new("RGB", (9, 30), (9, 8, 7)),
    ]
    split = Split(
        np.array([0, 1, 0, 1, 0, 1]), lambda i: encode(images[i]) if i < 3 else b"torn", lambda i: f"image {i}"
    )
    said = []
    config = ImageTrainConfig(**{**TINY, "channels": 3, "n_classes": 2, "workers": workers})
    held = Held(config, {"train": split, "val": split}, CPU, said.append)
    assert held.val.shape == (3, 3, 8, 8) and held.val_labels.tolist() == [0, 1, 0]
    assert held.val[:, :, 4, 4].tolist() == [[7, 7, 7], [1, 2, 3], [9, 8, 7]]
    assert "3 broken images left out, the last: image 5 (not an image of a known format)" in said and any(
        "other sizes" in text for text in said
    )


def encode(image, format="PNG"):
    """The image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


# -- augmentation


def scenes(n, C, S=24, seed=0):
    """Images with edges and few equal neighbours, in whole numbers from 0 to 255."""
    draw = np.random.default_rng(seed)
    small = draw.integers(30, 220, (n, C, S // 4, S // 4)).astype(np.float32)
    return F.interpolate(torch.from_numpy(small), (S, S), mode="bicubic").round().clamp(0, 255)


def as_pil(x):
    array = x.numpy().astype(np.uint8)
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def as_tensor(image):
    array = np.asarray(image).astype(np.float32)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def by_pil(name, image, level):
    factor = 1 + 0.9 * level
    if name in ("brightness", "colour", "contrast", "sharpness"):
        kind = {"brightness": "Brightness", "colour": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}[name]
        return getattr(ImageEnhance, kind)(image).enhance(factor)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * abs(level)))
    if name == "solarize":
        return ImageOps.solarize(image, 256 * (1 - abs(level)))
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    S = image.size[0]
    c, s = math.cos(level * math.pi / 6), math.sin(level * math.pi / 6)
    half, shift = S / 2, 150 / 331 * level * S
    matrix = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, 0.3 * level, -0.3 * level * half, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * level, 1, -0.3 * level * half),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
        "rotate": (c, -s, half - c * half + s * half, s, c, half - s * half - c * half),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_randaugments_operations_equal_pils(name, C):
    x = scenes(4, C)
    levels = torch.tensor([0.3, -0.3, 0.8, -1.0])
    got = rand_operation(x, torch.full((4,), OPERATION_NAMES.index(name)), levels)
    for image, level, mine in zip(x, levels.tolist(), got):
        want = as_tensor(by_pil(name, as_pil(image), level))
        if name in (
            "shear_x",
            "shear_y",
            "translate_x",
            "translate_y",
            "rotate",
        ):  # PIL does not blend pixels at the edges with black
            inner = F.pad(F.max_pool2d((want == 0).float(), 3, 1, 1)[:, 2:-2, 2:-2], [2] * 4, value=1) == 0
            assert inner.float().mean() > 0.3
            mine, want = mine[inner], want[inner]
        assert (mine - want).abs().max() <= 1.5, (mine - want).abs().max()


def test_operations_on_a_batch_equal_those_on_single_images():
    x, draw = scenes(40, 3), np.random.default_rng(0)
    x[:3], x[3, 0] = 77, 5  # a single value: autocontrast and equalize change nothing
    operations = torch.from_numpy(np.append([12, 13, 13, 12], np.arange(36) % 14))
    levels = torch.from_numpy(draw.uniform(-1, 1, 40).astype(np.float32))
    got = rand_operation(x, operations, levels)
    for i in range(40):
        want = rand_operation(x[i : i + 1], operations[i : i + 1], levels[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], want, atol=1e-3, rtol=1e-5)
    same = [torch.equal(got[i], x[i]) for i in range(40)]
    assert [OPERATION_NAMES[operations[i]] for i in range(3, 40) if same[i]] == ["identity"] * 3 and all(same[:3])


def test_operations_that_move_nothing_do_not_resample(monkeypatch):
    x = scenes(14, 3) * 0.7 + torch.rand(14, 3, 24, 24)  # fractions, as a second operation receives them
    numbers, levels = torch.arange(14), torch.full((14,), 0.5)
    assert not torch.equal(moved(x, torch.zeros(5, 14, 1, 1, 1)), x)  # resampling would change them
    got = rand_operation(x, numbers, levels)
    assert torch.equal(got[0], x[0])
    monkeypatch.setattr("vision.augment.moved", lambda x, levels: torch.zeros_like(x))
    unmoved = rand_operation(x, numbers, levels)
    for name, mine, other in zip(OPERATION_NAMES, got, unmoved):
        assert torch.equal(mine, other) == (name not in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"))


def test_mixing_equals_a_loop():
    """Images 2j and 2j + 1 are mixed within a box, and labels by its area; about half of the pairs are cut."""
    config = ImageTrainConfig(**{**TINY, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1})
    augment = Augment(config, [0.0], [1 / 255], CPU)  # so that pixels are not rescaled
    x, y = torch.rand(64, 1, 8, 8) * 255, torch.arange(64) % 10
    got, targets = augment(x, y, augment.draw(0, 64, 0, 64))
    boxes, amounts = mix_boxes(rng(config.seed, vision.data.MIX, 0), 64, 8, 0.4, 1.0)
    cuts = 0
    for i, ((top, bottom, left, right), amount) in enumerate(zip(boxes, amounts)):
        other, want = i ^ 1, x[i].clone()
        want[:, top:bottom, left:right] *= 1 - amount
        want[:, top:bottom, left:right] += amount * x[other][:, top:bottom, left:right]
        torch.testing.assert_close(got[i], want, atol=1e-3, rtol=1e-4)
        share = amount * (bottom - top) * (right - left) / 64
        label = 0.9 * ((1 - share) * F.one_hot(y[i], 10) + share * F.one_hot(y[other], 10)) + 0.01
        torch.testing.assert_close(targets[i].double(), label.double(), atol=1e-6, rtol=1e-5)
        cuts += amount == 1
    assert 16 <= cuts <= 48
    assert torch.allclose(targets.sum(1), torch.ones(64))


def test_mixup_mode_gives_one_weight_per_batch_or_per_pair():
    for mode, different in (("pair", 32), ("batch", 1)):
        _, amounts = mix_boxes(rng(0, 0, 0), 64, 8, 0.8, 0.0, mode)
        assert len(set(amounts)) == different and (amounts[::2] == amounts[1::2]).all()
    weights = np.array([mix_boxes(rng(0, 0, step), 64, 8, 0.8, 0.0, "batch")[1][0] for step in range(4000)])
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * 2.6), abs=0.005)  # the variance of Beta(a, a) is 1 / (4 (2 a + 1))
    boxes, amounts = mix_boxes(rng(0, 0, 3), 64, 8, 0.8, 1.0, "batch")
    assert (boxes == boxes[0]).all() and (amounts == amounts[0]).all()
    config = ImageTrainConfig(**{**TINY, "mixup": 0.8, "mixup_mode": "batch"})
    augment = Augment(config, [0.0], [1 / 255], CPU)
    x, y = torch.rand(64, 1, 8, 8) * 255, torch.arange(64) % 10
    (amount,) = set(mix_boxes(rng(config.seed, vision.data.MIX, 7), 64, 8, 0.8, 0.0, "batch")[1].tolist())
    got, targets = augment(x, y, augment.draw(7, 64, 0, 64))
    other = torch.arange(64) ^ 1
    torch.testing.assert_close(got, (1 - amount) * x + amount * x[other], atol=1e-3, rtol=1e-4)
    labels = F.one_hot(y, 10).float()
    torch.testing.assert_close(targets, (1 - amount) * labels + amount * labels[other])


def test_resized_crops_are_interpolated_parts_of_the_image():
    config = ImageTrainConfig(**{**TINY, "resized_crop": True, "min_crop": 0.2})
    augment = Augment(config, [0.0], [1 / 255], CPU)
    x, y = torch.rand(64, 1, 8, 8) * 255, torch.arange(64) % 10
    got, targets = augment(x, y, augment.draw(3, 64, 0, 64))
    assert torch.equal(targets, y)
    boxes = crop_boxes(rng(config.seed, vision.data.CROP, 3), 64, 8, 0.2)
    for image, mine, (top, bottom, left, right) in zip(x, got, boxes):
        part = image[None, :, top:bottom, left:right]
        want = F.interpolate(part, size=(8, 8), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(mine, want, atol=2e-3, rtol=1e-4)


def test_boxes_of_resized_crops_have_the_distribution_of_random_box():
    boxes = crop_boxes(rng(0, 0, 0), 20_000, 32, 0.08)
    loop = np.array(
        [random_box(draw, 32, 32, 0.08) for draw in [rng(0, 0, 1)] for _ in range(5000)]
    )  # left top right bottom
    for ours, theirs in zip(boxes.T, loop.T[[1, 3, 0, 2]]):
        assert ours.mean() == pytest.approx(theirs.mean(), abs=0.4) and ours.std() == pytest.approx(
            theirs.std(), abs=0.4
        )
    h, w = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert boxes.min() == 0 and boxes.max() == 32 and (h * w).min() / 1024 > 0.07 and (h * w).max() / 1024 > 0.97
    assert (np.maximum(h / w, w / h) < 1.5).all()
    assert (crop_boxes(rng(0, 0, 2), 50, 32, 1.0)[:, 1::2] >= 28).all()  # at this size only nearly square boxes fit


@pytest.mark.parametrize("input_norm", [True, False])
def test_input_norm_switches_the_norm_after_an_mlps_input_layer(input_norm):
    model = add_noise(MLP(ImageTrainConfig(**TINY, structure="dense", input_norm=input_norm)))
    x = torch.randn(5, 1, 8, 8)
    model.blocks = torch.nn.ModuleList()
    h = F.gelu(model.input(x.flatten(1)[:, model.order]), approximate="tanh")
    h = F.layer_norm(h, (36,), model.input_norm.weight, model.input_norm.bias) if input_norm else h
    torch.testing.assert_close(model(x)[0], model.head(h))


def test_mixup_amounts_and_cutmix_areas_follow_their_beta_distributions():
    boxes, amounts = mix_boxes(rng(0, 0, 0), 20_000, 32, 0.2, 0.0)
    assert (boxes == [0, 32, 0, 32]).all() and np.mean((amounts < 0.01) | (amounts > 0.99)) == pytest.approx(
        0.41, abs=0.03
    )
    boxes, amounts = mix_boxes(rng(0, 0, 1), 20_000, 32, 0.0, 1.0)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 1024
    assert (amounts == 1).all() and area.min() >= 0 and area.max() > 0.9
    assert area.mean() == pytest.approx(0.34, abs=0.02)  # it would be 1/2 if no box were clipped at the edges


def test_erasing_fills_a_rectangle_with_the_mean():
    boxes = erase_boxes(rng(0, 0, 0), 5000, 32, 0.25)
    h, w = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    erased = (h > 0) & (w > 0)
    assert erased.mean() == pytest.approx(0.25, abs=0.02)
    assert (boxes >= 0).all() and (boxes[:, [1, 3]] <= 32).all()
    assert (h * w)[erased].min() / 1024 > 0.01 and (h * w)[erased].max() / 1024 < 0.36
    mask = inside(torch.tensor([[1, 3, 2, 5], [0, 0, 4, 4]]), 6)
    assert mask.sum((1, 2, 3)).tolist() == [6, 0] and mask[0, 0, 1:3, 2:5].all()
    config = ImageTrainConfig(**{**TINY, "random_erasing": 1.0})
    augment = Augment(config, [0.5], [0.25], CPU)
    x, _ = augment(torch.full((64, 1, 8, 8), 255.0), torch.zeros(64).long(), augment.draw(0, 64, 0, 64))
    assert set(x.unique().tolist()) == {0.0, 2.0}


def test_random_crops_keep_within_their_bounds():
    draw = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box(draw, 300, 200, 0.08)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        shares.append((right - left) * (bottom - top) / 60_000)
        ratios.append((right - left) / (bottom - top))
    assert min(shares) > 0.07 and max(shares) > 0.85 and 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.55


# -- batches made in the update


def test_suggested_batches_are_accepted():
    tried = 0
    for batch_size, micro_batch, world, mixup in itertools.product((30, 96, 100), (2, 8, 14), (1, 2, 3), (0.0, 0.8)):
        options = dict(TINY, batch_size=batch_size, micro_batch=micro_batch, mixup=mixup)
        try:
            split_batch(ImageTrainConfig(**options), world)
        except ConfigError as error:
            for name, value in re.findall(r"(\w+)=(\d+)", str(error).split(": take ")[1]):
                split_batch(ImageTrainConfig(**{**options, name: int(value)}), world)
                tried += 1
    assert tried > 20


def test_an_update_that_prepares_its_batch_equals_one_on_a_prepared_batch(digits_held):
    config, _, held = digits_held
    tasks = whole, halved = ImageTask(config, CPU, held), ImageTask(config, CPU, held)
    prepare, halved.prepare = halved.prepare, lambda x, y: (x, y)
    inside_it, before_it = (Trainer(config, task, CPU) for task in tasks)
    rows = []
    for step in range(3):
        batch = whole.batch(step)
        rows.append(inside_it.update(*batch))
        assert torch.equal(rows[-1], before_it.update(*prepare(*batch)))
    assert torch.stack(rows)[:, 0].diff().abs().min() > 0
    for one, other in zip(inside_it.model.parameters(), before_it.model.parameters()):
        assert torch.equal(one, other)


class OnTheDevice(TorchDispatchMode):
    """Fails if an operation involves a tensor on the host: a CUDA graph can neither copy nor read from there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), f"{func} involves tensors on the host"
        return out


def fake_gpu(tensor, mode):
    """A tensor of this shape that claims to be on a GPU and has no values: reading one is an error."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize(
    "options", [{}, dict(crop_padding=0, resized_crop=True, mixup_mode="batch")], ids=["", "published"]
)
def test_preparing_a_batch_needs_nothing_from_the_host(digits_held, options):
    """No shape depends on values, no value is read, and nothing is copied from the host."""
    config, splits, _ = digits_held
    config = replace(config, **options)
    held, mode = Held(config, splits, CPU), FakeTensorMode()
    task = ImageTask(config, CPU, held)
    batch = task.batch(0)
    for owner in (held, task.augment):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                setattr(owner, name, fake_gpu(value, mode))
    batch = [fake_gpu(tensor, mode) for tensor in batch]
    for needs_host in (lambda x: x.cpu(), lambda x: x + torch.tensor(3.0)):  # the check itself works
        with pytest.raises(AssertionError), mode, OnTheDevice():
            needs_host(batch[0])
    with mode, OnTheDevice():
        x, y = task.prepare(*batch)
    assert x.shape == (2, 32, 1, 8, 8) and y.shape == (2, 32, 10) and x.dtype == y.dtype == torch.float32
    pixels, labels = torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.zeros(64).long()
    streamed = [fake_gpu(tensor, mode) for tensor in (pixels, labels, labels)]
    with mode, OnTheDevice():
        x, _ = Streamed.images(None, *streamed)
    assert x.shape == pixels.shape and x.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_batches_prepared_in_a_cuda_graph_equal_those_without(digits_held):
    config, splits, _ = digits_held
    device = torch.device("cuda", 0)
    data = Held(config, splits, device)
    task = ImageTask(config, device, data)

    def images(*batch):
        return task.prepare(*batch)[0]

    graphed = Graphed(images)
    for step in range(8):
        batch = task.batch(step)
        wrong = (graphed(*batch) - images(*batch)).abs() > 1e-3
        assert wrong.float().mean() < 1e-3  # posterize may round a value to another step


# -- runs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An unbroken run of 20 steps of a ViT, with every augmentation and a running mean of the weights -> out_dir."""
    out = str(tmp_path_factory.mktemp("unbroken") / "run")
    vision.train.main(words(dict(TINY_VIT, **AUGMENTED, ema=0.8, dropout=0.1, out_dir=out)))
    return out


def test_a_run_leaves_its_files_and_figures(unbroken, capsys):
    assert sorted(os.listdir(unbroken)) == FILES_OF_A_RUN
    rows = read_rows(unbroken)
    last, config = rows[-1], ImageTrainConfig(**TINY_VIT)
    assert [row["step"] for row in rows] == list(range(21))
    assert last["images"] == 20 * 64 and last["flops"] == 3 * 20 * 64 * ViT(config).flops()
    assert last["images_per_second"] > 0 and {"val_loss", "top1", "top5", "grad_norm", "lr"} <= set(last)
    assert rows[0]["val_loss"] == pytest.approx(math.log(10)) and rows[0]["top1"] < 0.2
    meta = torch.load(f"{unbroken}/ckpt.pt", weights_only=True)["meta"]
    assert meta["classes"] == [str(k) for k in range(10)] and meta["dataset"] == "digits"
    assert json.loads(json.dumps(meta)) == meta and len(meta["mean"]) == len(meta["std"]) == 1  # plain values


def test_the_evaluation_uses_all_images_and_the_averaged_weights(unbroken):
    config = load_config(ImageTrainConfig, words(json_options(unbroken)))
    saved = torch.load(f"{unbroken}/ckpt.pt", weights_only=True)
    model = ViT(config).eval()
    model.load_state_dict({name: saved["optimizer"][name]["ema"] for name in saved["model"]})
    splits, _ = open_splits(config)
    right = right5 = loss = 0
    for i, label in enumerate(splits["val"].labels):
        x = torch.from_numpy(splits["val"].read(i)).float() / 255
        with torch.no_grad():
            logits = model((x.view(1, 1, 8, 8) - saved["meta"]["mean"][0]) / saved["meta"]["std"][0])[0][0]
        loss -= logits.log_softmax(0)[label].item()
        ranks = logits.argsort(descending=True).tolist()
        right, right5 = right + (ranks[0] == label), right5 + (label in ranks[:5])
    row = read_rows(unbroken)[-1]
    n = len(splits["val"].labels)
    assert (row["top1"], row["top5"]) == (pytest.approx(right / n), pytest.approx(right5 / n))
    assert row["val_loss"] == pytest.approx(loss / n, rel=1e-5)


def json_options(out):
    with open(os.path.join(out, "config.json")) as file:
        return {key: value for key, value in json.load(file).items() if value is not None}


def test_the_running_mean_equals_a_loop():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = Optimizers(torch.nn.ParameterList([parameter]), [torch.optim.AdamW([parameter], lr=0.1)], {})
    optimizer.keep_average(0.9)
    mean = None
    for step in range(5):
        parameter.grad = torch.full((3,), float(step + 1))
        optimizer.step()
        mean = parameter.detach().clone() if mean is None else 0.9 * mean + 0.1 * parameter.detach()
    now = parameter.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(parameter.detach(), mean)
    assert torch.equal(parameter, now)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(unbroken, tmp_path):
    options = dict(json_options(unbroken), out_dir=str(tmp_path / "run"))
    os.makedirs(tmp_path / "run")
    os.link(f"{unbroken}/ckpt_prev.pt", tmp_path / "run" / "ckpt.pt")
    assert checkpoint.load(str(tmp_path / "run"))["step"] == 10
    vision.train.main([*words(options), "--resume"])
    for key in ("loss", "val_loss", "grad_norm", "top1"):
        got, want = losses(tmp_path / "run", key), losses(unbroken, key)
        assert len(got) >= 1 and all(got[step] == want[step] for step in got)
    ours, theirs = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in (tmp_path / "run", unbroken))
    for name, tensor in theirs["model"].items():
        assert torch.equal(tensor, ours["model"][name])
        assert torch.equal(theirs["optimizer"][name]["ema"], ours["optimizer"][name]["ema"])


def test_another_model_is_not_resumed(unbroken):
    options = dict(json_options(unbroken), patch_size=2)
    with pytest.raises(ConfigError, match="patch_size=2.*has 4"):
        vision.train.main([*words(options), "--resume"])


def test_two_processes_equal_one(tmp_path):
    options = dict(TINY, **AUGMENTED, max_steps=10, eval_interval=5)
    vision.train.main(words(dict(options, out_dir=tmp_path / "one")))
    done = run_forked("vision.train", *words(dict(options, out_dir=tmp_path / "two")), processes=2)
    assert done.returncode == 0, done.stderr
    for key in ("loss", "val_loss", "grad_norm", "top1", "images"):
        one, two = losses(tmp_path / "one", key), losses(tmp_path / "two", key)
        assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one), key


def test_on_a_cpu_a_config_made_for_a_gpu_starts_uncompiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: pytest.fail("compiled"))
    options = dict(TINY_VIT, max_steps=1, warmup_steps=0, compile="blocks", save=False, out_dir=tmp_path / "run")
    vision.train.main(words(options))
    assert "compile=blocks is for a GPU" in capsys.readouterr().out and losses(tmp_path / "run")[1] > 0


def test_on_a_cpu_the_duration_of_a_long_run_is_printed_first():
    said = []
    vision.train.say_if_long(1e9, said.append)
    assert said == []
    vision.train.say_if_long(1e19, said.append)
    assert len(said) == 1 and re.search(r"on this CPU .* at least \d+ d \d+ h .*1.0e\+19 FLOPs.*max_steps", said[0]), (
        said
    )


def test_a_vit_learns(tmp_path):
    vision.train.main(words(dict(TINY_VIT, max_steps=120, eval_interval=60, out_dir=tmp_path / "run")))
    top1 = losses(tmp_path / "run", "top1")
    assert top1[0] < 0.2 and top1[120] > 0.8


@pytest.mark.parametrize("options", [dict(TINY, moe="linear"), dict(TINY_VIT, moe="linear"), dict(TINY_VIT, moe="ffn")])
def test_mixtures_learn(options, tmp_path):
    options = dict(options, num_experts=4, max_steps=40, eval_interval=40, out_dir=tmp_path / "run")
    vision.train.main(words(options))
    row = read_rows(tmp_path / "run")[-1]
    assert row["top1"] > 0.4 and row["aux_loss"] > 0
    layers = {"mlp": ("ffn.up",), "vit": ("attn.q", "ffn.up") if options["moe"] == "linear" else ("ffn",)}[
        options["model"]
    ]
    assert {f"blocks.{k}.{name}" for k in (0, 1) for name in layers} <= set(row["moe"])
    config = load_config(ImageTrainConfig, words(json_options(tmp_path / "run")))
    model = vision.train.MODELS[config.model](config).train()
    logits, loss = model(torch.randn(6, 1, 8, 8), torch.arange(6))
    assert len(model.routers.reports) == len(row["moe"])
    torch.testing.assert_close(model.routers.cross_entropy, F.cross_entropy(logits, torch.arange(6)))
    assert loss > model.routers.cross_entropy


def test_the_quickstart_learns(tmp_path):
    path = f"{ROOT}/vision/config/quickstart.py"
    vision.train.main([path, "--max_steps=220", f"--out_dir={tmp_path}/run"])
    assert read_rows(tmp_path / "run")[-1]["top1"] > 0.95


def test_regression_learns_and_its_teacher_is_standardised(tmp_path):
    options = dict(
        teacher_layers=2, teacher_width=64, d_model=36, batch_size=256, micro_batch=128, max_steps=60, warmup_steps=5,
        eval_interval=30, eval_inputs=1024, lr=3e-3, base_width=64, device="cpu", compile=False, out_dir=tmp_path / "run",
    )  # fmt: skip
    vision.regression.main(words(options))
    val = losses(tmp_path / "run", "val_loss")
    assert val[0] == pytest.approx(1, abs=0.2) and val[60] < 0.4 * val[0]
    config = load_config(vision.regression.RegressionConfig, words(options))
    teacher = vision.regression.Teacher(config, CPU)
    x = torch.randn(20_000, 8)
    assert abs(teacher(x).mean()) < 0.1 and teacher(x).std() == pytest.approx(1, abs=0.1)
    h = x[0]
    for weight in teacher.weights[:-1]:
        h = torch.tensor([max(0, (row @ h).item()) * 2**0.5 for row in weight])
    assert teacher(x[:1]).item() == pytest.approx(
        ((teacher.weights[-1] @ h).item() - teacher.mean) / teacher.std, abs=1e-4
    )


# -- folders and parquet files


@pytest.fixture
def folder(tmp_path):
    """train/CLASS/* and val/CLASS/*: red, green and blue images of several sizes, modes and formats; some are broken."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 4)):
        for k, name in enumerate(("blue", "green", "red")):
            os.makedirs(tmp_path / "images" / split / name)
            for i in range(count):
                width, height = draw.integers(70, 140, 2)
                array = draw.integers(0, 60, (height, width, 3), dtype=np.uint8)
                array[..., 2 - k] += 150
                image = Image.fromarray(array)
                file = tmp_path / "images" / split / name / f"{i:02}"
                if i == 3:
                    image.convert("RGBA").save(f"{file}.png")
                elif i == 2 and split == "train":
                    file.with_suffix(".jpg").write_bytes(encode(image, "JPEG")[:500])
                else:
                    image.save(f"{file}.JPEG")
    return str(tmp_path / "images")


def streaming_options(folder, tmp_path, **more):
    options = dict(
        TINY, dataset="colours", data_dir=folder, image_size=32, channels=3, n_classes=3, stream=True, workers=0,
        batch_size=8, micro_batch=4, max_steps=12, eval_interval=6, flip=True, out_dir=tmp_path / "run",
    )  # fmt: skip
    return {**options, **more}


def test_a_folder_is_streamed_and_broken_files_are_skipped_and_counted(folder, tmp_path, capsys, monkeypatch):
    options = streaming_options(folder, tmp_path)
    vision.train.main(words(options))
    out = capsys.readouterr().out
    assert "broken images passed over so far, the last on this rank: " in out and "02.jpg" in out
    row = read_rows(tmp_path / "run")[-1]
    assert row["top1"] > 0.9 and row["broken"] >= 3
    vision.train.main(words(dict(options, max_steps=6, schedule="constant", out_dir=tmp_path / "two")))
    vision.train.main(words(dict(options, schedule="constant", out_dir=tmp_path / "two", resume=True)))
    monkeypatch.setattr(vision.data, "PIECE", 3)  # so that each worker's share comes in pieces
    vision.train.main(words(dict(options, schedule="constant", out_dir=tmp_path / "three", workers=1)))
    assert losses(tmp_path / "two") == losses(tmp_path / "three")


def test_a_dead_worker_ends_the_run_in_one_line(folder, tmp_path):
    options = streaming_options(folder, tmp_path, workers=1, max_steps=100_000, eval_interval=100_000)
    process = start_script("vision.train", *words(options))
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= 3:
            break
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        for child in file.read().split():
            os.kill(int(child), signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 1 and "Traceback" not in rest, rest
    assert "error: a process that decodes images ended" in rest and "fewer --workers" in rest


def test_a_fifo_among_the_images_counts_as_broken(folder, tmp_path):
    path = sorted(glob.glob(f"{folder}/val/*/*"))[0]
    os.remove(path)
    os.mkfifo(path)
    config = ImageTrainConfig(**{k: v for k, v in streaming_options(folder, tmp_path).items() if k != "out_dir"})
    data = Streamed(config, open_splits(config)[0], CPU)
    (_, labels), *_ = data.val_batches(0, 1, 12)
    assert labels[0] == -1 and data.last_broken.startswith(path)


def test_a_folder_of_broken_files_is_one_clear_line(folder, tmp_path):
    for path in glob.glob(f"{folder}/train/*/*"):
        os.truncate(path, 100)
    with pytest.raises(ConfigError, match=r"100 broken files in a row, the last: .*train/") as caught:
        vision.train.main(words(streaming_options(folder, tmp_path)))
    assert "\n" not in str(caught.value)


def test_streamed_images_equal_pils(folder, tmp_path):
    config = ImageTrainConfig(
        **{key: value for key, value in streaming_options(folder, tmp_path).items() if key != "out_dir"}, eval_resize=40
    )
    splits, classes = open_splits(config)
    assert classes == ["blue", "green", "red"]
    data = Streamed(config, splits, CPU)
    data.workers = 0
    (x, y), *_ = data.val_batches(0, 1, 12)
    assert y.tolist() == splits["val"].labels.tolist()
    for i in range(12):
        image = Image.open(splits["val"].name(i)).convert("RGB")
        scale = 40 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - 32) / 2 for side in image.size)
        want = as_tensor(image.crop((round(left), round(top), round(left) + 32, round(top) + 32)))
        assert (x[i] - want).abs().mean() < 12, i  # the same picture, but one was resized before the crop and one after
        assert (x[i].mean((1, 2)) - want.mean((1, 2))).abs().max() < 3
    boxes = [
        random_box(rng(config.seed, vision.data.CROP, k), *Image.open(splits["train"].name(5)).size, 0.08)
        for k in (0, 1)
    ]
    items = [vision.data.Images(config, splits["train"], True)[k, 5] for k in (0, 1)]
    assert boxes[0] != boxes[1] and not np.array_equal(items[0][0], items[1][0])


def test_with_little_shared_memory_workers_use_pipes_and_batches_stay_the_same(folder, tmp_path, monkeypatch):
    """A worker that finds shared memory full loses its batch, and the trainer would wait for it for ever."""
    options = {key: value for key, value in streaming_options(folder, tmp_path).items() if key != "out_dir"}
    config, said = ImageTrainConfig(**{**options, "workers": 1}), []
    batches = []
    for free in (1 << 40, 700 << 10):
        blocks = type("", (), dict(f_bavail=free // 1024, f_frsize=1024))
        monkeypatch.setattr(vision.data.os, "statvfs", lambda path, blocks=blocks: blocks)
        data = Streamed(config, open_splits(config)[0], CPU, said.append)
        batches.append((*data.draw(0, 8, 0, 8), *next(iter(data.val_batches(0, 1, 8)))))
        assert data.shares_memory == (free > 1 << 30)
    assert len(said) == 1 and "/dev/shm has 0.7 MiB free" in said[0] and "pipes" in said[0]
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda *args: pytest.fail("shared memory is used"))
    next(iter(data.val_batches(0, 1, 8)))


def test_decoding_by_torchvision_gives_the_same_picture(folder, tmp_path, monkeypatch):
    """gpu_decode on the CPU: workers choose the boxes, torchvision decodes JPEGs, PIL the rest."""
    pytest.importorskip("torchvision")
    options = {key: value for key, value in streaming_options(folder, tmp_path).items() if key != "out_dir"}
    batches, by_pil = [], []
    monkeypatch.setattr(
        vision.images, "decode", lambda raw, C, real=vision.images.decode: by_pil.append(raw[:2]) or real(raw, C)
    )
    for gpu_decode in (False, True):
        config = ImageTrainConfig(**options, gpu_decode=gpu_decode)
        data = Streamed(config, open_splits(config)[0], CPU)
        data.workers = 0
        batches.append(data.images(*data.draw(1, 8, 0, 8)))
    (x, y), (x2, y2) = batches
    assert b"\xff\xd8" not in by_pil and len(by_pil) <= 3  # only the PNGs
    assert torch.equal(y, y2) and (x - x2).abs().mean() < 12
    assert (x.mean((2, 3)) - x2.mean((2, 3))).abs().max() < 4


@pytest.fixture
def parquet_folder(tmp_path):
    import datasets

    def write(**columns):
        for split, count in (("train", 24), ("test", 12)):
            images = [
                {"bytes": encode(Image.new("RGB", (8, 8), (20 * (i % 3), 9, 9))), "path": None} for i in range(count)
            ]
            rows = {"img": images, "label": [i % 3 for i in range(count)]}
            rows.update({key: make(count) for key, make in columns.items()})
            datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "parquet" / f"three-{split}.parquet"))
        return str(tmp_path / "parquet")

    os.makedirs(tmp_path / "parquet")
    return write


def test_parquet_files_in_the_hubs_layout_train_a_model(parquet_folder, tmp_path):
    options = dict(
        TINY, dataset="three", data_dir=parquet_folder(), channels=3, n_classes=3, max_steps=4, eval_interval=4
    )
    vision.train.main(words(dict(options, out_dir=tmp_path / "run")))
    row = read_rows(tmp_path / "run")[-1]
    assert "top1" in row and "top5" not in row  # there are only three classes


def cifar10_folder():
    folder = os.environ.get("CIFAR10_PARQUET", os.path.join(ROOT, "..", "shared", "data"))
    return folder if glob.glob(os.path.join(folder, "cifar10-t*.parquet")) else None


def test_a_run_on_the_real_cifar10_learns(tmp_path):
    if cifar10_folder() is None:
        pytest.skip("CIFAR10_PARQUET names no folder with cifar10-train.parquet and cifar10-test.parquet")
    options = dict(
        TINY, dataset="cifar10", data_dir=cifar10_folder(), image_size=32, channels=3, d_model=64, crop_padding=4, flip=True,
        max_steps=60, eval_interval=60, batch_size=128, micro_batch=128, out_dir=tmp_path / "run",
    )  # fmt: skip
    vision.train.main(words(options))
    row = read_rows(tmp_path / "run")[-1]
    assert row["top1"] > 0.25 and row["images"] == 60 * 128
    mean = torch.load(f"{tmp_path}/run/ckpt.pt", weights_only=True)["meta"]["mean"]
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)  # the published mean of its 50,000 training images


# -- next-pixel prediction


def test_images_as_tokens_are_read_one_per_row(parquet_folder, tmp_path):
    out = str(tmp_path / "tokens")
    where = parquet_folder()
    done = run_forked("vision.data", f"--out_dir={out}", f"--data_dir={where}", "--dataset=three", "--image_size=4")
    assert done.returncode == 0, done.stderr
    assert "24 and 12 images of 48 tokens" in done.stdout
    data = TokenData(out, 48)
    x, y = data.train_batch(0, 0, 50, 0, 50)
    assert (x[:, 0] == 0).all()  # where every image starts
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert set(map(tuple, y.view(50, 16, 3)[:, 5].tolist())) == {(0, 9, 9), (20, 9, 9), (40, 9, 9)}
    assert data.val_rows(10**6).tolist() == [49 * i for i in range(12)]
    with pytest.raises(ConfigError, match="block_size=64.*49 tokens: take 48"):
        TokenData(out, 64)


def test_the_files_of_cifar5m_are_read(tmp_path):
    os.makedirs(tmp_path / "npz")
    parts = [np.random.default_rng(k).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8) for k in range(3)]
    for k, part in enumerate(parts):
        np.savez(tmp_path / "npz" / f"part{k}.npz", X=part, Y=np.zeros(5))
    options = vision.data.PixelsConfig(dataset="cifar5m", data_dir=str(tmp_path / "npz"), out_dir=str(tmp_path / "out"))
    assert vision.data.write_pixels(options)["train_tokens"] == 10 * 193
    rows = np.fromfile(tmp_path / "out" / "val.bin", np.uint8).reshape(5, 193)
    want = parts[2].reshape(5, 8, 4, 8, 4, 3).mean((2, 4))  # blocks of 4 x 4 pixels
    assert (rows[:, 0] == 0).all() and np.abs(rows[:, 1:].reshape(5, 8, 8, 3) - want).max() <= 1


# -- bad input


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(patch_size=3), ["patch_size=3", "image_size=8", "take patch_size="]),
        (dict(model="mlp", n_head=1, patch_size=8, pool="mean"), ["pool=mean", "model='mlp' has none"]),
        (dict(model="mlp", patch_size=8, n_head=2), ["n_head=2", "model='mlp'"]),
        (dict(shuffle_pixels=True), ["shuffle_pixels=True", "vit"]),
        (dict(channels=2), ["channels=2", "1 for grey"]),
        (dict(n_classes=9), ["n_classes=9", "labels up to 9", "take 10"]),
        (dict(batch_size=40), ["batch_size=40", "micro_batch 32", "take micro_batch=8, or batch_size=32"]),
        (dict(mixup=0.2, micro_batch=1), ["micro_batch=1", "even"]),
        (dict(mixup=-1), ["mixup=-1", "at least 0"]),
        (dict(ema=1.0), ["ema=1.0", "less than 1"]),
        (dict(gpu_decode=True), ["gpu_decode=True", "leave it out"]),
        (dict(stream=True, crop_padding=2), ["crop_padding=2", "min_crop"]),
        (dict(stream=True, resized_crop=True), ["resized_crop=True", "min_crop"]),
        (dict(resized_crop=True, crop_padding=2), ["crop_padding=2", "resized_crop has min_crop"]),
        (dict(min_crop=0.5), ["min_crop=0.5", "resized_crop=True"]),
        (dict(mixup_mode="batch"), ["mixup_mode=batch", "neither mixup nor cutmix"]),
        (dict(input_norm=False), ["input_norm=False", "model='vit'"]),
        (dict(model="mlp", patch_size=8, n_head=1, qkv_bias=False), ["qkv_bias=False", "model='mlp' has none"]),
        (dict(rand_level=3), ["rand_level=3", "rand_augment=2"]),
        (dict(parametrization="standard"), ["parametrization='standard'", "'mup'"]),
        (dict(d_model=62), ["d_out=62", "take d_model=60 or 64"]),
        (dict(structured_layers="attn,lm_head"), ["structured_layers", "lm_head", "head"]),
        (dict(data_dir="nowhere"), ["data_dir=nowhere", "not a folder"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_impossible_options_are_one_clear_line(options, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        vision.train.main(words({**TINY_VIT, "out_dir": tmp_path / "run", **options}))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in expected), message
    assert not (tmp_path / "run").exists()


def test_a_missing_torchvision_is_one_clear_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vision.data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gpu_decode=True needs torchvision.*pip install torchvision"):
        vision.train.main(words(streaming_options(folder, tmp_path, gpu_decode=True)))


def error_of(**options):
    with pytest.raises(ConfigError) as caught:
        vision.train.load_images(ImageTrainConfig(**{**TINY, "channels": 3, **options}), CPU, lambda *text: None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_wrong_folders_are_one_clear_line(folder, tmp_path):
    def check(*expected):
        message = error_of(dataset="colours", data_dir=folder, n_classes=3)
        assert all(word in message for word in expected), message

    os.rename(f"{folder}/val", f"{folder}/other")
    check("no val/", "val/CLASS/")
    os.makedirs(f"{folder}/val/white")
    check("val/CLASS/ holds no image")
    os.rmdir(f"{folder}/val/white")
    Image.new("RGB", (8, 8)).save(f"{folder}/val/loose.png")
    check("1 images but no folder for each class", "val/CLASS/")
    message = error_of(dataset="colours", data_dir=str(tmp_path / "images" / "other"), n_classes=3)
    assert "neither train/ and val/" in message and "*train*.parquet" in message


def test_wrong_columns_are_one_clear_line(parquet_folder):
    def check(options, *expected, **columns):
        message = error_of(dataset="three", data_dir=parquet_folder(**columns), n_classes=3, **options)
        assert all(word in message for word in expected), message

    check({}, "label -1 in train is out of range", label=lambda n: [i % 3 - 1 for i in range(n)])
    check({}, "n_classes=3", "labels up to 5", "take 6", label=lambda n: [i % 6 for i in range(n)])
    check({}, "label_field=label", "no whole numbers", label=lambda n: ["cat"] * n)
    check({"label_field": "kind"}, "label_field=kind", "img, label")
    check({"image_field": "label"}, "image_field=label", "no images")
    with open(os.path.join(parquet_folder(), "three-test.parquet"), "wb") as file:
        file.write(b"no parquet")
    message = error_of(dataset="three", data_dir=os.path.dirname(file.name), n_classes=3)
    assert "cannot be read" in message


def test_an_unreachable_hub_is_one_clear_line():
    done = run_script(
        "vision.train", "--dataset=nobody/nothing", env={"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: dataset=nobody/nothing") and "--data_dir" in line


def test_the_benchmark_prints_images_per_second(capsys):
    from lab import bench

    bench.main(["images", *words(dict(TINY_VIT, **AUGMENTED)), "--steps=2"])
    assert re.search(r"digits, 8 x 8, loaded and augmented: [\d,]+ images/s", capsys.readouterr().out)

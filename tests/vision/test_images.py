"""Tests which images are read and how unusual or broken ones are treated, against arrays they were made from."""

import io
import os
import struct
import tracemalloc
import zlib
from functools import partial

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vision.data
from configurator import ConfigError
from conftest import small_disk
from vision.data import Decoded, Held, Images, PixelsConfig, Streamed, npz_images, write_pixels
from vision.images import decode, to_square
from vision.options import DataConfig
from vision.sources import Split, check_labels, fingerprint_of_images, open_splits, parquet_files, parse_path
from vision.train import ImageTrainConfig

CPU = torch.device("cpu")
OPTIONS = dict(image_size=8, channels=3, n_classes=3, d_model=36, device="cpu")


@pytest.fixture(autouse=True)
def cache_in_temporary_folder(tmp_path_factory, monkeypatch):
    """Keep the cache of `datasets` in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encode(image, format="PNG", **how):
    """The image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def write_parquet(path, labels, images=None, **how):
    """Write a parquet file of tiny images, one for each label; an image's first value is its label."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if images is None:
        images = [encode(Image.new("RGB", (8, 8), (max(0, int(label or 0)), 0, 0))) for label in labels]
    cells = [image and {"bytes": image, "path": None} for image in images]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"img": pyarrow.array(cells, kind), "label": pyarrow.array(labels)})
    pyarrow.parquet.write_table(table, path, **how)


def split_labels(folder, dataset, say=lambda text: None):
    """{split: labels} of the data set that a run would open."""
    splits, _ = open_splits(ImageTrainConfig(**OPTIONS, dataset=dataset, data_dir=str(folder)), say)
    return {name: split.labels.tolist() for name, split in splits.items()}


# -- which parquet file is which split


@pytest.mark.parametrize(
    "path, split, owner",
    [
        ("train-00000-of-00002.parquet", "train", ()),
        ("cifar10-train.parquet", "train", ("cifar10",)),
        ("unconstrained-test-00000-of-00001.parquet", "test", ("unconstrained",)),
        ("data/fashion_mnist/validation/0000.parquet", "validation", ("data", "fashion-mnist")),
        ("train/part-00000.parquet", "train", ()),
        ("train2017.parquet", "train", ()),
        ("a_valid_1.parquet", "valid", ("a",)),
        ("Train.parquet", "train", ()),
        ("constrained.parquet", None, ()),
        ("latest/evaluation.parquet", None, ()),
    ],
)
def test_a_split_is_a_word_between_separators(path, split, owner):
    assert parse_path(path)[:2] == (split, owner)


@settings(deadline=None, max_examples=50)
@given(st.text("abcdefgijkmopqs", min_size=1, max_size=6), st.sampled_from("-_. "), st.sampled_from(["train", "test"]))
def test_a_split_inside_a_longer_word_is_not_a_split(word, separator, split):
    assert parse_path(f"{word}{separator}{split}.parquet")[0] == split
    assert parse_path(f"{word}{split}{word}.parquet")[0] is None


@pytest.mark.parametrize("pair", [("mnist", "fashion_mnist"), ("cifar10", "cifar100"), ("mnist", "emnist")])
@pytest.mark.parametrize("layout", ["{0}-{1}.parquet", "{0}/{1}-00000-of-00001.parquet", "{1}/{0}.parquet"])
def test_a_data_set_is_not_mixed_with_one_of_a_longer_name(pair, layout, tmp_path):
    for label, name in enumerate(pair):
        for split, count in (("train", 3), ("test", 2)):
            write_parquet(str(tmp_path / layout.format(name, split)), [label] * count)
    for label, name in enumerate(pair):
        assert split_labels(tmp_path, name) == {"train": [label] * 3, "val": [label] * 2}
    if "{1}/{0}" not in layout:
        with pytest.raises(ConfigError, match="train files of several data sets.*give --dataset="):
            split_labels(tmp_path, "other")


@pytest.mark.parametrize("dataset", ["x", "other"])
def test_a_split_of_another_kind_in_the_same_folder_is_not_mixed_in(dataset, tmp_path):
    for label, name in enumerate(("train", "test", "unconstrained-test", "extra-train")):
        write_parquet(str(tmp_path / "x" / f"{name}-00000-of-00001.parquet"), [label] * 2)
    assert split_labels(tmp_path, dataset) == {"train": [0, 0], "val": [1, 1]}


def test_the_first_split_with_labels_is_used_for_validation(tmp_path):
    write_parquet(str(tmp_path / "train-0.parquet"), [0, 1, 2])
    write_parquet(str(tmp_path / "unconstrained-test.parquet"), [2, 2, 2])
    write_parquet(str(tmp_path / "test-0.parquet"), [1, 1])
    said = []
    assert split_labels(tmp_path, "x", said.append) == {"train": [0, 1, 2], "val": [1, 1]}
    assert said[-2].startswith("train: train of") and said[-2].endswith("files: train-0.parquet")
    assert said[-1].startswith("val: test of") and said[-1].endswith("files: test-0.parquet")
    write_parquet(str(tmp_path / "validation-0.parquet"), [0])
    assert split_labels(tmp_path, "x")["val"] == [0]
    write_parquet(str(tmp_path / "validation-0.parquet"), [-1, -1])
    assert split_labels(tmp_path, "x", said.append)["val"] == [1, 1]
    assert any("validation of" in text and "has no labels: test is for validation" in text for text in said)
    write_parquet(str(tmp_path / ".ipynb_checkpoints" / "train-0.parquet"), [2])
    assert split_labels(tmp_path, "x")["train"] == [0, 1, 2]
    os.remove(tmp_path / "test-0.parquet")
    os.remove(tmp_path / "unconstrained-test.parquet")
    with pytest.raises(ConfigError, match="val split has no labels"):
        config = ImageTrainConfig(**OPTIONS, dataset="x", data_dir=str(tmp_path))
        check_labels(config, open_splits(config)[0], None)


def test_of_the_hubs_splits_one_with_labels_is_used_for_validation(monkeypatch):
    import datasets

    def make_split(labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"image": [Image.new("RGB", (8, 8)) for _ in labels], "label": labels}
        return datasets.Dataset.from_dict(rows, features)

    found = {"test": make_split([-1, -1]), "train": make_split([0, 1, 1]), "validation": make_split([1, 0])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    said = []
    for expected in ([1, 0], None):
        splits, classes = open_splits(ImageTrainConfig(**OPTIONS, dataset="some/where"), said.append)
        assert classes == ["a", "b"] and splits["train"].labels.tolist() == [0, 1, 1]
        if expected:
            assert splits["val"].labels.tolist() == expected and said[-1] == "val: validation of some/where"
            assert decode(splits["val"].read(1), 3).size == (8, 8) and "some/where" in splits["val"].name(1)
            found["validation"] = make_split([-1])
            found["test"] = make_split([0, 0, 1])
        else:
            assert splits["val"].labels.tolist() == [0, 0, 1] and said[-1] == "val: test of some/where"


# -- wrong cells and damaged files


def hold_images(folder, say=lambda text: None, **more):
    config = ImageTrainConfig(**OPTIONS, dataset="x", data_dir=str(folder), **more)
    return Held(config, open_splits(config, say)[0], CPU, say)


def test_null_and_wrong_cells_are_left_out_with_file_and_row(tmp_path):
    good = encode(Image.new("RGB", (8, 8)))
    write_parquet(str(tmp_path / "train-0.parquet"), [0, 1, None, 2], [good] * 4)
    write_parquet(str(tmp_path / "train-1.parquet"), [1, 2, 0, 1], [good, None, b"torn", good])
    write_parquet(str(tmp_path / "test-0.parquet"), [1.0, None, 1.5, 2.0], [good] * 4)
    said = []
    data = hold_images(tmp_path, said.append)
    assert data.labels.tolist() == [0, 1, 2, 1, 1] and data.val_labels.tolist() == [1, 2]
    text = "\n".join(said)
    assert (
        f"train: 1 of 8 rows left out, whose label is not a whole number, the first: {tmp_path}/train-0.parquet, row 2"
        in text
    )
    assert (
        f"test: 2 of 4 rows left out, whose label is not a whole number, the first: {tmp_path}/test-0.parquet, row 1"
        in text
    )
    assert (
        f"2 broken images left out, the last: {tmp_path}/train-1.parquet, row 2 (not an image of a known format)"
        in text
    )
    write_parquet(str(tmp_path / "test-0.parquet"), [1.5, 0.5])
    with pytest.raises(ConfigError, match="no whole numbers"):
        hold_images(tmp_path)


def test_a_damaged_page_is_one_line_with_file_and_rows(tmp_path):
    write_parquet(str(tmp_path / "test-0.parquet"), [0, 1])
    for k in (0, 1):
        noise = np.random.default_rng(k).integers(0, 256, (30, 40, 40, 3), dtype=np.uint8)
        images = [encode(Image.fromarray(array)) for array in noise]
        write_parquet(str(tmp_path / f"train-{k}.parquet"), [0, 1, 2] * 10, images, row_group_size=10)
    path = tmp_path / "train-1.parquet"
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    first = column.data_page_offset
    raw[first : first + 40] = b"\xff" * 40
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        hold_images(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and f"{path}, rows 10 to 19: " in message, message


def test_files_that_vanish_are_broken_images(tmp_path):
    folder = class_folders(tmp_path)
    config = ImageTrainConfig(**OPTIONS, dataset="x", data_dir=folder)
    splits, _ = open_splits(config)
    os.remove(splits["train"].name(1))
    said = []
    data = Held(config, splits, CPU, said.append)
    assert data.n == len(splits["train"].labels) - 1
    assert any("1 broken images left out" in text and "No such file" in text for text in said)


def test_a_worker_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(vision.data, "WORTH_A_WORKER", 1)
    split = Split(np.arange(3), lambda i: torch.utils.data.get_worker_info() and os._exit(1), str)
    ended = pytest.raises(ConfigError, match="a process that decodes images ended.*fewer --workers")
    with ended as caught, vision.data.workers_watched():
        Held(ImageTrainConfig(**OPTIONS, workers=1), {"train": split, "val": split}, CPU)
    assert "\n" not in str(caught.value)


def fail_to_share(storage):
    """Raise the error that torch raises."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_full_shared_memory_is_one_line(tmp_path, monkeypatch):
    """A tensor that the thread of a queue cannot share is lost, and all would wait for it for ever."""
    folder = class_folders(tmp_path)
    config = ImageTrainConfig(**OPTIONS, data_dir=str(folder), stream=True, workers=1)
    data = Streamed(config, open_splits(config)[0], CPU)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail_to_share)
    with (
        pytest.raises(ConfigError, match="shared memory is full.*--workers=0") as caught,
        vision.data.workers_watched(),
    ):
        data.draw(0, 2, 0, 2)
    assert "\n" not in str(caught.value)
    data.workers, data.next_step = 0, None
    assert data.draw(0, 2, 0, 2)[0].shape == (2, 3, 8, 8)  # the remedy works


def test_fifos_are_broken_images_and_not_waited_for(tmp_path):
    folder = class_folders(tmp_path)
    os.mkfifo(f"{folder}/train/blue/fifo.png")
    os.mkfifo(f"{folder}/train-fifo.parquet")
    config, said = ImageTrainConfig(**OPTIONS, data_dir=str(folder)), []
    splits, _ = open_splits(config)
    data = Held(config, splits, CPU, said.append)
    assert data.broken == 1 and any("fifo.png (not a regular file)" in text for text in said)
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="holds neither train/ and val/"):
        write_pixels(PixelsConfig(data_dir=str(tmp_path), out_dir=str(tmp_path / "out")))


def test_changed_images_change_the_fingerprint(tmp_path):
    folder, found = class_folders(tmp_path), set()
    config = ImageTrainConfig(**OPTIONS, data_dir=str(folder))

    def add():
        found.add(fingerprint_of_images(open_splits(config)[0]["train"]))
        return len(found)

    assert (add(), add()) == (1, 1)
    image = min(entry.path for entry in os.scandir(f"{folder}/train/blue"))
    Image.new("RGB", (9, 9)).save(image)
    assert add() == 2
    os.remove(image)
    assert add() == 3


# -- class folders


def class_folders(tmp_path, val="val"):
    for split in ("train", val):
        for k, name in enumerate(("blue", "green", "red")):
            os.makedirs(tmp_path / "images" / split / name)
            for i in range(2):
                Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "images" / split / name / f"{i}.png")
    return str(tmp_path / "images")


def test_class_folders_may_hold_hidden_nested_and_loose_files(tmp_path):
    folder, dot = class_folders(tmp_path, val="valid"), b"no image"
    os.makedirs(f"{folder}/train/.ipynb_checkpoints")
    os.makedirs(f"{folder}/train/red/.thumbnails")
    os.makedirs(f"{folder}/train/red/more/inside")
    image = Image.new("RGB", (8, 8), (2, 0, 0))
    for path in (".ipynb_checkpoints/a.png", "red/._0.png", "red/.thumbnails/b.png"):
        with open(f"{folder}/train/{path}", "wb") as file:
            file.write(dot)
    image.save(f"{folder}/train/red/more/inside/c.TIF")
    image.save(f"{folder}/train/red/d.tiff")
    image.save(f"{folder}/train/loose.png")
    said = []
    config = ImageTrainConfig(**OPTIONS, dataset="x", data_dir=folder)
    splits, classes = open_splits(config, said.append)
    assert classes == ["blue", "green", "red"]
    data = Held(config, splits, CPU, said.append)
    assert data.broken == 0 and data.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert data.train[:, 0, 0, 0].tolist() == data.labels.tolist()  # the colour encodes the class
    assert any("in no class folder" in text and text.endswith(": 1") for text in said)
    assert f"val: 6 images in 3 class folders of {folder}/valid" in said


@pytest.mark.parametrize("lacking, other", [("train", "val"), ("val", "train")])
def test_a_class_that_one_split_lacks_is_noted(lacking, other, tmp_path):
    folder = class_folders(tmp_path)
    os.rename(f"{folder}/{lacking}/green", tmp_path / "green")
    config, said = ImageTrainConfig(**OPTIONS, dataset="x", data_dir=folder), []
    splits, classes = open_splits(config)
    check_labels(config, splits, classes, said.append)
    assert classes == ["blue", "green", "red"]
    assert splits[lacking].labels.tolist() == [0, 0, 2, 2] and splits[other].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert said == [f"note: classes of {other} without an image in {lacking}: 1, green"]


# -- unusual images


def encode_at_depth(depth):
    """Grey values 0, 64, … in a file of this depth, and the same values in 8 bits."""
    want = np.array([[0, 64], [128, 255]], np.uint8)
    share = want / 255
    kinds = {
        "png16": lambda: encode(Image.fromarray((share * 65535).round().astype(np.uint16))),
        "tiff16": lambda: encode(Image.fromarray((share * 65535).round().astype(np.uint16)), "TIFF"),
        "pgm16": lambda: b"P5 2 2 65535\n" + (share * 65535).round().astype(">u2").tobytes(),
        "tiff32 of 16": lambda: encode(Image.fromarray((share * 65535).round().astype(np.int32)), "TIFF"),
        "tiff32": lambda: encode(Image.fromarray((share * (2**31 - 1)).astype(np.int32)), "TIFF"),
        "tiff32 of 8": lambda: encode(Image.fromarray(want.astype(np.int32)), "TIFF"),
        "float of 1": lambda: encode(Image.fromarray(share.astype(np.float32)), "TIFF"),
        "float of 255": lambda: encode(Image.fromarray(want.astype(np.float32)), "TIFF"),
        "float of 1e6": lambda: encode(Image.fromarray((share * 1e6).astype(np.float32)), "TIFF"),
        "8": lambda: encode(Image.fromarray(want)),
        "bits": lambda: encode(Image.fromarray(want).convert("1", dither=Image.Dither.NONE)),
    }
    return kinds[depth](), want if depth != "bits" else np.where(want > 127, 255, 0)


@pytest.mark.parametrize(
    "depth",
    ["png16", "tiff16", "pgm16", "tiff32 of 16", "tiff32", "tiff32 of 8", "float of 1", "float of 255", "float of 1e6", "8", "bits"],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_images_are_scaled_to_8_bits(depth, channels):
    raw, want = encode_at_depth(depth)
    image = np.asarray(decode(raw, channels)).astype(int)
    for channel in np.atleast_3d(image).transpose(2, 0, 1):
        assert np.abs(channel - want).max() <= 1, channel


def test_a_dark_16_bit_image_stays_dark():
    raw = encode(Image.fromarray(np.full((4, 4), 1000, np.uint16)))
    assert np.asarray(decode(raw, 1)).max() == round(1000 / 257)


def turn(array, orientation):
    """The array as a camera with this EXIF orientation stores it, by the table of the standard."""
    return {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: lambda a: np.rot90(a, -1),
    }[orientation](array)  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(format, orientation):
    quarters = np.zeros((64, 96, 3), np.uint8)  # black, red; green, white
    quarters[:32, 48:], quarters[32:, :48], quarters[32:, 48:] = (255, 0, 0), (0, 255, 0), 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"quality": 95} if format in ("JPEG", "WEBP") else {}
    raw = encode(Image.fromarray(np.ascontiguousarray(turn(quarters, orientation))), format, exif=exif, **how)
    image = decode(raw, 3)
    assert image.size == (96, 64)
    split = Split(np.array([0]), lambda i: raw, str)
    small = Decoded(ImageTrainConfig(**OPTIONS), split)[0][1]
    config = ImageTrainConfig(**{**OPTIONS, "image_size": 16}, stream=True, eval_resize=16)
    (streamed, _, _, broken) = Images(config, split, False)[0, 0]
    assert not broken
    for pixels, S in ((small, 8), (streamed, 16)):  # (3, S, S)
        low, high = S // 4, 3 * S // 4
        got = [pixels[:, y, x].tolist() for y in (low, high) for x in (low, high)]
        want = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]]
        assert np.abs(np.subtract(got, want)).max() < 30, got


def test_broken_exif_does_not_break_an_image(recwarn):
    raw = encode(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff torn")
    assert decode(raw, 3).size == (8, 8) and not recwarn.list


def make_bomb(width, height):
    """A PNG of at most a kilobyte that claims this size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_thin_image_takes_no_more_memory_than_its_pixels(size, monkeypatch):
    largest, real = [0], Image.Image.resize

    def resize(image, size, *how, **more):
        largest[0] = max(largest[0], size[0] * size[1])
        return real(image, size, *how, **more)

    monkeypatch.setattr(Image.Image, "resize", resize)
    split = Split(np.array([0]), lambda i: encode(Image.new("L", size, 7)), str)
    seen, pixels = Decoded(ImageTrainConfig(**{**OPTIONS, "image_size": 224}, stream=False), split)[0]
    assert seen == size and (pixels == 7).all() and largest[0] <= 224**2
    for training in (False, True):
        config = ImageTrainConfig(**{**OPTIONS, "image_size": 224}, stream=True)
        pixels, label, _, broken = Images(config, split, training)[0, 0]
        assert label == 0 and not broken and (pixels == 7).all()
    assert largest[0] <= 224**2


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000)])  # PIL warns of the first and refuses the second
def test_an_image_of_too_many_pixels_counts_as_broken(size, recwarn):
    split = Split(np.array([0]), lambda i: make_bomb(*size), lambda i: "bomb.png")
    size, reason = Decoded(ImageTrainConfig(**OPTIONS), split)[0]
    assert size is None and "decompression bomb" in reason
    _, label, _, broken = Images(ImageTrainConfig(**OPTIONS, stream=True), split, False)[0, 0]
    assert label == -1 and len(broken) == 1 and broken[0].startswith("bomb.png (")
    assert not recwarn.list


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20))
def test_to_square_takes_the_centre(width, height, size):
    array = np.arange(width)[None] * 4 + np.zeros((height, 1))
    image = to_square(Image.fromarray(array.astype(np.uint8)), size, Image.Resampling.BOX)
    side = min(width, height)
    left = (width - side) // 2
    assert image.size == (size, size)
    if (width, height) != (size, size):
        assert np.asarray(image).mean() == pytest.approx(array[0, left : left + side].mean(), abs=1)


# -- statistics and pixel files


def test_mean_and_std_are_plain_numbers_over_all_pixels():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5000, 3, 4, 4), dtype=np.uint8))
    mean, std = vision.data.mean_and_std(images)
    of_channel = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(of_channel.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(of_channel.std(1).tolist(), rel=1e-12)
    order = torch.randperm(5000)
    assert vision.data.mean_and_std(images[order]) == (mean, std)  # bit for bit, since a resumed run compares them
    assert all(type(value) is float for value in mean + std)


def test_two_writers_of_pixels_do_not_collide(tmp_path):
    """A second writer starts and finishes in the same folder while the first is writing."""
    folder, out = tmp_path / "data", tmp_path / "out"
    write_parquet(str(folder / "train-0.parquet"), [0, 1, 2])
    write_parquet(str(folder / "test-0.parquet"), [1, 2])
    config = partial(PixelsConfig, dataset="x", data_dir=str(folder), image_size=2)
    real, meta = vision.data.to_square, []

    def interrupted(*how):
        if not meta:
            meta.append(None)
            meta[0] = write_pixels(config(out_dir=str(out)))
        return real(*how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision.data, "to_square", interrupted)
        assert write_pixels(config(out_dir=str(out))) == meta[0]
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]
    rows = np.fromfile(out / "train.bin", np.uint8).reshape(3, 13)
    assert rows[:, 1].tolist() == [0, 1, 2]


def write_npz(path, images):
    np.savez(path, X=np.asarray(images, np.uint8), Y=np.arange(len(images)))
    return path


def test_images_of_npz_files_are_read_one_by_one(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(5, 4, 6, 3))
    np.savez_compressed(tmp_path / "a.npz", X=images.astype(np.uint8))
    for path in (tmp_path / "a.npz", write_npz(tmp_path / "b.npz", images)):
        assert np.array_equal([np.asarray(image) for image in npz_images(str(path))], images)
    write_npz(tmp_path / "large.npz", np.zeros((2000, 32, 32, 3)))  # 6 MB
    tracemalloc.start()
    assert sum(1 for _ in npz_images(str(tmp_path / "large.npz"))) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


def test_npz_files_damaged_anywhere_are_one_line(tmp_path):
    random, path = np.random.default_rng(0), write_npz(tmp_path / "a.npz", np.zeros((20, 4, 4, 3)))
    whole, failures = path.read_bytes(), 0
    for _ in range(200):
        spoilt = bytearray(whole)
        for at in random.integers(len(whole), size=3):
            spoilt[at] = random.integers(256)
        path.write_bytes(spoilt[: random.integers(len(whole))] if random.random() < 0.2 else spoilt)
        try:
            list(npz_images(str(path)))
        except ConfigError as error:
            failures += 1
            assert "\n" not in str(error) and "a.npz" in str(error)
    assert failures > 50


def test_a_full_disk_and_an_unwritable_folder_are_one_line(tmp_path):
    for name in ("a", "b"):
        write_npz(tmp_path / f"{name}.npz", np.zeros((200, 8, 8, 3)))
    options = dict(data_dir=str(tmp_path), image_size=8)
    with small_disk(10_000), pytest.raises(ConfigError, match="out cannot be written .File too large.*make room"):
        write_pixels(PixelsConfig(**options, out_dir=str(tmp_path / "out")))
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(ConfigError, match="/proc/out cannot be written"):
        write_pixels(PixelsConfig(**options, out_dir="/proc/out"))
    with pytest.raises(ConfigError, match="image_size=1000000: .*at most 4096"):
        PixelsConfig(data_dir=str(tmp_path), image_size=10**6)


def test_a_broken_npz_is_one_line(tmp_path):
    for k in (0, 1):
        np.savez(tmp_path / f"part{k}.npz", X=np.zeros((2, 4, 4, 3), np.uint8))
    config = PixelsConfig(dataset="x", data_dir=str(tmp_path), out_dir=str(tmp_path / "out"), image_size=2)
    (tmp_path / "part0.npz").write_bytes((tmp_path / "part0.npz").read_bytes()[:100])
    with pytest.raises(ConfigError, match="part0.npz cannot be read"):
        write_pixels(config)
    np.savez(tmp_path / "part0.npz", X=np.zeros((2, 4, 4)))
    with pytest.raises(ConfigError, match=r"part0.npz cannot be read .its X is not images, uint8 \(n, H, W, 3\)"):
        write_pixels(config)
    assert os.listdir(tmp_path / "out") == []


def test_integers_beyond_16_bits_are_scaled():
    image = Image.fromarray(np.array([[0, 35_000], [70_000, 70_000]], np.int32))
    assert np.asarray(decode(encode(image, "TIFF"), 1)).tolist() == [[0, 128], [255, 255]]


def test_of_several_data_sets_one_with_all_splits_is_offered(tmp_path):
    for folder, splits in (("a_noisy", ("train",)), ("plain", ("train", "test"))):
        (tmp_path / folder).mkdir()
        for split in splits:
            (tmp_path / folder / f"{split}-0.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="several data sets .*: give --dataset=plain, or a folder of one"):
        parquet_files(DataConfig(dataset="cifar10", data_dir=str(tmp_path)))

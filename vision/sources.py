"""Where images and labels come from: scikit-learn's digits, the Hugging Face hub, parquet files, a folder of class folders.

Nothing is decoded here. A Split holds the labels, and reads the bytes of an image when asked.
"""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from configurator import ConfigError
from text_files import first_line

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
IMAGE_FIELDS, LABEL_FIELDS = ("img", "image"), ("label", "fine_label")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that exists, and has labels, is for validation
SPLIT_WORDS = {name: name for name in ("train", *VAL_NAMES)} | {"training": "train", "testing": "test"}
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class Split(NamedTuple):
    """The images of one split, not yet decoded."""

    labels: np.ndarray  # (n,) int64
    read: Callable  # i -> bytes of an image file, or uint8 (H, W); raises exceptions of many kinds
    name: Callable  # i -> what to call it in a message


def open_splits(config, say=lambda text: None):
    """The images that a DataConfig names -> {"train": Split, "val": Split}, names of the classes or None.

    say  called with a line about what each split is made of
    ConfigError if there are none.
    """
    if config.dataset == "digits" and config.data_dir is None:
        return open_digits()
    if config.data_dir is None:
        return open_hub(config, say)
    if not os.path.isdir(config.data_dir):
        raise ConfigError(f"data_dir={config.data_dir} is not a folder: give one, or leave it out to use the hub")
    if os.path.isdir(os.path.join(config.data_dir, "train")) and "train" not in parquet_files(config):
        try:
            return open_class_folders(config.data_dir, say)
        except OSError as error:
            raise ConfigError(f"data_dir={config.data_dir}: {error.filename}: {error.strerror}") from None
    return open_parquet(config, say)


def open_digits():
    """1797 grey images of 8 x 8 pixels, 17 levels; every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "dataset=digits comes with scikit-learn, which is missing: pip install scikit-learn"
        ) from None
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    held_out = np.arange(len(labels)) % 5 == 4
    splits = {}
    for split, chosen in (("train", ~held_out), ("val", held_out)):
        pixels = images[chosen]
        splits[split] = Split(labels[chosen].astype(np.int64), pixels.__getitem__, lambda i: f"digit {i}")
    return splits, [str(digit) for digit in range(10)]


def open_class_folders(root, say):
    """root/train/CLASS/… and root/val/CLASS/…: each folder of train or val is a class, with all folders inside it.

    Labels number the classes in alphabetical order. Names that start with a dot are ignored.
    """
    val = next((name for name in VAL_NAMES if os.path.isdir(os.path.join(root, name))), None)
    if val is None:
        raise ConfigError(f"data_dir={root} has train/ but no val/: put the validation images in val/CLASS/")
    folders = {"train": os.path.join(root, "train"), "val": os.path.join(root, val)}
    names, splits = {}, {}
    for split, folder in folders.items():
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        names[split] = {entry.name for entry in entries if entry.is_dir()}
        loose = sum(is_image(entry.name) for entry in entries)
        if not names[split]:
            raise ConfigError(f"{folder} has {loose} images but no folder for each class: put them in {folder}/CLASS/")
        if loose:
            say(f"note: images of {folder} that are in no class folder are not read: {loose}")
    classes = sorted(names["train"] | names["val"])
    for split, folder in folders.items():
        files, labels = [], []
        for label, name in enumerate(classes):
            found = image_files(os.path.join(folder, name))
            files += found
            labels += [label] * len(found)
        if not files:
            raise ConfigError(f"{folder}/CLASS/ holds no image ({' '.join(ENDINGS)})")
        say(f"{split}: {len(files):,} images in {len(set(labels))} class folders of {folder}")
        splits[split] = Split(np.array(labels), Files(files), files.__getitem__)
    return splits, classes


def is_image(name):
    """Whether a file of that name is an image, not hidden."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def image_files(folder):
    """Paths of the images in a folder and those inside it, in alphabetical order."""
    found = []
    for top, inside, names in os.walk(folder, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [os.path.join(top, name) for name in names if is_image(name)]
    return sorted(found)


class Files(list):
    """Paths; called with i, the bytes of file i."""

    def __call__(self, i):
        return read_file(self[i])


def read_file(path):
    """The bytes of a file. ValueError if it is not a regular one: opening a FIFO would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def fingerprint_of_images(split, images=16):
    """16 hexadecimal digits that tell splits apart, from all labels and the bytes of some images, spread evenly."""
    digest = hashlib.sha256(np.ascontiguousarray(split.labels).tobytes())
    for i in np.linspace(0, len(split.labels) - 1, images).astype(int):
        with suppress(Exception):  # a broken image, which is counted where it is decoded
            digest.update(split.read(int(i)))
    return digest.hexdigest()[:16]


def open_hub(config, say):
    import datasets

    name = HUB.get(config.dataset, config.dataset)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # whatever the network layer raises
        raise ConfigError(
            f"dataset={config.dataset}: {name} could not be loaded from the hub ({type(error).__name__}: {first_line(error)}): check "
            "name, network and login, or give --data_dir with a local copy"
        ) from None
    return open_columns(config, list(found), found.__getitem__, name, say)


def parquet_files(config):
    """The .parquet files under data_dir -> {split: paths}; split: train, or one of VAL_NAMES.

    A split's name is a word between separators in a file's name, or else in that of the nearest folder. What precedes
    it, folders included, names the data set that a file belongs to. Those of `dataset` are taken, if there are any, and
    of these for each split those with the fewest names before it. ConfigError if they belong to several data sets.
    """
    wanted = "-".join(name_words(os.path.basename(config.dataset)))
    paths = visible_files(config.data_dir, ".parquet")
    found = [(path, *parse_path(os.path.relpath(path, config.data_dir))) for path in paths]
    found = [row for row in found if wanted in row[3]] or found
    chosen = {}
    for split in ("train", *VAL_NAMES):
        owners = {path: owner for path, of, owner, _ in found if of == split}
        fewest = min(map(len, owners.values()), default=0)
        owners = {path: owner for path, owner in owners.items() if len(owner) == fewest}
        several = sorted(set(owners.values()))
        if len(several) > 1:
            if split != "train" and len(chosen) > 1:
                continue  # another is for validation
            whole = {owner for _, of, owner, _ in found if of in VAL_NAMES}  # data sets with files for validation
            one = next((owner for owner in several if owner in whole), several[0])
            raise ConfigError(
                f"data_dir={config.data_dir} has {split} files of several data sets "
                f"({', '.join(map('/'.join, several))}): give --dataset={one[-1]}, or a folder of one"
            )
        if owners:
            chosen[split] = list(owners)
    return chosen


def visible_files(folder, ending):
    """Paths of the regular files below a folder, in alphabetical order, without names that start with a dot."""
    paths = []
    for top, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".")]
        paths += [os.path.join(top, name) for name in names if name.endswith(ending) and not name.startswith(".")]
    return sorted(filter(os.path.isfile, paths))


def name_words(text):
    """'Fashion_MNIST-2' -> ['fashion', 'mnist', '2']"""
    return re.findall(r"[a-z0-9]+", text.lower())


def parse_path(path):
    """'fashion_mnist/train-00000-of-00002.parquet' -> 'train', ('fashion-mnist',), all names that a data set might have.

    None, (), set() for a path that names no split.
    """
    parts = [name_words(part) for part in path.removesuffix(".parquet").split(os.sep)]
    for depth in reversed(range(len(parts))):
        for at, word in enumerate(parts[depth]):
            split = SPLIT_WORDS.get(word.strip("0123456789"))
            if split is None:
                continue
            before = [word for word in parts[depth][:at] if not word.isdigit()]
            owner = tuple("-".join(part) for part in (*parts[:depth], before) if part)
            rest = [word for word in parts[-1] if word not in (*SPLIT_WORDS, "of") and not word.isdigit()]
            return split, owner, {*owner, "-".join(rest)}
    return None, (), set()


def open_parquet(config, say):
    files = parquet_files(config)
    for wanted, names in (("*train*.parquet", ("train",)), ("*test*.parquet", VAL_NAMES)):
        if not any(name in files for name in names):
            raise ConfigError(
                f"data_dir={config.data_dir} holds neither train/ and val/ with a folder for each class, nor {wanted}: see docs/vision.md"
            )

    def load(split):
        import datasets

        try:
            return datasets.load_dataset("parquet", data_files={split: files[split]}, split=split)
        except Exception as error:
            reason = find_damage(files[split]) or first_line(error.__cause__ or error)
            raise ConfigError(f"data_dir={config.data_dir}: its parquet files cannot be read ({reason})") from None

    return open_columns(config, list(files), load, config.data_dir, say, files)


def find_damage(paths):
    """Which of the parquet files cannot be read, and where: 'FILE, rows 0 to 99: reason'. None if all can be."""
    from pyarrow import parquet

    for path in paths:
        place = path
        try:
            file, first = parquet.ParquetFile(path), 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                place = f"{path}, rows {first} to {first + count - 1}"
                file.read_row_group(group)
                first += count
        except Exception as error:  # what pyarrow raises has no common base class
            return f"{place}: {first_line(error)}"


def open_columns(config, names, load, where, say, files=None):
    """The splits of a data set that has columns -> as open_splits

    names  of its splits; load(name) -> datasets.Dataset
    where  what a message calls the data set
    files  {name: paths} of the splits' parquet files, if they are on this disk
    """
    candidates = [name for name in VAL_NAMES if name in names]
    if "train" not in names or not candidates:
        raise ConfigError(
            f"{where} has the splits {', '.join(names)}: it needs train, and one of {', '.join(VAL_NAMES)}"
        )

    def open_split(name):
        return read_columns(config, load(name), where, name, say, (files or {}).get(name))

    train, classes = open_split("train")
    for name, after in zip(candidates, [*candidates[1:], None]):
        val, others = open_split(name)
        if after is None or (val.labels >= 0).any():
            break
        say(f"note: {name} of {where} has no labels: {after} is for validation")
    for split, chosen in (("train", "train"), ("val", name)):
        paths = (files or {}).get(chosen, [])
        inside = [os.path.relpath(path, where) for path in paths]
        listed = ", ".join(inside if len(inside) < 4 else (inside[0], "…", inside[-1]))
        say(f"{split}: {chosen} of {where}" + (f", files: {listed}" if inside else ""))
    return {"train": train, "val": val}, classes or others


def read_columns(config, data, where, split, say, paths):
    """A datasets.Dataset -> Split, names of its classes or None. Rows without a label are left out, with a note."""
    import datasets

    name = row_names(paths) if paths else lambda i: f"image {i} of {where}, {split}"
    image = choose_column("image_field", config.image_field, IMAGE_FIELDS, data.column_names, where)
    label = choose_column("label_field", config.label_field, LABEL_FIELDS, data.column_names, where)
    classes = getattr(data.features[label], "names", None)
    try:
        labels, known = whole_numbers(data.select_columns(label).with_format("arrow")[:][label])
    except TypeError:
        raise ConfigError(f"label_field={label}: {where} has no whole numbers there: give another column") from None
    rows = np.flatnonzero(known)
    if len(rows) < len(known):
        say(
            f"note: {split}: {len(known) - len(rows)} of {len(known)} rows left out, whose {label} is not a whole number, "
            f"the first: {name(int(np.argmin(known)))}"
        )
    images = data.select_columns(image)
    try:
        images = images.cast_column(image, datasets.Image(decode=False))
    except Exception:
        raise ConfigError(f"image_field={image}: {where} has no images there: give another column") from None

    def read(i):
        cell = images[int(rows[i])][image]
        if not cell or not (cell["bytes"] or cell["path"]):
            raise ValueError("an empty cell")
        return cell["bytes"] or read_file(cell["path"])

    return Split(labels[rows], read, lambda i: name(int(rows[i]))), classes


def row_names(paths):
    """A function that names a row of these parquet files, counted from 0 through all of them: i -> 'FILE, row 5'."""
    from pyarrow import parquet

    ends = np.cumsum([parquet.read_metadata(path).num_rows for path in paths])

    def name(i):
        k = int(np.searchsorted(ends, i, side="right"))
        return f"{paths[k]}, row {i - (ends[k - 1] if k else 0)}"

    return name


def whole_numbers(column):
    """pyarrow column (n,) -> int64 (n,), and whether each cell holds a whole number (n,). TypeError if none can."""
    import pyarrow

    if pyarrow.types.is_floating(column.type):
        values = column.to_numpy()  # nulls become nan
        known = np.abs(values) < 2**53
        known[known] = values[known] == np.floor(values[known])
        if len(known) and not known.any():
            raise TypeError
        return np.where(known, values, 0).astype(np.int64), known
    if not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_boolean(column.type)):
        raise TypeError
    return column.cast("int64").fill_null(0).to_numpy(), column.is_valid().to_numpy()


def choose_column(option, given, known, names, where):
    """The column `given` by an option, or if None the first `known` one, of `names`. ConfigError if it is not there."""
    found = given or next((name for name in known if name in names), None)
    if found not in names:
        raise ConfigError(f"{option}={given}: {where} has the columns {', '.join(names)}: give one of these")
    return found


def check_labels(config, splits, classes, say=lambda text: None):
    """ConfigError if labels do not fit n_classes; a note if one split lacks classes that the other has."""
    for split, data in splits.items():
        if not len(data.labels):
            raise ConfigError(f"dataset={config.dataset}: no images in its {split} split")
        if data.labels.max() < 0:
            raise ConfigError(
                f"dataset={config.dataset}: its {split} split has no labels, all are {data.labels.max()}: give a split with labels"
            )
        if data.labels.min() < 0:
            raise ConfigError(
                f"dataset={config.dataset}: label {data.labels.min()} in {split} is out of range: labels count from 0"
            )
    count = max(1 + int(splits["train"].labels.max()), 1 + int(splits["val"].labels.max()), len(classes or ()))
    if count > config.n_classes:
        raise ConfigError(
            f"n_classes={config.n_classes}, but {config.dataset} has labels up to {count - 1}: take {count}"
        )
    if count < config.n_classes:
        say(f"note: n_classes={config.n_classes}, but {config.dataset} has labels up to {count - 1}")
    present = {split: set(np.unique(data.labels).tolist()) for split, data in splits.items()}
    for split, other in (("train", "val"), ("val", "train")):
        missing = sorted(present[other] - present[split])
        if missing:
            names = ", ".join(str(classes[label] if classes else label) for label in missing[:5])
            more = ", …" if len(missing) > 5 else ""
            say(f"note: classes of {other} without an image in {split}: {len(missing)}, {names}{more}")

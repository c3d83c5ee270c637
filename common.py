"""What the seven scripts share: flags, data, networks, and the files that a run writes.

Images are float tensors in [0, 1] of shape (B, C, H, W) everywhere outside a network; networks
return logits. The data set lives as one uint8 tensor on the training device. The training loops
and the losses are in the scripts.
"""

import argparse
import copy
import csv
import gzip
import io
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

# ---------------------------------------------------------------------------------------------
# Flags


def fail(message, status=2):
    """End the program with one line on stderr; exit status 2 says that the mistake is in the input."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # the progress line
    print(f"{clear}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def stop(number, _):
    """The handler of SIGINT and SIGTERM: one line, and the status that a shell expects.

    SystemExit unwinds the stack: a file that is being written is given up, the old one remains.
    """
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    fail(f"stopped by {signal.Signals(number).name}", 128 + number)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage before it
        fail(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf, multiple_of=1):
    """An argparse type: an int or a float with low <= value <= high; nan and inf are refused."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or kind is int and value % multiple_of:
            what = "a number" if kind is float else "a whole number"
            what += f" that is a multiple of {multiple_of}" if multiple_of > 1 else ""
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, not '{text}'")
        return value

    return parse


def shared_flags(script, doc, *, epochs, batch_size, opt, lr, latent_dim, width, lr_schedule):
    """A parser with the flags of all seven scripts, with this script's defaults.

    `script` is the caller's `__file__`: files are named after it and, by default, lie beside it.
    """
    script = Path(script).resolve()
    parser = Parser(
        prog=script.name, description=doc.split("\n\n")[0], epilog="README.md explains the files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=epochs, help="passes over the training set")
    add("--batch-size", type=number(int, 2), default=batch_size, help="images per step")
    add("--opt", choices=["adam", "rmsprop", "sgd"], default=opt, help="optimiser")
    add("--lr", type=number(float, 1e-9, 100), default=lr, help="learning rate")
    add("--lr-schedule", choices=["constant", "linear"], default=lr_schedule,
        help="linear: the learning rate falls to zero over the run")  # fmt: skip
    add("--latent-dim", type=number(int, 1, 4096), default=latent_dim, help="size of z")
    add("--width", type=number(int, 1, 1024), default=width,
        help="of convolutions: channels of the first, doubled at each halving of the image")  # fmt: skip
    add("--seed", type=number(int, 0, 2**31), default=0, help="seed of everything random")
    add("--device", default="auto", help="auto (an accelerator, or else the CPU), cpu, cuda, mps")
    add("--data", default="auto",
        help="mnist, fashion-mnist, cifar10, synthetic, or a folder of pictures whose sub-folders "
        "are the classes; auto: mnist, or synthetic where mnist is not to be had")  # fmt: skip
    add("--data-dir", type=Path, default=script.parent / "data", help="where data sets are kept")
    add("--image-size", type=number(int, 8, 1024, multiple_of=4),
        help="side in pixels; by default the data's own, at most 64")  # fmt: skip
    add("--translate", type=number(float, 0, 0.5), default=0.0,
        help="shift training images at random by up to this fraction, both ways")  # fmt: skip
    add("--out", type=Path, default=script.parent, help="folder of the files written")
    add("--log-every", type=number(int, 1), default=100, help="steps per row of the CSV")
    add("--score", action="store_true",
        help="at each epoch's end, measure the quality of 10,000 samples (see README.md)")  # fmt: skip
    add("--resume", action="store_true",
        help="go on from the checkpoint, with its flags; --epochs may be raised")  # fmt: skip
    add("--generate", type=number(int, 1), metavar="N",
        help="no training: write N samples of the checkpoint as single PNG files")  # fmt: skip
    add("--dry-run", action="store_true", help="two steps on a small slice, then all the files")
    return parser


def parse(parser, **brought):
    """Parse the command line, choose the device and the name of the files, check the folders.

    `arch={"conv": {"lr": 1e-3}}`: the defaults that come with --arch conv. With --generate and
    --resume, the flags that describe the run come from the checkpoint.
    """
    args = parser.parse_args()
    for flag, defaults in brought.items():
        parser.set_defaults(**defaults.get(getattr(args, flag), {}))
    args = parser.parse_args()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    args.name = Path(parser.prog).stem
    args.checkpoint = None
    if args.generate and args.resume:
        fail("--generate and --resume exclude each other")
    if args.generate or args.resume:
        path = args.out / f"{args.name}.pt"
        args.checkpoint = load_checkpoint(path, args.name)
        score = args.score if args.generate else args.checkpoint["flags"].get("score")
        parser.set_defaults(**{**args.checkpoint["flags"], "score": score})
        kept = argparse.Namespace(name=args.name, checkpoint=args.checkpoint)
        args = parser.parse_args(namespace=kept)
        for flag, value in args.checkpoint["flags"].items():
            free = args.generate or flag in ("epochs", "data", "score", "nll")
            if not free and getattr(args, flag) != value:
                fail(f"--{flag.replace('_', '-')} {getattr(args, flag)} contradicts {path}: {value}")
    if args.data not in ("auto", "synthetic", *TORCHVISION):
        args.data = str(Path(args.data).resolve())
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {first_line(error)}")
    for flag, folder in {"out": args.out, "data-dir": args.data_dir if args.score else args.out}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"--{flag} {folder} cannot be written: {error.strerror}")
    if args.dry_run:
        args.epochs = 1
    args.images_per_step = args.batch_size
    torch.manual_seed(args.seed)
    return args


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------
# Data


class Data:
    """A training and a test set: images (N, C, H, W) uint8, labels (N,) int64, class names."""

    def __init__(self, name, train, test, classes):
        self.name, self.classes = name, classes
        (self.x_train, self.y_train), (self.x_test, self.y_test) = train, test
        self.shape = tuple(self.x_train.shape[1:])  # (C, H, W)

    def identity(self):
        """Name, number of training images and their shape: what a resumed run must find again."""
        return Path(self.name).name, len(self.x_train), *self.shape

    def batches(self, batch_size, translate=0.0):
        """One epoch in a fresh random order; yields x (B, C, H, W) in [0, 1] and y (B,).

        The last partial batch is dropped.
        """
        order = torch.randperm(len(self.x_train)).to(self.x_train.device)
        for index in order.split(batch_size)[: len(order) // batch_size]:
            x = self.x_train[index].float() / 255
            yield shift(x, translate) if translate else x, self.y_train[index]

    def examples(self, n):
        """n test images (n, C, H, W) in [0, 1], or all if there are fewer, from the whole of the set,
        and their labels (n,)."""
        index = torch.linspace(0, len(self.x_test) - 1, min(n, len(self.x_test))).long()
        index = index.to(self.x_test.device)
        return self.x_test[index].float() / 255, self.y_test[index]

    def test_batches(self, binarize=False):
        """The test set in order; yields x in [0, 1], or binary x, the same at each call, and y."""
        fixed = torch.Generator().manual_seed(0)
        for x, y in zip(self.x_test.split(1000), self.y_test.split(1000)):
            x = x.float() / 255
            yield torch.bernoulli(x.cpu(), generator=fixed).to(x.device) if binarize else x, y


def shift(x, fraction):
    """Shift each image of x (B, C, H, W) by whole pixels, up to `fraction` of its sides.

    What comes in is black.
    """
    b, _, h, w = x.shape
    sides = torch.tensor([w, h], device=x.device)
    most = (fraction * sides).floor()
    pixels = (torch.rand(b, 2, device=x.device) * (2 * most + 1)).floor() - most
    theta = torch.eye(2, 3, device=x.device).repeat(b, 1, 1)
    theta[:, :, 2] = 2 * pixels / sides
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "nearest", align_corners=False)


class NoData(Exception):
    """A data set is neither on disk nor to be downloaded."""


def load_data(args):
    """The data set that --data names, on --device; one line and status 2 if it cannot be used."""
    if args.generate and not args.score:  # the networks need the shape and the classes, nothing else
        c, h, w = args.checkpoint["shape"]
        none = torch.empty(0, c, h, w, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return Data(args.checkpoint["data_identity"][0], none, none, args.checkpoint["classes"])
    name = "mnist" if args.data == "auto" else args.data
    try:
        if name in TORCHVISION:
            train, test, classes = load_torchvision(name, args.data_dir)
        elif name == "synthetic":
            train, test, classes = synthetic(args)
        else:
            train, test, classes = load_folder(Path(name), args.image_size)
    except NoData as error:
        if args.data != "auto":
            fail(f"--data {name}: {error}")
        print(f"Training on the built-in synthetic digits: {error}")
        name, (train, test, classes) = "synthetic", synthetic(args)
    except OSError as error:
        fail(f"--data {name}: {error}")
    if len(train[0]) < args.images_per_step:
        fail(f"a step takes {args.images_per_step} images, there are {len(train[0])} to train with")

    def prepare(x, y, at_most):
        x, y = (x[:at_most], y[:at_most]) if args.dry_run else (x, y)
        if args.image_size and args.image_size != x.shape[2]:
            x = torch.cat([resize(part, [args.image_size] * 2) for part in x.split(5000)])
        return x.to(args.device), y.to(args.device)

    return Data(name, prepare(*train, 2 * args.images_per_step), prepare(*test, 200), classes)


TORCHVISION = {
    "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
}  # fmt: skip
IDX_FILES = {  # bytes, of MNIST and Fashion-MNIST alike, and the checksum of MNIST's file
    "train-images-idx3-ubyte": (47_040_016, 3925137587),
    "train-labels-idx1-ubyte": (60_008, 3771419346),
    "t10k-images-idx3-ubyte": (7_840_016, 2436316127),
    "t10k-labels-idx1-ubyte": (10_008, 1253699577),
}


def load_torchvision(name, root):
    """MNIST, Fashion-MNIST or CIFAR-10 as torchvision keeps them under `root`, fetched if need be."""
    kind = TORCHVISION[name]
    folder = root / kind.__name__ / "raw" if name != "cifar10" else root

    def read():
        for path in [folder / file for file in IDX_FILES if (folder / file).exists()]:
            (whole, checksum), size = IDX_FILES[path.name], path.stat().st_size
            if size != whole:
                fail(f"{path} is damaged: it has {size} bytes, not {whole}")
            if name == "mnist" and zlib.crc32(path.read_bytes()) != checksum:
                fail(f"{path} is damaged: it is not the file of MNIST")
        return kind(root, train=True), kind(root, train=False)

    try:
        train, test = read()
    except RuntimeError:  # not there, or not all of it
        try:
            fetch(kind, root)
            train, test = read()
        except (OSError, RuntimeError) as error:
            files = [kind.filename] if name == "cifar10" else [file for file, _ in kind.resources]
            raise NoData(
                f"{kind.__name__} is not in {root} and could not be downloaded "
                f"({first_line(error)}); to use it, put {', '.join(files)} into {folder}"
            ) from None
    x = [torch.as_tensor(part.data) for part in (train, test)]
    x = [part[:, None] if part.dim() == 3 else part.permute(0, 3, 1, 2).contiguous() for part in x]
    y = [torch.as_tensor(part.targets) for part in (train, test)]
    return (x[0], y[0]), (x[1], y[1]), list(train.classes)


def fetch(kind, root, timeout=20):
    """Download and unpack a torchvision set into `root`; OSError or RuntimeError if it cannot be.

    All happens in a temporary folder, file by file renamed when complete, so that several first
    runs at once, or a killed one, leave nothing half-written. Packed files that lie in their
    place already are used. A server may be silent for `timeout` seconds.
    """
    print(f"Fetching {kind.__name__} into {root}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(timeout)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as tmp:
        tmp = Path(tmp)
        for packed in root.glob(getattr(kind, "filename", "no file")):  # of CIFAR-10
            shutil.copyfile(packed, tmp / packed.name)
        for packed in root.glob(f"{kind.__name__}/raw/*.gz"):
            unpacked = tmp / packed.relative_to(root).with_suffix("")
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            try:
                unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
            except (OSError, EOFError, zlib.error) as error:
                fail(f"{packed} is damaged: {first_line(error)}")
        kind(tmp, download=True)
        for path in [path for path in tmp.rglob("*") if path.is_file() and path.suffix != ".gz"]:
            target = root / path.relative_to(tmp)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def load_folder(folder, size):
    """Pictures as colour or, if all are grey, grey images, cropped to a square in their middle.

    Sub-folders are the classes. FOLDER/train and FOLDER/test are the two sets; where they are
    missing a tenth of the pictures, the same at each run, are the test pictures.
    """
    if not folder.is_dir():
        fail(f"--data {folder}: neither a known data set nor a folder")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        (train, classes), (test, other) = list_folder(folder / "train"), list_folder(folder / "test")
        if classes != other:
            fail(f"--data {folder}: train has the classes {classes}, test has {other}")
    else:
        pictures, classes = list_folder(folder)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
        cut = -(-len(pictures) // 10)
        test, train = [pictures[i] for i in order[:cut]], [pictures[i] for i in order[cut:]]
    if not size:
        size = max(8, min(64, first_side(train + test)) // 4 * 4)
    sets = [decode(pictures, size) for pictures in (train, test)]
    if all((x == x[:, :1]).all() for x, _ in sets):
        sets = [(x[:, :1].contiguous(), y) for x, y in sets]
    return *sets, classes


def list_folder(folder):
    """The pictures under `folder` as pairs of path and label, and the names of the classes."""

    def pictures(paths):
        return sorted(p for p in paths if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)

    loose = pictures(folder.iterdir())
    classes = {d: pictures(d.rglob("*")) for d in sorted(folder.iterdir()) if d.is_dir()}
    classes = {d.name: paths for d, paths in classes.items() if paths}
    if loose and classes:
        fail(f"--data {folder}: has pictures both beside and inside its sub-folders")
    if not loose and not classes:
        fail(f"--data {folder}: no pictures in it")
    classes = classes or {"all": loose}
    pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    return pairs, list(classes)


def first_side(pictures):
    """The shorter side, in pixels, of the first picture that can be opened."""
    for path, _ in pictures:
        try:
            with Image.open(path) as image:
                return min(image.size)
        except (OSError, Image.DecompressionBombError):
            pass
    fail(f"none of the {len(pictures)} pictures can be read")


def decode(pictures, size):
    """Pictures of any kind as (N, 3, size, size) uint8 and labels (N,); those unreadable are named."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda picture: decode_one(picture[0], size), pictures))
    broken = [str(path) for (path, _), image in zip(pictures, images) if image is None]
    if broken:
        named = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        print(f"Skipped {len(broken)} of {len(images)} pictures that cannot be read: {named}")
    if len(broken) == len(images):
        fail("too few pictures: there must be some to train with and some to test with")
    labels = [label for (_, label), image in zip(pictures, images) if image is not None]
    return torch.stack([image for image in images if image is not None]), torch.tensor(labels)


def decode_one(path, size):
    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # large JPEGs are decoded at a fraction of their size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey
                image = image.convert("I").point(lambda value: value / 257 + 0).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return pil_to_tensor(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def synthetic(args):
    """60,000 + 10,000 digits in the form of MNIST, drawn from Pillow's built-in font and warped."""
    n, m = (2 * args.images_per_step, 200) if args.dry_run else (60_000, 10_000)
    return draw_digits(n, seed=1), draw_digits(m, seed=2), list("0123456789")


def draw_digits(n, seed):
    """n digits (n, 1, 28, 28) uint8 and their labels: affine and elastic warps, varying strokes."""
    font = ImageFont.load_default(size=46)
    glyphs = []
    for digit in "0123456789":
        glyph = Image.new("L", (64, 64))
        ImageDraw.Draw(glyph).text((32, 32), digit, fill=255, font=font, anchor="mm")
        glyphs.append(pil_to_tensor(glyph))
    glyphs = gaussian_blur(torch.stack(glyphs).float() / 255, [9, 9], [2.0, 2.0])
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(*size, generator=random)

    labels = torch.randint(10, (n,), generator=random)
    images = []
    for y in labels.split(5000):
        b = len(y)
        angle, shear = uniform(-0.25, 0.25, b), uniform(-0.3, 0.3, b)
        zoom_x, zoom_y = uniform(0.75, 1.25, b), uniform(0.75, 1.0, b)
        theta = torch.stack([
            zoom_x * angle.cos(), zoom_x * (shear - angle.sin()), uniform(-0.1, 0.1, b),
            zoom_y * angle.sin(), zoom_y * angle.cos(), uniform(-0.1, 0.1, b),
        ], 1).view(b, 2, 3)  # fmt: skip
        elastic = F.interpolate(torch.randn(b, 2, 4, 4, generator=random) * 0.07, 28, mode="bicubic")
        grid = F.affine_grid(theta, (b, 1, 28, 28), align_corners=False) + elastic.permute(0, 2, 3, 1)
        x = F.grid_sample(glyphs[y], grid, align_corners=False)
        edge = uniform(0.15, 0.45, b, 1, 1, 1)  # where the blurred stroke ends: its thickness
        images.append((((x - edge) * 5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), labels


# ---------------------------------------------------------------------------------------------
# Networks


def mlp(sizes, norm=False, activation=nn.ReLU, dropout=0.0):
    """Linear layers of these sizes; after each but the last: batch norm, activation, dropout."""
    layers = []
    for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(n_in, n_out)]
        layers += [nn.BatchNorm1d(n_out)] if norm else []
        layers += [activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def mlp_encoder(shape, hidden, out_dim, norm=True):
    """(B, C, H, W) in [0, 1] -> (B, out_dim)."""
    return nn.Sequential(nn.Flatten(), mlp([math.prod(shape), *hidden, out_dim], norm))


def mlp_decoder(shape, hidden, latent_dim, norm=True):
    """(B, latent_dim) -> logits (B, C, H, W)."""
    return nn.Sequential(mlp([latent_dim, *hidden, math.prod(shape)], norm), nn.Unflatten(1, shape))


def conv_plan(image_size, width):
    """Sides and channels after each halving, until a side is odd or at most 7.

    (28, 16) -> [14, 7], [16, 32].
    """
    sides = [image_size // 2]
    while sides[-1] > 7 and sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    return sides, [width * 2**i for i in range(len(sides))]


def conv_down(shape, width, norm):
    """Convolutions that halve the sides of images of `shape`, and the shape that they lead to."""
    sides, channels = conv_plan(shape[1], width)
    layers = []
    for c_in, c_out in zip([shape[0], *channels], channels):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(c_out)] if norm else []
        layers += [nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers), (channels[-1], sides[-1], sides[-1])


def conv_encoder(shape, width, out_dim, norm=True):
    """(B, C, H, W) in [0, 1] -> (B, out_dim)."""
    convs, inner = conv_down(shape, width, norm)
    return nn.Sequential(convs, nn.Flatten(), nn.Linear(math.prod(inner), out_dim))


def conv_decoder(shape, width, latent_dim, norm=True, deep=False):
    """(B, latent_dim) -> logits (B, C, H, W).

    Transposed convolutions double the sides, with twice the encoder's channels; one more at full size
    draws the lines. `deep`: another one before them, at the smallest size.
    """
    sides, channels = conv_plan(shape[1], width)
    channels = [2 * c for c in channels[::-1]] + [width]
    side, c = sides[-1], channels[0]

    def activation(c):
        return [nn.BatchNorm2d(c), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]

    layers = [nn.Linear(latent_dim, c * side**2), nn.Unflatten(1, (c, side, side)), *activation(c)]
    layers += [nn.ConvTranspose2d(c, c, 3, padding=1), *activation(c)] if deep else []
    for c_in, c in zip(channels, channels[1:]):
        layers += [nn.ConvTranspose2d(c_in, c, 4, stride=2, padding=1), *activation(c)]
    layers += [nn.ConvTranspose2d(width, shape[0], 3, padding=1)]  # faster on a CPU than Conv2d
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """(B, C, H, W) in [0, 1] -> logits (B,) = head(features(x)), from a body and a top of layers.

    No batch norm in them: real and generated images may share a batch, and the network serves as a
    Wasserstein critic too.
    """

    def __init__(self, body, top):
        super().__init__()
        self.body, self.top = body, top
        for layer in self.modules():  # He et al. 2015: torch's own start is too timid for one epoch
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)

    def features(self, x):
        return self.body(2 * x - 1)

    def head(self, h):
        return self.top(h).squeeze(1)

    def forward(self, x):
        return self.head(self.features(x))


def mlp_discriminator(shape, hidden, dropout=0.0):
    """A Discriminator of linear layers; each but the last with leaky ReLU and dropout."""
    sizes = [math.prod(shape), *hidden, 1]
    return Discriminator(nn.Flatten(), mlp(sizes, False, lambda: nn.LeakyReLU(0.2), dropout))


def conv_discriminator(shape, width, hidden):
    """A Discriminator of strided convolutions, then a hidden linear layer of size `hidden`.

    Its features are the bare output of the last convolution but one: (B, C', H', W').
    """
    convs, (c, h, w) = conv_down(shape, width, norm=False)
    top = nn.Sequential(
        nn.LeakyReLU(0.2), nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2, inplace=True), nn.Flatten(),
        mlp([2 * c * -(-h // 2) * -(-w // 2), hidden, 1], False, lambda: nn.LeakyReLU(0.2)),
    )  # fmt: skip
    return Discriminator(convs[:-1], top)  # without the last activation


class Conditional(nn.Module):
    """A network that is told the label y, one-hot (B, n_classes), beside its input.

    A code (B, D) gets n_classes more numbers, an image (B, C, H, W) n_classes more channels. For a
    fully connected network (flat) the image is flattened, and the 1 of y grows with the number of
    pixels, so that they do not drown it: to about the norm of a digit of MNIST.
    """

    def __init__(self, network, flat=False):
        super().__init__()
        self.network, self.flat = network, flat

    def forward(self, h, y):
        if h.dim() == 2:
            return self.network(torch.cat([h, y], 1))
        if self.flat:
            h = h.flatten(1)
            return self.network(torch.cat([h, y * (h.shape[1] / y.shape[1]) ** 0.5], 1))
        planes = y[:, :, None, None].expand(-1, -1, *h.shape[2:])
        if isinstance(self.network, Discriminator):  # it centres its input, and planes of -1 would
            planes = (planes + 1) / 2  # outweigh the image: let them come out as 0 and 1
        return self.network(torch.cat([h, planes], 1))


# ---------------------------------------------------------------------------------------------
# Training


def make_optimizer(args, network, lr, betas=(0.9, 0.999)):
    """The optimiser that --opt names. `betas` are Adam's; sgd has momentum 0.9."""
    if args.opt == "adam":
        return torch.optim.Adam(network.parameters(), lr, betas=betas, fused=True)
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), lr)
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9)


def average(network):
    """A copy of `network`, in eval mode, for update_average() to keep."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_average(averaged, network, decay, step):
    """Move the weights and batch statistics of `averaged` towards those of `network` by 1 - decay.

    In the first 9 / (1 - decay) steps by more: the average is then of about the last tenth of them.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(averaged.state_dict().values(), network.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


@torch.no_grad()
def predict(network, *inputs):
    """network(*inputs) in parts of 500 rows and in eval mode, with the batch statistics of training."""
    was_training = network.training
    network.eval()
    output = torch.cat([network(*part) for part in zip(*(rows.split(500) for rows in inputs))])
    network.train(was_training)
    return output


def reparameterize(mu, logvar):
    """z ~ N(mu, sigma^2), differentiable in both; all (B, latent_dim)."""
    return mu + (logvar / 2).exp() * torch.randn_like(mu)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)) in nats, (B,): summed over the latent dimensions.

    1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), Kingma & Welling 2014, appendix B.
    """
    return (mu.square() + logvar.exp() - 1 - logvar).sum(1) / 2


def interpolate(z_from, z_to):
    """From each z_from to its z_to, both (N, latent_dim), in steps of 0.2: (6 N, latent_dim)."""
    t = torch.linspace(0, 1, 6, device=z_from.device)[:, None]
    return torch.lerp(z_from[:, None], z_to[:, None], t).flatten(0, 1)


def one_hot(labels, n_classes):
    """Labels (B,) as floats (B, n_classes)."""
    return F.one_hot(labels, n_classes).float()


def walks(z, y):
    """Codes (96, latent_dim) and labels (96, n_classes) of 16 walks of a conditional model.

    Eight go from one z (10, latent_dim) to the next with the label fixed, eight from one label
    y (n_classes, n_classes) to the next with z fixed.
    """
    start, end = torch.arange(8) % len(y), torch.arange(1, 9) % len(y)
    z_walk, y_walk = interpolate(z[:8], z[1:9]), interpolate(y[start], y[end])
    z_still, y_still = z[:8].repeat_interleave(6, 0), y[start].repeat_interleave(6, 0)
    return torch.cat([z_walk, z_still]), torch.cat([y_still, y_walk])


def traverse(z, codes):
    """Each latent dimension of z (latent_dim,) in turn from -3 to 3 in ten steps: (10 rows, latent_dim).

    Up to ten rows, of the dimensions in which the codes (N, latent_dim) vary most.
    """
    dims = codes.var(0, correction=0).topk(min(10, len(z))).indices
    z = z.repeat(len(dims), 10, 1)
    z[torch.arange(len(dims)), :, dims] = torch.linspace(-3, 3, 10, device=z.device)
    return z.flatten(0, 1)


# ---------------------------------------------------------------------------------------------
# Score


class Score:
    """Sample quality as numbers, from the features of a small classifier of the data at hand.

    Score(data, args)(x, y) takes samples x (N, C, H, W) in [0, 1] and, for conditional models, the
    labels y (N,) that were asked for. It returns

    fd               Frechet distance of the samples to the test set: Gaussians fitted to the 64
                     features before the classifier's last layer (Heusel et al. 2017, arXiv
                     1706.08500, with another network: not comparable to Inception FID)
    classes          how many classes hold at least a tenth of an equal share of the samples
    class_kl         KL(classes of the samples || classes of the test set), nats
    precision        share of samples within the test set's manifold, and
    recall           share of the test set within the samples' manifold, both of 3-nearest-neighbour
                     balls in the features (Kynkaanniemi et al. 2019, arXiv 1904.06991)
    label_accuracy   share of samples that the classifier gives the label asked for
    """

    def __init__(self, data, args):
        if len(data.classes) < 2 or len(data.x_test) < 100:
            fail("--score needs at least two classes and 100 test images")
        with torch.random.fork_rng([]):  # scoring must not change what is drawn and trained
            self.data, self.network = data, load_classifier(data, args)
        self.real, _ = self.features(data.x_test)

    @torch.no_grad()
    def features(self, x):
        """Features (N, 64) and predicted classes (N,) of images, uint8 or in [0, 1]."""
        parts = [part / 255 if part.dtype == torch.uint8 else part for part in x.split(1000)]
        f = torch.cat([self.network[:-1](part) for part in parts])
        return f, self.network[-1](f).argmax(1)

    def __call__(self, x, y=None):
        f, predicted = self.features(x)
        n = len(self.data.classes)
        p, q = (labels.bincount(minlength=n) / len(labels) for labels in (predicted, self.data.y_test))
        numbers = {
            "fd": frechet_distance(f, self.real),
            "classes": int((p >= 0.1 / n).sum()),
            "class_kl": torch.special.xlogy(p, p / q.clamp(min=1e-6)).sum().item(),
            **precision_recall(f, self.real),
        }
        if y is not None:
            numbers["label_accuracy"] = (predicted == y).float().mean().item()
        return numbers


def frechet_distance(f, g):
    """|m_f - m_g|^2 + tr(C_f + C_g - 2 (C_f C_g)^(1/2)) of features f (N, D), g (M, D)."""
    f, g = f.cpu().double(), g.cpu().double()
    c_f, c_g = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(c_f)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_g @ root).clamp(min=0).sqrt().sum()
    return ((f.mean(0) - g.mean(0)).square().sum() + c_f.trace() + c_g.trace() - 2 * cross).item()


def precision_recall(fake, real, k=3):
    """Shares of fake (N, D) and real (M, D) that lie in a k-nearest-neighbour ball of the other."""

    def covered(points, centres):
        def distances(x):
            return (torch.cdist(part, centres) for part in x.split(1000))

        radii = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances(centres)])
        return torch.cat([(d <= radii).any(1) for d in distances(points)]).float().mean().item()

    return {"precision": covered(fake, real), "recall": covered(real, fake)}


def load_classifier(data, args):
    """A small convolutional classifier of `data`, trained once and kept in --data-dir.

    MNIST: 99.3% of the test set. Each data set at each image size has its own, found by a checksum.
    """
    c, h, w = data.shape
    side = (h // 4) * (w // 4)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(c, 16, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * side, 64), nn.ReLU(), nn.Linear(64, len(data.classes)),
    )  # fmt: skip
    if args.device == "cpu":
        network.to(memory_format=torch.channels_last)
    checksum = zlib.crc32(data.x_train.cpu().numpy())
    path = args.data_dir / f"classifier-{Path(data.name).name}-{checksum:08x}.pt"
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network.to(args.device).eval()
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever unpickling a foreign or truncated file runs into
        print(f"{path} is damaged ({first_line(error)})")
    print(f"Training the classifier that scores samples, once: {path}")
    network.to(args.device)
    epochs, batch_size = 3, min(128, len(data.x_train))
    opt = torch.optim.Adam(network.parameters())
    steps = epochs * (len(data.x_train) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for x, y in data.batches(batch_size):
            loss = F.cross_entropy(network(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        right = sum((network(x).argmax(1) == y).sum().item() for x, y in data.test_batches())
    print(f"It names {100 * right / len(data.x_test):.1f}% of the test set right.")
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())
    return network


# ---------------------------------------------------------------------------------------------
# Files


def write_file(path, content, sync=False):
    """Write bytes so that `path` holds either its old content or all of the new.

    `sync` waits for the disk, so that this holds after a power cut too; that can take a second.
    """
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            fail(f"{path} cannot be written: {error.strerror}", 1)
        raise


def picture(x):
    """A Pillow image of x (C, H, W) in [0, 1]."""
    return to_pil_image((x.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8))


def save_png(path, x):
    """Write x (C, H, W) in [0, 1] as a PNG file."""
    content = io.BytesIO()
    picture(x).save(content, format="png")
    write_file(path, content.getvalue())


def load_checkpoint(path, name):
    """The checkpoint of script `name` as a dict on the CPU; one line and status 2 if it is none."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == name and checkpoint["flags"]:
            return checkpoint
        fail(f"{path} is a checkpoint of {checkpoint['script']}.py")
    except KeyError:
        fail(f"{path} is no checkpoint of these scripts")
    except FileNotFoundError:
        fail(f"no checkpoint {path}: train first")
    except Exception as error:  # whatever unpickling a foreign or truncated file runs into
        why = first_line(error).split(". ")[0]  # torch goes on to advise against weights_only
        fail(f"{path} is not a whole checkpoint of {name}.py ({why})")


def listed(numbers):
    """The numbers of a dict by name, in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def show(line):
    """The progress line, on a terminal alone."""
    if sys.stdout.isatty():
        print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


class Run:
    """The files of one run, and what it says on the screen.

    `networks` and `optimizers`: dicts, by the names that they have in the checkpoint. The CSV has
    a row every --log-every steps and at each epoch's end. Over the first `warmup` steps the learning
    rates rise to their values.
    """

    def __init__(self, args, data, networks, optimizers, warmup=0):
        self.args, self.data, self.networks, self.optimizers = args, data, networks, optimizers
        self.warmup, self.rows, self.losses, self.progress = warmup, [], [], []
        self.epoch = self.step = self.seconds = 0
        self.written = -math.inf  # when the CSV was written last
        self.steps_per_epoch = len(data.x_train) // args.images_per_step
        if args.device == "cpu":  # convolutions take a third less time; elsewhere they do not
            for network in networks.values():
                network.to(memory_format=torch.channels_last)
        if args.checkpoint:
            self.restore(args.checkpoint)
        self.score = Score(data, args) if args.score else None
        if args.generate:
            return
        self.schedule()
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a run as it ends other tools
        flags = ", ".join(f"{key} {value}" for key, value in self.flags().items())
        print(f"{args.name}.py on {args.device} with {data.name} ({len(data.x_train)} images): {flags}")

    def restore(self, saved):
        """The networks of a checkpoint and, for --resume, all that the next epoch builds on."""
        data, before = self.data.identity(), tuple(saved["data_identity"])
        if (self.args.resume or self.args.score) and data != before:
            fail(f"{self.path('.pt')} was trained on other data: {before}, not {data}")
        try:
            for name, network in self.networks.items():
                network.load_state_dict(saved["networks"][name])
        except (KeyError, RuntimeError):
            fail(f"{self.path('.pt')} holds other networks than the flags ask for: leave them out")
        if not self.args.resume:
            return
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        self.epoch, self.rows, self.seconds = saved["epoch"], saved["rows"], saved["seconds"]
        self.step, self.progress = self.epoch * self.steps_per_epoch, [saved["progress"]]
        self.write_csv()  # without the rows of an epoch that was not completed

    def path(self, what):
        return self.args.out / f"{self.args.name}{what}"

    def flags(self):
        """The flags that make the run what it is: not those that say where it runs and writes."""
        apart = "name checkpoint images_per_step out device data_dir generate resume".split()
        return {key: value for key, value in vars(self.args).items() if key not in apart}

    def epochs(self):
        """Epoch numbers from 1. Each epoch's randomness depends on --seed and its number alone."""
        for self.epoch in range(self.epoch + 1, self.args.epochs + 1):
            torch.manual_seed(self.args.seed * 100_003 + self.epoch)
            self.start = time.monotonic()
            yield self.epoch
        print(f"Pictures, losses and checkpoint: {self.path('*')}")

    def schedule(self):
        """Set the learning rate of the next step."""
        factor = min((self.step + 1) / max(self.warmup, 1), 1)
        if self.args.lr_schedule == "linear":
            factor *= 1 - self.step / (self.args.epochs * self.steps_per_epoch)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor

    def log(self, losses):
        """After every step: a dict of detached scalars, whose means over the interval make a row."""
        self.losses.append(torch.stack(list(losses.values())))
        self.step += 1
        done = self.step - (self.epoch - 1) * self.steps_per_epoch
        self.schedule()
        if self.step % self.args.log_every and done < self.steps_per_epoch:
            return
        table, self.losses = torch.stack(self.losses), []
        self.check_finite(table, list(losses), done == self.steps_per_epoch)
        seconds = self.seconds + time.monotonic() - self.start
        if done == self.steps_per_epoch:
            self.seconds = seconds
        self.rows.append({"epoch": self.epoch, "step": self.step, "seconds": round(seconds, 2)})
        self.rows[-1].update(zip(losses, table.mean(0).tolist()))
        if time.monotonic() - self.written > 1:  # all of it, which takes a while when rows are many
            self.write_csv()
        show(self.line(f"{100 * done // self.steps_per_epoch}%"))

    def check_finite(self, table, names, epoch_ends):
        """End the run if there is a NaN or an infinity in the losses (steps, names) or the weights."""
        what = None
        for row, column in (~table.isfinite()).nonzero().tolist()[:1]:
            what = f"{names[column]} is {table[row, column]} at step {self.step - len(table) + row + 1}"
        if epoch_ends and not what:
            for name, network in self.networks.items():
                if not all(value.isfinite().all() for value in network.state_dict().values()):
                    what = f"a weight of the {name} is not finite at step {self.step}"
        if what:
            last = self.epoch - 1
            saved = f"{self.path('.pt')} holds epoch {last}" if last else "nothing was saved"
            if self.rows:
                self.write_csv()
            fail(f"{what}: training diverged, a smaller --lr may help; {saved}", 1)

    def end_epoch(self, samples, draw, test=None):
        """Complete the epoch's last CSV row, add a row to the progress picture, save the checkpoint.

        `draw` is for --score; see generate().
        """
        self.rows[-1].update(test or {})
        if self.score:
            self.rows[-1].update(self.score(*draw(10_000)))
        self.write_csv()
        self.progress.append((samples[:10].detach().cpu() * 255).round().to(torch.uint8))
        self.save_grid("progress", torch.cat(self.progress).float() / 255, len(samples[:10]))
        self.save_checkpoint()
        print(f"\r{self.line()}\033[K" if sys.stdout.isatty() else self.line(), flush=True)

    def add_to_last_row(self, numbers):
        """What was measured after the last epoch, on the screen and in the CSV."""
        self.rows[-1].update(numbers)
        self.write_csv()
        self.save_checkpoint()
        print(listed(numbers))

    def line(self, where=""):
        row = dict(self.rows[-1])
        epoch, _, seconds = row.pop("epoch"), row.pop("step"), row.pop("seconds")
        of = self.args.epochs
        return f"epoch {epoch:>{len(str(of))}}/{of} {where:>4} {seconds:6.1f} s  {listed(row)}"

    def write_csv(self):
        text = io.StringIO()
        columns = dict.fromkeys(key for row in self.rows for key in row)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        write_file(self.path(".csv"), text.getvalue().encode())
        self.written = time.monotonic()

    def save_grid(self, what, images, columns=8):
        """NAME_what.png: images (N, C, H, W) in [0, 1], row by row."""
        save_png(self.path(f"_{what}.png"), make_grid(images.detach().cpu(), columns, padding=2))

    def save_checkpoint(self):
        """NAME.pt: what --generate and --resume need."""
        state = {
            "script": self.args.name, "epoch": self.epoch, "flags": self.flags(),
            "data_identity": self.data.identity(), "shape": self.data.shape,
            "classes": self.data.classes,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rows": self.rows, "progress": torch.cat(self.progress), "seconds": self.seconds,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.path(".pt"), buffer.getvalue(), sync=True)

    def generate(self, draw):
        """Write --generate samples as single PNG files, in a folder per label if there are labels.

        `draw(n)`: the script's own; n samples, and the labels (n,) that were asked for or None.
        """
        folder, n = self.path("_generated"), self.args.generate
        try:
            with tempfile.TemporaryDirectory(dir=self.args.out, prefix=f".{folder.name}-") as tmp:
                for start in range(0, n, 1000):
                    images, labels = draw(min(1000, n - start))
                    for i, x in enumerate(images):
                        label = "" if labels is None else self.data.classes[labels[i]].replace("/", "-")
                        part = Path(tmp, "new", label)
                        part.mkdir(parents=True, exist_ok=True)
                        picture(x).save(part / f"{start + i:06}.png")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(Path(tmp, "new"), folder)
        except OSError as error:
            fail(f"{folder} cannot be written: {error.strerror}", 1)
        print(f"Wrote {n} samples to {folder}")
        if self.score:
            print(listed(self.score(*draw(10_000))))

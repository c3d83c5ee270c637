"""What the seven scripts share: data, networks, a few lines of maths, the score, the files, the flags.

Images are float tensors (B, C, H, W) in [0, 1] everywhere outside a network; networks return logits. A data
set is one uint8 tensor on the training device. Losses and training loops are in the scripts.

Several have what their papers have not: small networks; Adam (vae, gan, cgan, vaegan), with betas of 0 and
0.99 (gan, cgan, dcgan); He's initialisation of a discriminator (not dcgan); a generator that learns from
images the discriminator has just seen (not vaegan); averaged weights, --ema, that draw a GAN's pictures.
"""

import argparse
import csv
import math
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

TORCHVISION = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}


# ----- Data ------------------------------------------------------------------------------------
class Data:
    """A data set on one device: `train` and `test` are images (N, C, H, W) uint8 with their labels (N,)."""

    def __init__(self, name, train, test, classes):
        (self.x_train, self.y_train), (self.x_test, self.y_test) = train, test
        self.name, self.classes, self.shape = name, classes, tuple(self.x_train.shape[1:])
        self.about = {"shape": self.shape, "classes": classes, "images": len(self.x_train)}  # for checkpoints

    def batches(self, batch_size, translate=0.0):
        """One epoch in a fresh random order, without the last partial batch: x (B, C, H, W), labels (B,)."""
        order = torch.randperm(len(self.x_train)).to(self.x_train.device)
        for index in order.split(batch_size)[: len(order) // batch_size]:
            x = self.x_train[index]
            yield (shift(x, translate) if translate else x).float() / 255, self.y_train[index]

    def test_batches(self, binarize=False):
        """The test set in order; yields x in [0, 1], or binary x, the same at each call, and labels."""
        fixed = torch.Generator().manual_seed(0)
        for x, labels in zip(self.x_test.split(1000), self.y_test.split(1000)):
            x = x.float() / 255
            yield torch.bernoulli(x.cpu(), generator=fixed).to(x.device) if binarize else x, labels


def shift(x, fraction):
    """Shift each image of x (B, C, H, W) by whole pixels, up to `fraction` of its sides; black comes in."""
    n, _, height, width = x.shape
    down, right = int(fraction * height), int(fraction * width)  # at most
    x = F.pad(x, (right, right, down, down))
    views = x.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 down + 1, 2 right + 1, H, W)
    return views[torch.arange(n), :, torch.randint(2 * down + 1, (n,)), torch.randint(2 * right + 1, (n,))]


def load_data(args, conditional=False):
    """The data set that --data names, on --device, as Data; one line and status 2 if it cannot be used."""
    if args.generate is not None:  # the networks need the shape and the classes, nothing else
        about = read_checkpoint(args.out, args.name)["data"]
        nothing = torch.empty(0, *about["shape"], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return Data(args.data, nothing, nothing, about["classes"])
    name = "mnist" if args.data == "auto" else args.data
    try:
        if name.lower() in TORCHVISION:
            train, test, classes = load_torchvision(name.lower(), args.data_dir)
        elif name.lower() != "synthetic":
            train, test, classes = load_folder(Path(name).expanduser().resolve(), args.image_size)
    except Exception as error:  # whatever torchvision, the network or a damaged file runs into
        hint = f"; its four files belong, unpacked, into {args.data_dir}/MNIST/raw" if name == "mnist" else ""
        files = [*args.data_dir.glob("*ubyte*"), *args.data_dir.glob("MNIST/**/*ubyte*")]
        if args.data != "auto" or files:
            fail(f"--data {args.data}: {error}{hint}")
        say(f"No MNIST here, and none to be had: synthetic digits instead{hint}")
        name = "synthetic"
    if name.lower() == "synthetic":
        train = draw_digits(2 * args.batch_size if args.dry_run else 60_000, seed=1)
        test = draw_digits(200 if args.dry_run else 10_000, seed=2)
        classes = list("0123456789")
    missing = set(range(len(classes))) - (set(train[1].tolist()) & set(test[1].tolist()))
    if conditional and len(classes) == 1:
        fail(f"--data {args.data}: one class, but the model learns from labels: sub-folders are the classes")
    if conditional and missing:
        fail(f"--data {args.data}: class {classes[min(missing)]} has none to train with or none to test with")
    train = prepare(args, *train, 2 * args.batch_size if args.dry_run else None)
    test = prepare(args, *test, 200 if args.dry_run else None)
    if len(train[0]) < args.batch_size:
        fail(f"--data {args.data}: {len(train[0])} images are fewer than --batch-size {args.batch_size}")
    torch.manual_seed(0)  # every epoch and every run is measured on the same shifted images
    return Data(name, train, (shift(test[0], args.translate), test[1]), classes)


def prepare(args, x, y, n):
    """The first n (None: all) images and labels, of the size and on the device of the flags."""
    if args.image_size:
        x = torch.cat([v2.functional.resize(some, [args.image_size] * 2) for some in x[:n].split(5000)])
    return x[:n].to(args.device), y[:n].to(args.device)


def load_torchvision(name, folder):
    """Training and test set, each images (N, C, H, W) uint8 and labels (N,), and the names of the classes."""
    say(f"Looking for {name} in {folder}, to download what is not there")
    parts = []
    for train in (True, False):
        part = TORCHVISION[name](folder, train, download=True)
        x = torch.as_tensor(part.data)  # (N, H, W) if grey, (N, H, W, C) if not
        x = x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        parts.append((x, torch.as_tensor(part.targets)))
    return *parts, part.classes


def load_folder(folder, size):
    """As load_torchvision(), of pictures cropped to their middle square; grey if all are. FOLDER/train and
    FOLDER/test, or names like these, are the two sets; else every tenth picture is for testing."""
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    train = [name for name in ("train", "training") if name in folders]
    test = [name for name in ("test", "testing", "val", "valid", "validation") if name in folders]
    if train and test:
        train, classes = list_pictures(folders.pop(train[0]))
        test, classes = list_pictures(folders.pop(test[0]), classes)
        if folders:
            say(f"Left out: {', '.join(path.name for path in folders.values())}")
    else:
        pictures, classes = list_pictures(folder)
        train = [picture for i, picture in enumerate(pictures) if i % 10 != 9]
        test = pictures[9::10]
    if not train or not test:
        raise ValueError(f"{len(train) + len(test)} pictures are too few, it takes ten")
    say(f"Reading {len(train) + len(test)} pictures from {folder}")
    side = size or max(8, min(64, *load_picture(train[0][0], 64).size) // 4 * 4)
    square = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    parts = []
    for pictures in (train, test):  # each in a mixed order that is always the same
        pictures.sort(key=lambda picture: zlib.crc32(Path(picture[0]).name.encode(errors="surrogateescape")))
        x = torch.stack([square(load_picture(path, side)) for path, _ in pictures])
        parts.append((x, torch.tensor([y for _, y in pictures])))
    if all((x == x[:, :1]).all() for x, _ in parts):
        parts = [(x[:, :1], y) for x, y in parts]
    return *parts, [folder.name if name == "." else name for name in classes]


def list_pictures(folder, classes=None):
    """(path, number of its class) of each picture in FOLDER/CLASS or, as class ".", FOLDER; the classes."""
    hidden = re.compile(r"\.|__MACOSX")
    names = [path.name for path in folder.iterdir() if path.is_dir() and not hidden.match(path.name)] or ["."]
    names.sort(key=lambda name: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)])
    classes = classes or names
    if not set(names) <= set(classes):
        raise ValueError(f"{folder} has other classes than the training set")
    pictures = []
    numbers, suffixes = {name: i for i, name in enumerate(classes)}, datasets.folder.IMG_EXTENSIONS
    for path, y in datasets.ImageFolder.make_dataset(folder, numbers, suffixes, allow_empty=True):
        inside = Path(path).relative_to(folder).parts
        if not any(map(hidden.match, inside)):
            pictures.append((path, y))
            if len(inside) > 2:
                raise ValueError(f"{path} lies too deep: point --data at one of the folders in {folder}")
    return pictures, classes


def load_picture(path, side):
    """A Pillow image as RGB, upright, transparency on white; a large JPEG at a fraction of its size."""
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * side, 2 * side))  # at least so large
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits
                image = image.convert("I").point(lambda value: value / 257 + 0).convert("L")
            image = image.convert("RGB" if image.mode == "CMYK" else "RGBA").convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds of them
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def draw_digits(n, seed):
    """n digits (n, 1, 28, 28) uint8 of a built-in font, warped, with thin and thick strokes; labels (n,)."""
    sheet, font = Image.new("L", (640, 64)), ImageFont.load_default(size=46)
    for i in range(10):
        ImageDraw.Draw(sheet).text((64 * i + 32, 32), str(i), fill=255, font=font, anchor="mm")
    glyphs = v2.functional.pil_to_tensor(sheet).unfold(2, 64, 64).permute(2, 0, 1, 3) / 255  # (10, 1, 64, 64)
    glyphs = v2.functional.gaussian_blur(glyphs, [9, 9], [2.0, 2.0])
    fixed = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=fixed)
    theta = torch.eye(2, 3) + 0.5 * torch.rand(n, 2, 3, generator=fixed) - 0.25  # turn, shear, zoom, shift
    edge = 0.15 + 0.3 * torch.rand(n, 1, 1, 1, generator=fixed)  # where a blurred stroke ends
    images = []
    for y, matrix, end in zip(labels.split(5000), theta.split(5000), edge.split(5000)):
        grid = F.affine_grid(matrix, (len(y), 1, 28, 28), align_corners=False)
        x = (F.grid_sample(glyphs[y], grid, align_corners=False) - end) * 5 + 0.5
        images.append((x.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), labels


# ----- Networks --------------------------------------------------------------------------------
def mlp(sizes, norm=False, leak=0.0, dropout=0.0):
    """Linear layers of these sizes; after each but the last: batch norm, (leaky) ReLU, dropout."""
    layers = []
    for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out) if norm else nn.Identity()]
        layers += [nn.LeakyReLU(leak) if leak else nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def halvings(side, width):
    """Channels of the layers that halve `side` until it is odd or at most 7: 28, 16 -> [16, 32], 7."""
    channels = []
    while side > 7 and side % 2 == 0:
        channels.append(width * 2 ** len(channels))
        side //= 2
    return channels, side


def halve(c_in, c_out, norm):
    """Layers that halve the side of an image, an odd one upwards."""
    convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    return [convolution, nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.LeakyReLU(0.2)]


def conv_encoder(shape, width, out_dim, norm=True):
    """(B, C, H, W) in [0, 1] -> (B, out_dim)."""
    channels, side = halvings(shape[1], width)
    layers = []
    for c_in, c_out in zip([shape[0], *channels], channels):
        layers += halve(c_in, c_out, norm)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, out_dim))


def conv_decoder(shape, width, latent_dim, norm=True):
    """(B, latent_dim) -> logits (B, C, H, W). With twice the encoder's channels, and one more layer."""
    channels, side = halvings(shape[1], width)
    channels = [2 * c for c in reversed(channels)] + [width]
    layers = [nn.Linear(latent_dim, channels[0] * side**2), nn.Unflatten(1, (channels[0], side, side))]
    layers += [nn.BatchNorm2d(channels[0]) if norm else nn.Identity(), nn.ReLU()]
    for c_in, c_out in zip(channels, channels[1:]):
        layers.append(nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1))  # doubles the side
        layers += [nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, shape[0], 3, padding=1))


def conv_discriminator(shape, width, hidden=(), norm=False):
    """(B, C, H, W) in [0, 1] -> logits (B,): strided convolutions, linear layers of the sizes `hidden`.
    In two parts, head(features(x)); features (B, C', H', W') are those of the last convolution but one."""
    channels, side = halvings(shape[1], width)
    features = halve(shape[0], channels[0], norm=False)  # Radford et al. 2016: no batch norm in the first
    for c_in, c_out in zip(channels, channels[1:]):
        features += halve(c_in, c_out, norm)
    last, pixels = 2 * channels[-1], ((side + 1) // 2) ** 2
    head = [features.pop(), *halve(channels[-1], last, norm), nn.Flatten()]  # before their activation
    head += [mlp([last * pixels, *hidden, 1], leak=0.2), nn.Flatten(0)]
    return he(nn.Sequential(OrderedDict(features=nn.Sequential(*features), head=nn.Sequential(*head))))


def he(network):
    """The initialisation of He et al. 2015, in place; torch's own is too timid for a discriminator."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)
    return network


class Conditional(nn.Module):
    """A network told y, one-hot (B, n), beside its input: n more numbers, channels or pixels (flat)."""

    def __init__(self, network, flat=False):
        super().__init__()
        self.network, self.flat = network, flat

    def forward(self, h, y):
        if self.flat:
            h = h.flatten(1)
            y = y * (h.shape[1] / y.shape[1]) ** 0.5  # of about a digit's norm, to be heard
        elif h.dim() == 4:
            y = y[:, :, None, None].expand(-1, -1, *h.shape[2:])
        return self.network(torch.cat([h, y], 1))


# ----- Training and sampling -------------------------------------------------------------------
def to_device(network, device):
    """`network` on `device`; on a CPU in the memory format that makes convolutions a third faster."""
    return network.to(device, memory_format=torch.channels_last if device == "cpu" else torch.preserve_format)


def make_optimizer(args, network, lr, betas=(0.9, 0.999)):
    """The optimiser that --opt names. `betas` are Adam's; sgd has momentum 0.9."""
    if args.opt == "adam":
        return torch.optim.Adam(network.parameters(), lr, betas=betas, fused=True)
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), lr)
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9)


@torch.no_grad()
def update_average(averaged, network, decay, step):
    """Move the weights and batch statistics of `averaged` towards those of `network` by 1 - decay."""
    decay = min(decay, (1 + step) / (10 + step))  # early in a run: of about the last tenth of the steps
    for a, b in zip(averaged.state_dict().values(), network.state_dict().values()):
        a.copy_(a.lerp(b, 1 - decay) if a.is_floating_point() else b)  # whole: batch norm's count of batches


@torch.no_grad()
def predict(network, *inputs):
    """network(*inputs) in parts of 500 rows and in eval mode, with the batch statistics of training."""
    training = network.training
    network.eval()
    output = torch.cat([network(*part) for part in zip(*(rows.split(500) for rows in inputs))])
    network.train(training)
    return output


def interpolate(z_from, z_to):
    """From each z_from to its z_to, both (N, D), in steps of 0.2: (6 N, D)."""
    steps = [torch.lerp(z_from, z_to, t) for t in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return torch.stack(steps, 1).flatten(0, 1)


def traverse(z, codes):
    """z (D,) with one dimension at a time, of the ten in which codes (N, D) vary most, from -3 to 3."""
    dims = codes.var(0, correction=0).topk(min(10, len(z))).indices
    z = z.repeat(len(dims), 10, 1)  # (dims, 10, D)
    z[torch.arange(len(dims)), :, dims] = torch.linspace(-3, 3, 10, device=z.device)
    return z.flatten(0, 1)


# ----- Score -----------------------------------------------------------------------------------
def load_classifier(args, data):
    """A small convolutional classifier of `data`, trained here, always alike (MNIST: 99.3% right)."""
    if len(data.classes) < 2 or len(data.x_test) < 100:
        fail("--score needs at least two classes and 100 test images")
    say("Training the classifier that scores samples")
    c, h, w = data.shape
    torch.manual_seed(0)
    network = to_device(nn.Sequential(
        nn.Conv2d(c, 16, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (h // 4) * (w // 4), 64), nn.ReLU(), nn.Linear(64, len(data.classes)),
    ), args.device)
    batch_size = min(128, len(data.x_train))
    opt = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, 3 * (len(data.x_train) // batch_size))
    for _ in range(3):
        for x, labels in data.batches(batch_size):
            opt.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            opt.step()
            schedule.step()
    return network.eval()


def score(classifier, data, x, labels=None, binarize=False):
    """The quality of samples x (N, C, H, W) in [0, 1], in the classifier's features (N, 64), as a dict:
    fd (Heusel et al. 2017); classes with at least a tenth of an equal share; class_kl = KL(classes of x || of
    test images), nats; precision, recall: share of x covered() by test images, reversed; label_accuracy."""
    features = classifier[:-1].eval()
    real = torch.cat([predict(features, batch) for batch, _ in data.test_batches(binarize)])
    fake = predict(features, x)
    predicted = predict(classifier[-1], fake).argmax(1)
    p, q = (y.bincount(minlength=len(data.classes)) / len(y) for y in (predicted, data.y_test))
    kl = torch.special.xlogy(p, p / q.clamp(min=1e-6)).sum().item()
    numbers = {"fd": fd(fake, real), "classes": (p >= 0.1 / len(p)).sum().item(), "class_kl": kl}
    numbers |= {"precision": covered(fake, real), "recall": covered(real, fake)}
    if labels is not None:
        numbers["label_accuracy"] = (predicted == labels).float().mean().item()
    return numbers


def fd(f, g):
    """Frechet distance |m_f - m_g|^2 + tr(C_f + C_g - 2 (C_f C_g)^(1/2)) of f (N, D) and g (M, D)."""
    f, g = f.cpu().double(), g.cpu().double()
    c_f, c_g = f.T.cov(), g.T.cov()
    cross = torch.linalg.eigvals(c_f @ c_g).real.clamp(min=0).sqrt().sum()
    return ((f.mean(0) - g.mean(0)).square().sum() + c_f.trace() + c_g.trace() - 2 * cross).item()


def covered(points, centres, k=3):
    """Share of points (N, D) in a k-nearest-neighbour ball of centres (M, D): Kynkaanniemi et al. 2019."""
    radii = torch.cdist(centres, centres).topk(k + 1, largest=False).values[:, k]  # [:, 0]: the centre itself
    return (torch.cdist(points, centres) <= radii).any(1).float().mean().item()


# ----- Files -----------------------------------------------------------------------------------
class Log:
    """NAME.csv and the lines on the screen: means of the losses since the row before."""

    def __init__(self, args, data, networks):
        self.args, self.networks = args, networks
        self.steps_per_epoch = len(data.x_train) // args.batch_size
        self.step, self.seconds, self.losses = 0, 0.0, []  # losses of the steps since the last row
        self.rows, self.columns, self.samples = [], [], {}  # of the CSV; of each epoch
        if args.generate is None:
            images = f"{len(data.x_train)} + {len(data.x_test)} images of {' x '.join(map(str, data.shape))}"
            say(f"{args.name}.py on {args.device}: {data.name}, {images} in {len(data.classes)} classes")
            say(f"  to {args.out}: " + ", ".join(f"{name} {x}" for name, x in run_flags(args).items()))

    def state_dict(self):
        return {name: vars(self)[name] for name in ("rows", "samples", "step", "seconds")}

    def load_state_dict(self, state):
        vars(self).update(state)

    def start_epoch(self, epoch):
        self.epoch, self.start = epoch, time.monotonic() - self.seconds

    def add(self, losses):
        """After every step: a dict of detached scalars; if they are not finite the run ends, status 1."""
        self.losses.append(torch.stack(list(losses.values())))
        self.step += 1
        last = self.step % self.steps_per_epoch == 0  # of the epoch: end_epoch() adds to its row
        if self.step % self.args.log_every and not last:
            return
        table, self.losses = torch.stack(self.losses), []  # (steps, losses)
        weights = self.networks.state_dict() if last else {}  # those that the checkpoint will hold
        for name, value in [*zip(losses, table.T), *weights.items()]:
            if not value.isfinite().all():
                fail(f"{name} is not finite at step {self.step}: diverged, a smaller --lr may help", status=1)
        self.seconds = time.monotonic() - self.start
        row = {"epoch": self.epoch, "step": self.step, "seconds": round(self.seconds, 2)}
        self.rows.append(row | {name: round(mean, 6) for name, mean in zip(losses, table.mean(0).tolist())})
        if not last:
            self.write_row()
        if sys.stdout.isatty():
            self.show(end="")

    def show(self, end="\n"):
        """On the screen: where the run is, and the last row; on a terminal in place of the line before."""
        steps = self.args.epochs * self.steps_per_epoch
        left = self.seconds * (steps / self.step - 1)
        line = f"epoch {self.epoch}/{self.args.epochs}  step {self.step}/{steps}  "
        line += "%d:%02d, %d:%02d left" % (*divmod(self.seconds, 60), *divmod(left, 60))
        line += "".join(f"  {name} {x:.5g}" for name, x in list(self.rows[-1].items())[3:])  # all but these
        if sys.stdout.isatty():
            line = "\r\033[K" + (line if end else line[: shutil.get_terminal_size().columns - 1])
        say(line, end)

    def progress(self, x):
        """The first ten samples of each epoch, of at most a hundred and one; x (N, C, H, W): of this one."""
        every = math.ceil(self.args.epochs / 100)
        self.samples = {epoch: rows for epoch, rows in self.samples.items() if epoch % every == 0}
        self.samples[self.epoch] = (x[:10].cpu() * 255).round().to(torch.uint8)
        return torch.cat(list(self.samples.values())) / 255

    def end_epoch(self, numbers):
        """Add a dict of tests and scores to the epoch's last row; write it."""
        self.rows[-1] |= {name: round(number, 6) for name, number in numbers.items()}
        self.write_row()
        self.show()

    def write_row(self):
        """Append the last row to the CSV or, where it has a column that is new, write all of them."""
        anew = not set(self.rows[-1]) <= set(self.columns)
        if anew:
            self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(self.args.out / f"{self.args.name}.csv", "w" if anew else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if anew:
                writer.writeheader()
            writer.writerows(self.rows if anew else self.rows[-1:])


def save_grid(args, what, images, columns=8):
    """NAME_what.png: images (N, C, H, W) in [0, 1], row by row."""
    save_image(images, args.out / f"{args.name}_{what}.png", nrow=columns)


def save_images(args, images, folders=None):
    """NAME_generated/000000.png ...: single images (N, C, H, W); `folders` are the names of N sub-folders."""
    folder = args.out / f"{args.name}_generated"
    if len(images):  # --generate 0 only loads
        say(f"Writing {len(images)} samples to {folder}")
        shutil.rmtree(folder, ignore_errors=True)
    for i, x in enumerate((images.cpu() * 255 + 0.5).to(torch.uint8)):
        path = folder / (folders[i].replace("/", "-") if folders else "") / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(x).save(path)


def run_flags(args):
    """The flags that make a run what it is: not those that say where it runs and writes."""
    apart = ("name", "device", "data_dir", "out", "resume", "generate", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in apart}


def save_checkpoint(args, data, parts, epoch):
    """NAME.pt: the state of `parts`, a dict of all that has a state_dict(), after `epoch`; never a half."""
    checkpoint = {"script": args.name, "flags": run_flags(args), "data": data.about, "epoch": epoch}
    checkpoint["parts"] = {name: part.state_dict() for name, part in parts.items()}
    path = args.out / f"{args.name}.pt"
    torch.save(checkpoint, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)


def read_checkpoint(out, name):
    """The checkpoint NAME.pt in the folder `out`, on the CPU; a line and status 2 if it is not NAME.py's."""
    try:
        checkpoint = torch.load(out / f"{name}.pt", map_location="cpu", weights_only=True)
        if checkpoint["script"] == name:
            return checkpoint
        error = f"it is one of {checkpoint['script']}.py"
    except Exception as problem:  # no file, or whatever unpickling a foreign or truncated one runs into
        error = str(problem).split(". ")[0]
    fail(f"{out / name}.pt is no whole checkpoint of {name}.py, train first: {error}")


def load_checkpoint(args, data, parts):
    """With --resume or --generate restore `parts` from the checkpoint in --out; returns the epochs done."""
    if not args.resume and args.generate is None:
        return 0
    checkpoint = read_checkpoint(args.out, args.name)
    if args.resume and checkpoint["data"] != data.about:
        fail(f"the run to resume had other data: {checkpoint['data']}, not {data.about}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
        for weight, moments in getattr(part, "state", {}).items():  # an optimiser's, of this device's layout
            moments |= {key: torch.empty_like(weight).copy_(x) for key, x in moments.items() if x.dim()}
    if args.resume and checkpoint["epoch"] >= args.epochs:
        say(f"The run is at epoch {checkpoint['epoch']} of {args.epochs}: raise --epochs to go on")
    return checkpoint["epoch"]


# ----- Flags -----------------------------------------------------------------------------------
def fail(message, status=2):
    """End the program with one line on stderr; exit status 2 says that the mistake is in the input."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def say(text, end="\n"):
    """Print at once, with escapes for what stdout cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)


def shared_flags(file, doc, *, batch_size, lr, latent_dim):
    """A parser with the flags of all scripts; `file` and `doc` are the caller's `__file__` and `__doc__`."""
    script, none = Path(file).resolve(), argparse.SUPPRESS
    parser = argparse.ArgumentParser(script.name, "%(prog)s [flags] (--help lists them)", doc.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(name=script.stem, image_size=None, generate=None)  # --help does not print "None"
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--batch-size", type=int, default=batch_size, help="images per step")
    add("--opt", choices=["adam", "rmsprop", "sgd"], default="adam", help="optimiser")
    add("--lr", type=float, default=lr, help="learning rate")
    add("--latent-dim", type=int, default=latent_dim, help="size of z")
    add("--width", type=int, default=16, help="channels of the first convolution")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="auto", help="cpu, cuda, mps, ...; auto: an accelerator, or else the CPU")
    add("--data", default="auto", help=f"{', '.join(TORCHVISION)}, synthetic or FOLDER; auto: mnist, if any")
    add("--data-dir", type=Path, default=script.parent / "data", help="where data sets are kept")
    add("--image-size", type=int, default=none, help="side in pixels (default: the data's, at most 64)")
    add("--translate", type=float, default=0.0, help="shift images by up to this fraction of a side")
    add("--out", type=Path, default=script.parent, help="where files go; with --dry-run: dry-run/ in it")
    add("--log-every", type=int, default=100, help="steps per row of the CSV")
    add("--score", action="store_true", help="after each epoch, measure 10,000 samples (see README.md)")
    add("--resume", action="store_true", help="go on from the checkpoint; --epochs may be raised")
    add("--generate", type=int, metavar="N", default=none, help="only write N samples of the checkpoint")
    add("--dry-run", action="store_true", help="two steps on a small slice, then all the files")
    return parser


def parse(parser, argv=None, brings={}):
    """Parse and check `argv`, or the command line; `brings`: {"--arch conv": "the flags that it brings"}."""
    parser.epilog = "; ".join(f"{choice} brings {flags}" for choice, flags in brings.items())
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    for choice, flags in brings.items():
        flag, value = choice.removeprefix("--").split()
        if getattr(args, flag) == value:
            args = parser.parse_args([*flags.split(), *argv])
    out = args.out.expanduser() / ("dry-run" if args.dry_run else "")  # the files of a real run stay
    if args.resume or args.generate is not None:
        saved = read_checkpoint(out, args.name)["flags"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        free = ("epochs", "data", "score") if args.resume else ("epochs", "data", "score", "seed")
        for name, value in saved.items():
            if name not in free and getattr(args, name) != value:
                parser.error(f"the checkpoint is of a run with --{name} {value}".replace("_", "-"))
    args.out, args.data_dir = out, args.data_dir.expanduser()
    args.epochs = 1 if args.dry_run else args.epochs
    least = {"batch_size": 2, "image_size": 8, "seed": 0, "generate": 0, "lr": 1e-12, "lr_d": 1e-12}
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            low = least.get(name, 1 if type(number) is int else 0)
            high = 1 if name in ("ema", "dropout", "translate") else math.inf
            if type(number) in (int, float) and not low <= number < high:
                parser.error(f"--{name} {number}: must be at least {low} and below {high}".replace("_", "-"))
    if args.image_size and args.image_size % 4:
        parser.error(f"--image-size {args.image_size}: must be a multiple of 4")
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
        if args.generate != 0:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()  # can it be written to?
    except Exception as error:  # of three kinds for a device alone
        parser.error(f"--device {args.device}, --out {args.out}: {str(error).splitlines()[0]}")
    return args

"""What the seven scripts share: flags, data, networks, a few lines of maths, the score, the files.

Images are float tensors (B, C, H, W) in [0, 1] everywhere outside a network; networks return logits. A data
set is one uint8 tensor on the training device. Losses and training loops are in the scripts.

What all have and no paper: small networks; Adam, without momentum in GANs (vaegan.py: with beta_1 0.5); He's
initialisation in discriminators (not in dcgan.py); generators that maximise log D(x_fake), as Goodfellow et
al. advise, on the images that the discriminator has just seen, and draw with averaged weights (--ema).
"""

import argparse
import csv
import math
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_keypoints, save_image

TORCHVISION = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}

# ----- Flags -----------------------------------------------------------------------------------
def fail(message, status=2):
    """End the program with one line on stderr; exit status 2 says that the mistake is in the input."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def say(text, end="\n"):
    """Print at once, with escapes for what stdout cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)


def shared_flags(file, doc, *, batch_size, lr, latent_dim, width):
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
    add("--width", type=int, default=width, help="channels of the first convolution")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="auto", help="cpu, cuda, mps, ...; auto: an accelerator, or else the CPU")
    add("--data", default="auto", help=f"{', '.join(TORCHVISION)}, synthetic, or a folder of pictures whose "
        "sub-folders are the classes; auto: mnist, or synthetic where mnist is not to be had")
    add("--data-dir", type=Path, default=script.parent / "data", help="where data sets are kept")
    add("--image-size", type=int, default=none, help="side in pixels (default: the data's, at most 64)")
    add("--translate", type=float, default=0.0, help="shift images by up to this fraction of a side")
    add("--out", type=Path, default=script.parent, help="where files go; --dry-run: dry-run/ in it")
    add("--log-every", type=int, default=100, help="steps per row of the CSV")
    add("--score", action="store_true", help="after each epoch, measure 10,000 samples (see README.md)")
    add("--resume", action="store_true", help="go on from the checkpoint; --epochs may be raised")
    add("--generate", type=int, metavar="N", default=none, help="only write N samples of the checkpoint")
    add("--dry-run", action="store_true", help="two steps on a small slice, then all the files")
    return parser


def parse(parser, argv=None, **brought):
    """Parse and check `argv` (None: the command line); arch={"conv": {"lr": 1}}: --arch conv brings it."""
    for flag, defaults in brought.items():
        parser.set_defaults(**defaults.get(getattr(parser.parse_args(argv), flag), {}))
    if parser.parse_args(argv).dry_run:  # it never touches the files of a real run
        parser.set_defaults(out=parser.get_default("out") / "dry-run")
    args = parser.parse_args(argv)
    if args.generate or args.resume:
        saved = read_checkpoint(args)["flags"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name, value in saved.items():
            if args.resume and name not in ("epochs", "data", "score") and getattr(args, name) != value:
                parser.error(f"the run to resume has --{name.replace('_', '-')} {value}")
    low = {"batch_size": 2, "image_size": 8, "seed": 0, "lr": 1e-12, "lr_d": 1e-12}
    high = {"ema": 1, "dropout": 1, "translate": 1}
    for name, values in vars(args).items():
        for value in values if isinstance(values, list) else [values]:
            least, most = low.get(name, 1 if type(value) is int else 0), high.get(name, math.inf)
            if type(value) in (int, float) and not least <= value < most:
                parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least} and below {most}")
    if args.image_size and args.image_size % 4:
        parser.error(f"--image-size {args.image_size}: must be a multiple of 4")
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
        args.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # of three kinds for a device alone
        parser.error(f"--device {args.device}, --out {args.out}: {str(error).splitlines()[0]}")
    args.epochs = 1 if args.dry_run else args.epochs
    return args


# ----- Data ------------------------------------------------------------------------------------
class Data:
    """A training and a test set on one device: images (N, C, H, W) uint8, labels (N,) int64; class names."""

    def __init__(self, name, x, y, classes):
        (self.x_train, self.x_test), (self.y_train, self.y_test) = x, y
        self.name, self.classes, self.shape = name, classes, tuple(x[0].shape[1:])
        self.about = {"shape": self.shape, "classes": classes, "images": len(x[0])}  # for the checkpoint

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
    crop = v2.RandomCrop(x.shape[2:], padding=[int(fraction * x.shape[3]), int(fraction * x.shape[2])])
    return torch.stack([crop(image) for image in x])


def load_data(args, conditional=False):
    """The data set that --data names, on --device, as Data; one line and status 2 if it cannot be used."""
    if args.generate:  # the networks need the shape and the classes, nothing else
        about = read_checkpoint(args)["data"]
        x, y = torch.empty(0, *about["shape"], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return Data(args.data, (x, x), (y, y), about["classes"])
    name = "mnist" if args.data == "auto" else args.data.lower()
    n = (2 * args.batch_size, 200) if args.dry_run else (10**9, 10**9)  # images at most
    try:
        if name in TORCHVISION:
            sets = [TORCHVISION[name](args.data_dir, train, download=True) for train in (True, False)]
            x, y = [[torch.as_tensor(getattr(part, of)) for part in sets] for of in ("data", "targets")]
            x = [part[:, None] if part.dim() == 3 else part.permute(0, 3, 1, 2).contiguous() for part in x]
            classes = sets[0].classes
        elif name != "synthetic":
            name = Path(args.data).resolve().name
            x, y, classes = load_folder(Path(args.data).resolve(), args.image_size)
    except Exception as error:  # whatever torchvision, the network or a damaged file runs into
        if args.data != "auto":
            fail(f"--data {args.data}: {error} (known are {', '.join(TORCHVISION)}, synthetic and folders of "
                 f"pictures; the files of mnist belong into {args.data_dir / 'MNIST/raw'})")
        name = "synthetic"
        say(f"No MNIST in {args.data_dir / 'MNIST/raw'}: synthetic digits instead; --data mnist says why")
    if name == "synthetic":
        digits = draw_digits(min(n[0], 60_000), seed=1), draw_digits(min(n[1], 10_000), seed=2)
        (x, y), classes = zip(*digits), list("0123456789")
    x, y = [[part[:most] for part, most in zip(pair, n)] for pair in (x, y)]
    if len(x[0]) < args.batch_size or len(classes) < 1 + conditional:
        fail(f"--data {args.data}: {len(x[0])} images of {len(classes)} classes are too few for this model")
    if args.image_size:
        x = [torch.cat([v2.Resize([args.image_size] * 2)(p) for p in part.split(5000)]) for part in x]
    if args.translate:  # once, so that every epoch and every run is measured on the same shifted images
        torch.manual_seed(0)
        x = [x[0], shift(x[1], args.translate)]
    return Data(name, *([part.to(args.device) for part in pair] for pair in (x, y)), classes)


def load_folder(folder, size):
    """Images and labels, each (training, test), and class names, of pictures cropped to their middle square.

    Sub-folders are the classes. FOLDER/train and FOLDER/test, or names like these, are the two sets; without
    them every tenth picture is for testing. Images are grey if all of them are."""
    pictures = []  # pairs of a path and the names of the folders above it
    for path in sorted(folder.rglob("*")):
        *above, _ = parts = path.relative_to(folder).parts
        if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS:
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                pictures.append((path, above))
    if not pictures:
        raise FileNotFoundError("no folder, or no pictures in it")
    train_names, test_names = {"train", "training"}, {"test", "testing", "val", "valid", "validation"}
    tops = {above[0].lower() if above else "" for _, above in pictures}
    split = tops <= train_names | test_names
    if split and not (len(tops) == 2 and len(tops & train_names) == 1):
        fail(f"--data {folder}: {sorted(tops)} are no training and test set: point --data at one of them")
    classes = [above[split] if len(above) > split else "" for _, above in pictures]
    names = sorted({*classes}, key=lambda c: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", c)])
    sets = [[], []]
    for i, ((path, above), name) in enumerate(zip(pictures, classes)):
        sets[above[0].lower() in test_names if split else i % 10 == 9].append((path, names.index(name)))
    if not all(sets) or any(len({y for _, y in part}) < len(names) for part in sets[: 1 + split]):
        fail(f"--data {folder}: too few pictures, or classes missing in the training or the test set")
    sets = [sorted(part, key=lambda picture: zlib.crc32(picture[0].name.encode())) for part in sets]  # mixed
    say(f"Reading {len(sets[0]) + len(sets[1])} pictures from {folder}")
    side = size or max(8, min(64, *load_picture(sets[0][0][0]).size) // 4 * 4)
    square = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    x = [torch.stack([square(load_picture(path)) for path, _ in part]) for part in sets]
    if all((part == part[:, :1]).all() for part in x):
        x = [part[:, :1].contiguous() for part in x]
    return x, [torch.tensor([y for _, y in part]) for part in sets], [name or folder.name for name in names]


def load_picture(path):
    """A Pillow image as RGB: upright, transparency on white, 16-bit grey as 8-bit."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = image.convert("I").point(lambda value: value / 257 + 0).convert("L")
            image = image.convert("RGB" if image.mode == "CMYK" else "RGBA").convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds of them
        fail(f"{path} cannot be read as a picture: {error}")


def draw_digits(n, seed):
    """n digits (n, 1, 28, 28) uint8 of a built-in font, warped, with thin and thick strokes; labels (n,)."""
    sheet, font = Image.new("L", (640, 64)), ImageFont.load_default(size=46)
    for i in range(10):
        ImageDraw.Draw(sheet).text((64 * i + 32, 32), str(i), fill=255, font=font, anchor="mm")
    glyphs = v2.functional.pil_to_tensor(sheet).unfold(2, 64, 64).permute(2, 0, 1, 3) / 255
    glyphs = v2.functional.gaussian_blur(glyphs, [9, 9], [2.0, 2.0])
    fixed = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=fixed)
    theta = torch.eye(2, 3) + 0.5 * torch.rand(n, 2, 3, generator=fixed) - 0.25  # turn, shear, zoom, shift
    edge = 0.15 + 0.3 * torch.rand(n, 1, 1, 1, generator=fixed)  # where a blurred stroke ends
    images = []
    for y, matrix, end in zip(labels.split(5000), theta.split(5000), edge.split(5000)):
        grid = F.affine_grid(matrix, (len(y), 1, 28, 28), align_corners=False)
        x = F.grid_sample(glyphs[y], grid, align_corners=False)
        images.append((((x - end) * 5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), labels


# ----- Networks --------------------------------------------------------------------------------
def mlp(sizes, norm=False, activation=nn.ReLU, dropout=0.0):
    """Linear layers of these sizes; after each but the last: batch norm, activation, dropout."""
    norm, layers = nn.BatchNorm1d if norm else nn.Identity, []
    for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(n_in, n_out), norm(n_out), activation(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def mlp_decoder(shape, hidden, latent_dim, norm=True):
    """(B, latent_dim) -> logits (B, C, H, W)."""
    return nn.Sequential(mlp([latent_dim, *hidden, math.prod(shape)], norm), nn.Unflatten(1, shape))


def halvings(shape, width):
    """Channels, and the side halved until odd or at most 7: (1, 28, 28), 16 -> [1, 16, 32], 7."""
    channels, side = [shape[0]], shape[1]
    while side > 7 and side % 2 == 0:
        channels, side = [*channels, width * 2 ** (len(channels) - 1)], side // 2
    return channels, side


def conv_encoder(shape, width, out_dim, norm=True):
    """(B, C, H, W) in [0, 1] -> (B, out_dim)."""
    (channels, side), norm, layers = halvings(shape, width), nn.BatchNorm2d if norm else nn.Identity, []
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), norm(c_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, out_dim))


def conv_decoder(shape, width, latent_dim, norm=True):
    """(B, latent_dim) -> logits (B, C, H, W). With twice the encoder's channels, and one more layer."""
    (channels, side), norm = halvings(shape, width), nn.BatchNorm2d if norm else nn.Identity
    channels = [2 * c for c in channels[:0:-1]] + [width]
    layers = [nn.Linear(latent_dim, channels[0] * side**2), nn.Unflatten(1, (channels[0], side, side))]
    layers += [norm(channels[0]), nn.ReLU()]
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1), norm(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, shape[0], 3, padding=1))


def discriminator(features, head):
    """(B, C, H, W) in [0, 1] -> logits (B,): a Sequential of two parts, the layers `features` and `head`."""
    network = nn.Sequential()
    network.features, network.head = nn.Sequential(*features), nn.Sequential(*head, nn.Flatten(0))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # He et al. 2015: torch's own start is too timid
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)
    return network


def mlp_discriminator(shape, hidden, norm=False, dropout=0.0):
    """A discriminator() of linear layers with leaky ReLU."""
    layers = mlp([math.prod(shape), *hidden, 1], norm, lambda: nn.LeakyReLU(0.2), dropout)
    return discriminator([nn.Flatten()], layers)


def conv_discriminator(shape, width, hidden=(), norm=False):
    """A discriminator() of strided convolutions, then linear layers of the sizes `hidden`.

    Its features (B, C', H', W') are those of the last convolution but one, before their activation."""
    (channels, side), norm, layers = halvings(shape, width), nn.BatchNorm2d if norm else nn.Identity, []
    channels, side = [*channels, 2 * channels[-1]], -(-side // 2)
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), norm(c_out), nn.LeakyReLU(0.2)]
    layers[1] = nn.Identity()  # no batch norm in the first layer: Radford et al. 2016
    linear = mlp([channels[-1] * side**2, *hidden, 1], activation=lambda: nn.LeakyReLU(0.2))
    return discriminator(layers[:-4], [*layers[-4:], nn.Flatten(), linear])


class Conditional(nn.Module):
    """A network told y, one-hot (B, n), beside its input: n more numbers, channels or pixels (flat)."""

    def __init__(self, network, flat=False):
        super().__init__()
        self.network, self.flat = network, flat

    def forward(self, h, y):
        if self.flat:
            h, y = h.flatten(1), y * (h[0].numel() / y.shape[1]) ** 0.5  # of a digit's norm, to be heard
        elif h.dim() == 4:
            y = y[:, :, None, None].expand(-1, -1, *h.shape[2:])
        return self.network(torch.cat([h, y], 1))


# ----- Training and sampling -------------------------------------------------------------------
def to_device(network, device):
    """`network` on `device`; on a CPU in the memory format that makes convolutions a third faster."""
    return network.to(device, memory_format=torch.channels_last if device == "cpu" else torch.preserve_format)


def make_optimizer(args, network, lr, betas=(0.9, 0.999)):
    """The optimiser that --opt names. `betas` are Adam's; sgd has momentum 0.9."""
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[args.opt]
    more = {"adam": {"betas": betas, "fused": True}, "rmsprop": {}, "sgd": {"momentum": 0.9}}[args.opt]
    return kind(network.parameters(), lr, **more)


@torch.no_grad()
def update_average(averaged, network, decay, step):
    """Move the weights and batch statistics of `averaged` towards those of `network` by 1 - decay."""
    decay = min(decay, (1 + step) / (10 + step))  # early in a run: of about the last tenth of the steps
    for a, b in zip(averaged.state_dict().values(), network.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


@torch.no_grad()
def predict(network, *inputs):
    """network(*inputs) in parts of 500 rows and in eval mode, with the batch statistics of training."""
    network.eval()
    output = torch.cat([network(*part) for part in zip(*(rows.split(500) for rows in inputs))])
    network.train()
    return output


def interpolate(z_from, z_to):
    """From each z_from to its z_to, both (N, D), in steps of 0.2: (6 N, D)."""
    t = torch.linspace(0, 1, 6, device=z_from.device)[:, None]
    return torch.lerp(z_from[:, None], z_to[:, None], t).flatten(0, 1)


def traverse(z, codes):
    """z (D,) with one dimension at a time, of the ten in which codes (N, D) vary most, from -3 to 3."""
    dims = codes.var(0, correction=0).topk(min(10, len(z))).indices
    z = z.repeat(len(dims), 10, 1)
    z[torch.arange(len(dims)), :, dims] = torch.linspace(-3, 3, 10, device=z.device)
    return z.flatten(0, 1)


# ----- Score -----------------------------------------------------------------------------------
def load_classifier(args, data):
    """A small convolutional classifier of `data` (MNIST: 99.3% right), trained once, kept in --data-dir."""
    if len(data.classes) < 2 or len(data.x_test) < 100:
        fail("--score needs at least two classes and 100 test images")
    c, h, w = data.shape
    torch.manual_seed(0)
    network = to_device(nn.Sequential(
        nn.Conv2d(c, 16, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (h // 4) * (w // 4), 64), nn.ReLU(), nn.Linear(64, len(data.classes)),
    ), args.device)
    checksum = zlib.crc32(data.x_train.cpu().numpy())  # each data set at each size has its own classifier
    path = args.data_dir / f"classifier-{data.name}-{checksum:08x}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network.eval()
    say(f"Training the classifier that scores samples, once: {path}")
    batch_size = min(128, len(data.x_train))
    opt = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, 3 * (len(data.x_train) // batch_size))
    for x, labels in (batch for _ in range(3) for batch in data.batches(batch_size)):
        opt.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        opt.step()
        schedule.step()
    if not args.dry_run:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        save(network.state_dict(), path)
    return network.eval()


def score(classifier, data, x, labels=None):
    """The quality of samples x (N, C, H, W) in [0, 1], in the classifier's features (N, 64), as a dict.

    fd (as the FID of Heusel et al. 2017, in other features); classes with at least a tenth of an equal share;
    class_kl = KL(classes of samples || of test set), nats; precision, recall: samples covered() by test
    images, and the reverse; label_accuracy: samples that show the label asked for, `labels` (N,)."""
    real = torch.cat([predict(classifier[:-1], batch) for batch, _ in data.test_batches()])
    fake, n = predict(classifier[:-1], x), len(data.classes)
    predicted = predict(classifier[-1], fake).argmax(1)
    p, q = (y.bincount(minlength=n) / len(y) for y in (predicted, data.y_test))
    kl = torch.special.xlogy(p, p / q.clamp(min=1e-6)).sum().item()
    accuracy = {} if labels is None else {"label_accuracy": (predicted == labels).float().mean().item()}
    return {"fd": fd(fake, real), "classes": int((p >= 0.1 / n).sum()), "class_kl": kl,
            "precision": covered(fake, real), "recall": covered(real, fake), **accuracy}


def fd(f, g):
    """Frechet distance |m_f - m_g|^2 + tr(C_f + C_g - 2 (C_f C_g)^(1/2)) of f (N, D) and g (M, D)."""
    f, g = f.cpu().double(), g.cpu().double()
    c_f, c_g = f.T.cov(), g.T.cov()
    cross = torch.linalg.eigvals(c_f @ c_g).real.clamp(min=0).sqrt().sum()
    return ((f.mean(0) - g.mean(0)).square().sum() + c_f.trace() + c_g.trace() - 2 * cross).item()


def covered(points, centres, k=3):
    """Share of points (N, D) in a k-nearest-neighbour ball of centres (M, D): Kynkaanniemi et al. 2019."""
    nearest = [torch.cdist(part, centres).topk(k + 1, largest=False).values for part in centres.split(1000)]
    radii = torch.cat(nearest)[:, k]  # the nearest of all is the centre itself
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


# ----- Files -----------------------------------------------------------------------------------
class Log:
    """NAME.csv and the lines on the screen: means of the losses since the line before."""

    def __init__(self, args, data, networks):
        self.args, self.data, self.networks, self.losses = args, data, networks, []
        self.rows, self.step, self.seconds = [], 0, 0.0
        self.samples = torch.empty(0, *data.shape, dtype=torch.uint8)
        self.steps_per_epoch = len(data.x_train) // args.batch_size
        if not args.generate:
            counts = data.y_train.bincount(minlength=len(data.classes)).tolist()
            classes = ", ".join([f"{name} ({count})" for name, count in zip(data.classes, counts)][:10])
            images = f"{len(data.x_train)} + {len(data.x_test)} images of {' x '.join(map(str, data.shape))}"
            say(f"{args.name}.py on {args.device}: {data.name}, {images}, {len(counts)} classes: {classes}")
            say("  " + ", ".join(f"{name} {value}" for name, value in run_flags(args).items()))

    def state_dict(self):
        return {name: vars(self)[name] for name in ("rows", "step", "seconds", "samples")}

    def load_state_dict(self, state):
        vars(self).update(state)

    def start_epoch(self, epoch):
        self.epoch, self.start = epoch, time.monotonic() - self.seconds

    def add(self, losses):
        """After every step: a dict of detached scalars; if they are not finite the run ends, status 1."""
        self.losses.append(torch.stack(list(losses.values())))
        self.step += 1
        if self.step % self.args.log_every and self.step % self.steps_per_epoch:
            return
        table, self.losses = torch.stack(self.losses), []
        spoilt = [f"{list(losses)[column]} at step {self.step - len(table) + row + 1}"
                  for row, column in (~table.isfinite()).nonzero().tolist()]
        spoilt += [f"a weight of the {name} at step {self.step}" for name, network in self.networks.items()
                   if not all(value.isfinite().all() for value in network.state_dict().values())]
        if spoilt:
            self.write_csv()
            fail(f"{spoilt[0]} is not finite: training diverged, a smaller --lr may help", status=1)
        self.seconds = time.monotonic() - self.start
        self.rows.append({"epoch": self.epoch, "step": self.step, "seconds": round(self.seconds, 2)})
        self.rows[-1].update({name: round(x, 6) for name, x in zip(losses, table.mean(0).tolist())})
        if sys.stdout.isatty():
            say(f"\r\033[K{self.line()[:shutil.get_terminal_size().columns - 1]}", end="")

    def progress(self, x):
        """The first ten samples of each epoch so far; x (N, C, H, W) are those of this one."""
        self.samples = torch.cat([self.samples, (x[:10].cpu() * 255).round().to(torch.uint8)])
        return self.samples / 255

    def end_epoch(self, numbers):
        """Add a dict of tests and scores to the epoch's last row; write the CSV."""
        self.rows[-1].update({name: round(x, 6) for name, x in numbers.items()})
        self.write_csv()
        say("\r\033[K" * sys.stdout.isatty() + self.line())
        if self.epoch == self.args.epochs:
            say("Wrote {0}.csv, {0}.pt and {0}_*.png to {1}".format(self.args.name, self.args.out))

    def line(self):
        return "  ".join(f"{name} {value:.5g}" for name, value in self.rows[-1].items())

    def write_csv(self):
        path = self.args.out / f"{self.args.name}.csv"
        with open(f"{path}.tmp", "w", newline="") as file:
            columns = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        Path(f"{path}.tmp").replace(path)


def save_grid(args, what, images, columns=8):
    """NAME_what.png: images (N, C, H, W) in [0, 1], row by row."""
    save_image(images, args.out / f"{args.name}_{what}.png", nrow=columns)


def scatter(codes, labels, classes):
    """An image (3, 600, 720) uint8: codes (N, 2) as dots, from -4 to 4, in the colours of their classes."""
    image = torch.full((3, 600, 720), 255, dtype=torch.uint8)
    dots = 300 + 75 * codes.cpu().clamp(-4, 4) * torch.tensor([1, -1])
    for i, name in enumerate(classes):
        color = f"hsv({360 * i / len(classes)}, 90%, {60 if i % 2 else 90}%)"
        image = draw_keypoints(image, dots[labels.cpu() == i][None], colors=color, radius=1)
        place = torch.tensor([[610, 20 + 20 * i, 700, 36 + 20 * i]])
        image = draw_bounding_boxes(image, place, [name], color, width=0)
    return image


def save_images(args, images, folders=None):
    """NAME_generated/000000.png ...: single images (N, C, H, W); `folders` are the names of N sub-folders."""
    folder = args.out / f"{args.name}_generated"
    shutil.rmtree(folder, ignore_errors=True)
    for i, x in enumerate(images):
        path = folder / (folders[i].replace("/", "-") if folders else "") / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(x, path)
    say(f"Wrote {len(images)} samples to {folder}")


def run_flags(args):
    """The flags that make a run what it is: not those that say where it runs and writes."""
    apart = ("name", "device", "data_dir", "out", "resume", "generate", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in apart}


def save(state, path):
    """torch.save() such that `path` holds either its old content or all of the new."""
    torch.save(state, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)


def save_checkpoint(args, data, parts, epoch):
    """NAME.pt: the state of `parts`, a dict of all that has a state_dict(), after `epoch`."""
    state = {name: part.state_dict() for name, part in parts.items()}
    about = {"script": args.name, "flags": run_flags(args), "data": data.about, "epoch": epoch}
    save({**about, "parts": state}, args.out / f"{args.name}.pt")


def read_checkpoint(args):
    """The checkpoint in --out as a dict on the CPU; one line and status 2 if it is none of this script's."""
    path = args.out / f"{args.name}.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != args.name:
            raise ValueError(f"it is one of {checkpoint['script']}.py")
        return checkpoint
    except Exception as error:  # no file, or whatever unpickling a foreign or truncated one runs into
        fail(f"{path} is no whole checkpoint of {args.name}.py, train first: {str(error).split('. ')[0]}")


def load_checkpoint(args, data, parts):
    """With --resume or --generate restore `parts` from the checkpoint in --out; returns the epochs done."""
    if not (args.resume or args.generate):
        return 0
    checkpoint, path = read_checkpoint(args), args.out / f"{args.name}.pt"
    if args.resume and checkpoint["data"] != data.about:
        fail(f"{path} was trained on other data: {checkpoint['data']}, not {data.about}")
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
    except (KeyError, RuntimeError, ValueError):
        fail(f"{path} holds other networks than the flags ask for: leave them out")
    if args.resume and checkpoint["epoch"] >= args.epochs:
        say(f"{path} is at epoch {checkpoint['epoch']} of {args.epochs}: raise --epochs to go on")
    return checkpoint["epoch"]

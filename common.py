"""What the seven scripts share: data, networks, a few lines of maths, the score, the files, the flags.

Images are tensors (B, C, H, W) in [0, 1], but dcgan.py's networks use [-1, 1]. Networks return logits."""

import argparse
import csv
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
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
    """A data set on one device. `train` and `test` are pairs of images (N, C, H, W) uint8 and labels (N,)."""

    def __init__(self, train, test, classes):
        (self.x_train, self.y_train), (self.x_test, self.y_test) = train, test
        self.classes, self.shape = classes, tuple(self.x_train.shape[1:])

    def batches(self, batch_size, translate=0.0):
        """Yield x (B, C, H, W) and labels (B,): one epoch in a new random order, without a partial batch."""
        order = torch.randperm(len(self.x_train)).to(self.x_train.device)
        for index in order.split(batch_size)[: len(order) // batch_size]:
            x = shift(self.x_train[index], translate) if translate else self.x_train[index]
            yield x.float() / 255, self.y_train[index]

    def test_batches(self, binarize=False):
        """The test set in order: x in [0, 1], or binary x, the same at each call, and labels."""
        fixed = torch.Generator().manual_seed(0)
        for x, labels in zip(self.x_test.split(1000), self.y_test.split(1000)):
            x = x.float() / 255
            yield torch.bernoulli(x.cpu(), generator=fixed).to(x.device) if binarize else x, labels


def shift(x, fraction):
    """Shift each image of x (B, C, H, W) by whole pixels, up to `fraction` of a side; gaps are black."""
    n, _, height, width = x.shape
    down, right = int(fraction * height), int(fraction * width)  # the largest shifts
    x = F.pad(x, (right, right, down, down))
    views = x.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 down + 1, 2 right + 1, H, W)
    rows, columns = torch.randint(2 * down + 1, (n,)), torch.randint(2 * right + 1, (n,))
    index = torch.stack([torch.arange(n), rows, columns]).to(x.device)
    return views[index[0], :, index[1], index[2]]


def load_data(args, conditional=False):
    """Load the data set that --data names onto --device; args.data becomes its name, for --resume."""
    if args.generate is not None:  # only the shape and the classes matter
        saved = read_checkpoint(args.out, args.name)["data"]
        empty = torch.empty(0, *saved["shape"], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        return Data(empty, empty, saved["classes"])
    name = "mnist" if args.data == "auto" else args.data.lower()
    try:
        if name in TORCHVISION:
            train, test, classes = load_torchvision(name, args.data_dir)
        elif name != "synthetic":
            name = str(Path(args.data).expanduser().resolve())
            train, test, classes = load_folder(Path(name), args.image_size)
    except Exception as error:
        hint = f". Put MNIST's four files into {args.data_dir}/MNIST/raw" if name == "mnist" else ""
        if args.data != "auto" or [*args.data_dir.glob("*ubyte*"), *args.data_dir.glob("MNIST/**/*ubyte*")]:
            fail(f"--data {args.data}: {error}{hint}")
        print(f"MNIST was not found and could not be downloaded: training on synthetic digits{hint}")
        name = "synthetic"
    if name == "synthetic":
        train = draw_digits(2 * args.batch_size if args.dry_run else 60_000, seed=1)
        test = draw_digits(200 if args.dry_run else 10_000, seed=2)
        classes = list("0123456789")
    missing = set(range(len(classes))) - (set(train[1].tolist()) & set(test[1].tolist()))
    if conditional and len(classes) == 1:
        fail(f"--data {name}: only one class was found; use FOLDER/CLASS/*.jpg")
    if conditional and missing and name != "synthetic":  # a dry run draws only a few
        fail(f"--data {name}: class {classes[min(missing)]} needs ten pictures, or some in train and in test")
    if len(train[0]) < args.batch_size:
        fail(f"--data {name}: {len(train[0])} training images do not fill a batch; lower --batch-size")
    args.data, parts = name, []
    for (x, y), n in ((train, 2 * args.batch_size), (test, 200)):
        n = n if args.dry_run else len(x)
        if args.image_size:
            x = torch.cat([v2.functional.resize(some, [args.image_size] * 2) for some in x[:n].split(5000)])
        parts.append((x[:n].to(args.device), y[:n].to(args.device)))
    data = Data(*parts, classes)
    # Every epoch and every run is measured on the same shifted images
    torch.manual_seed(0)
    data.x_test = shift(data.x_test, args.translate)
    return data


def load_torchvision(name, folder):
    """The training and the test set, each images (N, C, H, W) uint8 and labels (N,); the names of classes."""
    print(f"Looking for {name} in {folder}; what is missing is downloaded")
    parts = []
    for train in (True, False):
        part = TORCHVISION[name](folder, train, download=True)
        x = torch.as_tensor(part.data)  # (N, H, W) if grey, (N, H, W, C) if not
        x = x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2)
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() may keep the strides
        parts.append((x, torch.as_tensor(part.targets)))
    return *parts, part.classes


def load_folder(folder, size):
    """Like load_torchvision(), for a folder as README.md describes: middle squares, grey if all are grey."""
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    train = [folders[name] for name in ("train", "training") if name in folders]
    test = [folders[n] for n in ("test", "testing", "val", "valid", "validation") if n in folders]
    if train and test:
        print(f"The training set is {train[0]}, the test set {test[0]}")
        train, classes = list_pictures(train[0])
        test, _ = list_pictures(test[0], classes)
    else:
        train, classes = list_pictures(folder)
        test = train[9::10]  # every tenth picture
        del train[9::10]
    print(f"Reading {len(train) + len(test)} pictures from {folder}", flush=True)
    images, unread, parts = {}, [], []
    for path, _ in train + test:
        try:
            images[path] = load_picture(path, size or 64)
        except Exception as error:
            unread.append(f"{path}: {error}")
    if unread:
        print(f"Left out {len(unread)} unreadable pictures, the first is {unread[0]}")
    for pictures in (train, test):
        pictures = [(images[path], y) for path, y in pictures if path in images]
        if not pictures:
            raise ValueError(f"{len(images)} pictures are too few to train and test; use ten or more")
        random.Random(0).shuffle(pictures)  # a mixed order that is always the same
        side = size or max(8, statistics.median_low(image.width for image in images.values()) // 4 * 4)
        x = [v2.functional.pil_to_tensor(image.resize((side, side))) for image, _ in pictures]
        parts.append((torch.stack(x), torch.tensor([y for _, y in pictures])))
    if all((x == x[:, :1]).all() for x, _ in parts):
        parts = [(x[:, :1], y) for x, y in parts]
    return *parts, [folder.name if name == "." else name for name in classes]


def list_pictures(folder, classes=None):
    """List (path, index of the class) for each picture, and the classes: "." if there are no sub-folders."""
    hidden = (".", "__MACOSX")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(hidden)) or ["."]
    if classes and names != classes:
        raise ValueError(f"{folder} must have the classes of the training set, a folder for each")
    pictures, index = [], {name: i for i, name in enumerate(names)}
    for path, y in datasets.ImageFolder.make_dataset(folder, index, datasets.folder.IMG_EXTENSIONS):
        inside = Path(path).relative_to(folder).parts
        if not any(part.startswith(hidden) for part in inside):
            pictures.append((path, y))
            if len(inside) > 2:
                raise ValueError(f"{path} lies too deep; point --data at one of the folders in {folder}")
            if path.endswith("_progress.png"):
                raise ValueError(f"{path} was written by a run; move that run's files away")
    return pictures, names


def load_picture(path, most):
    """The middle square of a picture in RGB, at most `most` pixels a side, upright, on a white background."""
    with Image.open(path) as image:
        image.draft(None, (2 * most, 2 * most))  # decodes a large JPEG at a smaller size
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits
            image = image.convert("I").point(lambda value: value / 257 + 0).convert("L")
        image = image.convert("RGB" if image.mode == "CMYK" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        side = min(most, *image.size)
        return ImageOps.fit(image, (side, side))


def draw_digits(n, seed):
    """Draw n digits (n, 1, 28, 28) uint8 in a built-in font, thin or thick, and warp them; labels (n,)."""
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
    """Linear layers of these sizes; each but the last is followed by batch norm, (leaky) ReLU and dropout."""
    layers = []
    for n_in, n_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out) if norm else nn.Identity()]
        layers += [nn.LeakyReLU(leak) if leak else nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def halvings(side, width):
    """For layers that halve `side` while even and over 7: channels, last side; 28, 16 -> [16, 32], 7."""
    channels = []
    while side > 7 and side % 2 == 0:
        channels.append(width * 2 ** len(channels))
        side //= 2
    return channels, side


def halve(c_in, c_out, norm):
    """Layers that halve the side of an image; half of an odd side is rounded up."""
    convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    return [convolution, nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.LeakyReLU(0.2)]


def conv_encoder(shape, width, out_dim, norm=True):
    """x (B, C, H, W) -> (B, out_dim)."""
    channels, side = halvings(shape[1], width)
    layers = []
    for c_in, c_out in zip([shape[0], *channels], channels):
        layers += halve(c_in, c_out, norm)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, out_dim))


def conv_decoder(shape, width, latent_dim, norm=True):
    """z (B, latent_dim) -> logits (B, C, H, W). It has twice the encoder's channels, and one more layer."""
    channels, side = halvings(shape[1], width)
    channels = [2 * c for c in reversed(channels)] + [width]
    layers = [nn.Linear(latent_dim, channels[0] * side**2), nn.Unflatten(1, (channels[0], side, side))]
    layers += [nn.BatchNorm2d(channels[0]) if norm else nn.Identity(), nn.ReLU()]
    for c_in, c_out in zip(channels, channels[1:]):
        layers.append(nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1))  # doubles the side
        layers += [nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, shape[0], 3, padding=1))


def conv_discriminator(shape, width, hidden=(), norm=False):
    """x (B, C, H, W) -> logits (B,): strided convolutions, then linear layers of the sizes `hidden`. It has
    two parts, head(features(x)); the features are the output of the last convolution but one."""
    channels, side = halvings(shape[1], width)
    features = halve(shape[0], channels[0], norm=False)  # none in the first: Radford et al. 2016
    for c_in, c_out in zip(channels, channels[1:]):
        features += halve(c_in, c_out, norm)
    last, pixels = 2 * channels[-1], ((side + 1) // 2) ** 2
    head = [features[-1], *halve(channels[-1], last, norm), nn.Flatten()]  # begins with their activation
    head += [mlp([last * pixels, *hidden, 1], leak=0.2), nn.Flatten(0)]
    network = nn.Sequential()
    network.features, network.head = nn.Sequential(*features[:-1]), nn.Sequential(*head)
    return he(network)


def he(network):
    """Initialise `network` as He et al. 2015, in place; torch's weights are too small for a discriminator."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)
    return network


class Conditional(nn.Module):
    """Appends the one-hot label y (B, n) to the input of `network` as numbers, channels or (flat) pixels."""

    def __init__(self, network, flat=False):
        super().__init__()
        self.network, self.flat = network, flat

    def forward(self, h, y):
        if self.flat:
            h = h.flatten(1)
            y = y * (h.shape[1] / y.shape[1]) ** 0.5  # about a digit's norm; y is too faint otherwise
        elif h.dim() == 4:
            y = y[:, :, None, None].expand(-1, -1, h.shape[2], h.shape[3])
        return self.network(torch.cat([h, y], 1))


# ----- Training and sampling -------------------------------------------------------------------
def to_device(network, device):
    """Move `network` to `device`, on a CPU in the memory format that makes convolutions a third faster."""
    return network.to(device, memory_format=torch.channels_last if device == "cpu" else torch.preserve_format)


def make_optimizer(args, network, lr, betas=(0.9, 0.999)):
    """The optimiser that --opt names. Only adam uses `betas`; sgd has a momentum of 0.9."""
    if args.opt == "adam":
        return torch.optim.Adam(network.parameters(), lr, betas=betas, fused=True)
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), lr)
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9)


@torch.no_grad()
def update_average(averaged, network, decay, step):
    """Move the weights and batch statistics of `averaged` towards those of `network` by 1 - decay."""
    decay = min(decay, (1 + step) / (10 + step))  # early: of a tenth of the run
    for a, b in zip(averaged.state_dict().values(), network.state_dict().values()):
        if a.is_floating_point():  # all but batch norm's count of batches
            a.lerp_(b, 1 - decay)


@torch.no_grad()
def predict(network, *inputs):
    """network(*inputs) in parts of 500 rows and in eval mode, with the batch statistics of training."""
    training = network.training
    network.eval()
    output = torch.cat([network(*part) for part in zip(*(rows.split(500) for rows in inputs))])
    network.train(training)
    return output


def interpolate(z_from, z_to):
    """Walk from each z_from to its z_to, both (N, D), in steps of 0.2; the points are (6 N, D)."""
    steps = [torch.lerp(z_from, z_to, t) for t in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return torch.stack(steps, 1).flatten(0, 1)


def traverse(z, codes):
    """Move z (D,) from -3 to 3 in one dimension at a time: the ten in which the codes (N, D) vary most."""
    dims = codes.var(0, correction=0).topk(min(10, len(z))).indices
    z = z.repeat(len(dims), 10, 1)  # (dims, 10, D)
    z[torch.arange(len(dims)), :, dims] = torch.linspace(-3, 3, 10, device=z.device)
    return z.flatten(0, 1)


# ----- Score -----------------------------------------------------------------------------------
def load_classifier(args, data):
    """Train a small convolutional classifier on `data`, each time in the same way (MNIST: 99.3% right)."""
    if len(data.classes) < 2 or len(data.x_test) < 100:
        fail("--score needs at least two classes and 100 test images")
    print("Training the classifier that scores samples")
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
        for x, labels in data.batches(batch_size, args.translate):  # shifted like the test set
            opt.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            opt.step()
            schedule.step()
    return network.eval()


def score(classifier, data, x, labels=None, binarize=False):
    """Measure samples x (N, C, H, W) in [0, 1] in the classifier's features (N, 64). The dict returned has fd
    (Heusel et al. 2017); classes: how many have at least a tenth of an equal share; class_kl: KL(classes of x
    || those of test images), in nats; precision: the share of samples near a test image; recall: the share of
    test images near a sample; label_accuracy: the share of samples that show the class in `labels` (N,)."""
    features = classifier[:-1].eval()
    real = torch.cat([predict(features, batch) for batch, _ in data.test_batches(binarize)])
    fake = predict(features, x)
    predicted = predict(classifier[-1], fake).argmax(1)
    p, q = (y.bincount(minlength=len(data.classes)) / len(y) for y in (predicted, data.y_test))
    kl = torch.special.xlogy(p, p / q.clamp(min=1e-6)).sum().item()
    scores = {"fd": fd(fake, real), "classes": (p >= 0.1 / len(p)).sum().item(), "class_kl": kl}
    scores |= {"precision": covered(fake, real), "recall": covered(real, fake)}
    if labels is not None:
        scores["label_accuracy"] = (predicted == labels).float().mean().item()
    return scores


def fd(f, g):
    """Frechet distance |m_f - m_g|^2 + tr(C_f + C_g - 2 (C_f C_g)^(1/2)) of f (N, D) and g (M, D)."""
    f, g = f.cpu().double(), g.cpu().double()
    c_f, c_g = f.T.cov(), g.T.cov()
    cross = torch.linalg.eigvals(c_f @ c_g).real.clamp(min=0).sqrt().sum()
    return ((f.mean(0) - g.mean(0)).square().sum() + c_f.trace() + c_g.trace() - 2 * cross).item()


def covered(points, centres, k=3):
    """Share of points (N, D) as near a centre (M, D) as its k-th neighbour: Kynkaanniemi et al. 2019."""
    radii = torch.cdist(centres, centres).topk(k + 1, largest=False).values[:, k]  # the nearest is itself
    return (torch.cdist(points, centres) <= radii).any(1).float().mean().item()


# ----- Files -----------------------------------------------------------------------------------
class Log:
    """Writes NAME.csv and the lines on the screen. A row averages the losses since the previous row."""

    def __init__(self, args, data, networks):
        self.args, self.networks, self.steps_per_epoch = args, networks, len(data.x_train) // args.batch_size
        self.rows, self.samples, self.seconds = [], {}, 0.0
        self.losses, self.columns = {}, []  # losses since the last row; columns of the file
        self.terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()  # stdout may be None
        if args.generate is None:
            images = f"{len(data.x_train)} + {len(data.x_test)} images of {' x '.join(map(str, data.shape))}"
            print(f"{args.name}.py on {args.device}: {args.data}, {images} in {len(data.classes)} classes")
            print(f"  to {args.out}: " + ", ".join(f"{name} {x}" for name, x in run_flags(args).items()))
            self.file = open(args.out / f"{args.name}.csv", "a", 1, newline="")  # 1: flush each line

    def state_dict(self):
        return {"rows": self.rows, "samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state):
        vars(self).update(state)

    def start_epoch(self, epoch):
        self.epoch, self.start = epoch, time.monotonic() - self.seconds

    def add(self, step, losses):
        """Take the losses of step `step`, from 1 on, as a dict of detached scalars; some steps end a row."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        last = step % self.steps_per_epoch == 0  # of the epoch; end_epoch() writes its row
        if step % self.args.log_every and not last:
            return
        means = torch.stack([torch.stack(values).mean() for values in self.losses.values()]).tolist()
        means, self.losses = dict(zip(self.losses, means)), {}
        check_finite(step, means | (self.networks.state_dict() if last else {}))  # the weights to be saved
        self.seconds = time.monotonic() - self.start
        row = {"epoch": self.epoch, "step": step, "seconds": round(self.seconds, 2), **means}
        self.rows.append({name: round(value, 6) for name, value in row.items()})
        if not last:
            self.write_row(end="")

    def end_epoch(self, scores):
        """Complete the epoch's last row with a dict of test losses and scores, and write it."""
        check_finite(self.rows[-1]["step"], scores)
        self.rows[-1] |= {name: round(value, 6) for name, value in scores.items()}
        self.write_row()

    def write_row(self, end="\n"):
        """Write the last row to the CSV, or all rows if it has a new column, and show it on the screen."""
        rows = self.rows[-1:]
        if not rows[0].keys() <= set(self.columns):
            rows, self.columns = self.rows, list(dict.fromkeys(name for row in self.rows for name in row))
            self.file.truncate(0)
            csv.writer(self.file, lineterminator="\n").writerow(self.columns)
        csv.DictWriter(self.file, self.columns, lineterminator="\n").writerows(rows)
        (_, epoch), (_, step), _, *means = rows[-1].items()
        steps = self.args.epochs * self.steps_per_epoch
        left = self.seconds * (steps / step - 1)
        line = f"epoch {epoch}/{self.args.epochs}  step {step}/{steps}  "
        line += "%d:%02d, %d:%02d left" % (*divmod(self.seconds, 60), *divmod(left, 60))
        line += "".join(f"  {name} {mean:.5g}" for name, mean in means)
        if self.terminal:
            line = "\r\033[K" + (line if end else line[: shutil.get_terminal_size().columns - 1])
        if self.terminal or end:
            print(line, end=end, flush=True)

    def progress(self, x):
        """Keep ten samples of this epoch from x (N, C, H, W); return those of at most a hundred epochs."""
        every = math.ceil(self.args.epochs / 100)
        self.samples = {epoch: rows for epoch, rows in self.samples.items() if epoch % every == 0}
        self.samples[self.epoch] = (x[:10].cpu() * 255).round().to(torch.uint8)
        return torch.cat(list(self.samples.values())) / 255


def check_finite(step, values):
    """End the run with status 1 if one of `values`, a dict of numbers or tensors, is not finite."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            fail(f"{name} is not finite at step {step}: try a smaller --lr", status=1)


def save_grid(args, what, images, columns=8):
    """Write NAME_what.png: images (N, C, H, W) in [0, 1], row by row."""
    save_image(images, args.out / f"{args.name}_{what}.png", nrow=columns)


def save_images(args, images, folders=None):
    """Write samples (N, C, H, W) to NAME_generated/000000.png, ...; `folders` may name sub-folders."""
    folder = args.out / f"{args.name}_generated"
    if len(images):  # --generate 0 only loads
        for old in folder.rglob("*.png"):
            old.unlink()
    for i, x in enumerate((images.cpu() * 255 + 0.5).to(torch.uint8)):
        path = folder / (folders[i].replace("/", "-") if folders else "") / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(x).save(path)


def run_flags(args):
    """The flags that decide what a run computes, without those that say where it runs and writes."""
    others = ("name", "device", "data_dir", "out", "resume", "generate", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in others}


def save_checkpoint(args, data, parts, epoch):
    """Write NAME.pt: the state after `epoch` of `parts`, a dict of everything that has a state_dict()."""
    about = {"shape": data.shape, "classes": data.classes, "images": len(data.x_train)}
    checkpoint = {"script": args.name, "flags": run_flags(args), "data": about, "epoch": epoch}
    checkpoint["parts"] = {name: part.state_dict() for name, part in parts.items()}
    path = args.out / f"{args.name}.pt"
    torch.save(checkpoint, f"{path}.tmp")  # a run killed here leaves the old file whole
    Path(f"{path}.tmp").replace(path)


def read_checkpoint(out, name):
    """Load the checkpoint NAME.pt from the folder `out` to the CPU; fail if NAME.py did not write one."""
    path = out / f"{name}.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == name:
            return checkpoint
        error = f"it is of {checkpoint['script']}.py"
    except Exception as problem:  # no such file, or it is damaged
        error = str(problem).split(". ")[0]
    fail(f"no checkpoint of {name}.py at {path} ({error}); train first, or set --out")


def load_checkpoint(args, data, parts):
    """With --resume or --generate, restore `parts` from the checkpoint; return how many epochs are done."""
    if not args.resume and args.generate is None:
        return 0
    checkpoint = read_checkpoint(args.out, args.name)
    saved, done = checkpoint["data"], checkpoint["epoch"]
    if (saved["shape"], saved["classes"]) != (data.shape, data.classes):
        fail(f"the checkpoint has other classes than --data, or another shape: {saved['shape']}")
    try:
        for name, part in parts.items():
            state = checkpoint["parts"][name]
            if not isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(state)
            elif args.opt == checkpoint["flags"]["opt"]:  # only moments, as --lr may have changed
                part.load_state_dict(state | {"param_groups": part.state_dict()["param_groups"]})
                for weight, moments in part.state.items():  # in the memory format of the weight
                    moments |= {k: torch.empty_like(weight).copy_(v) for k, v in moments.items() if v.dim()}
    except (KeyError, RuntimeError):
        fail("the checkpoint has other networks; leave out flags like --width")
    if args.resume:
        print(f"{done} of {args.epochs} epochs done, with {saved['images']} images; now {len(data.x_train)}")
    return done


# ----- Flags -----------------------------------------------------------------------------------
def fail(message, status=2):
    """End the program with one line on stderr; exit status 2 says that the mistake is in the input."""
    print("error:", " ".join(str(message).split())[:600], file=sys.stderr, flush=True)
    raise SystemExit(status)


def within(low, high=math.inf, kind=float):
    """An argparse type: numbers of this kind in [low, high)."""
    def number(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return value
    return number


positive_int, positive_float = within(1, kind=int), within(1e-12)
nonnegative_float, share = within(0), within(0, 1)


def shared_flags(file, doc, *, batch_size, lr, latent_dim):
    """A parser with the flags of all scripts; `file` and `doc` are the caller's `__file__` and `__doc__`."""
    if hasattr(sys.stdout, "reconfigure"):  # escape what it cannot encode; flush lines
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    script, none = Path(file).resolve(), argparse.SUPPRESS
    parser = argparse.ArgumentParser(script.name, "%(prog)s [flags] (--help lists them)", doc.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(name=script.stem, image_size=None, generate=None)  # no "None" in --help
    add = parser.add_argument
    add("--epochs", type=positive_int, default=10, help="passes over the training set")
    add("--batch-size", type=within(2, kind=int), default=batch_size, help="images per step")
    add("--opt", choices=["adam", "rmsprop", "sgd"], default="adam", help="optimiser")
    add("--lr", type=positive_float, default=lr, help="learning rate")
    add("--latent-dim", type=positive_int, default=latent_dim, help="size of z")
    add("--width", type=positive_int, default=16, help="channels of the first convolution")
    add("--seed", type=within(0, 2**32, int), default=0, help="seed of weights, noise and order")
    add("--device", default="auto", help="cpu, cuda, mps, ...; auto: a GPU if there is one")
    add("--data", default="auto", help=f"{', '.join(TORCHVISION)}, synthetic or a FOLDER of pictures; "
        "auto: mnist or, if it cannot be downloaded, synthetic")
    add("--data-dir", type=Path, default=script.parent / "data", help="where data sets are kept")
    add("--image-size", type=within(8, kind=int), default=none, help="side in pixels (default: up to 64)")
    add("--translate", type=share, default=0.0, help="shift images by up to this fraction of a side")
    add("--out", type=Path, default=script.parent, help="where files go; --dry-run adds dry-run/")
    add("--log-every", type=positive_int, default=100, help="steps per row of the CSV")
    add("--score", action="store_true", help="after each epoch, score 10,000 samples (see README.md)")
    add("--dry-run", action="store_true", help="two steps on a few images, then all the files")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on from the checkpoint, with its flags")
    add("--generate", type=within(0, kind=int), metavar="N", default=none, help="only write N samples")
    return parser


def parse(parser, argv=None):
    """Parse and check `argv`, or else the command line. The flags of a loaded checkpoint become defaults."""
    args = parser.parse_args(argv)
    out = args.out.expanduser() / ("dry-run" if args.dry_run else "")
    if args.resume or args.generate is not None:
        parser.set_defaults(**read_checkpoint(out, args.name)["flags"])
        args = parser.parse_args(argv)
    args.out, args.data_dir = out, args.data_dir.expanduser()
    args.epochs = 1 if args.dry_run else args.epochs
    if args.image_size and args.image_size % 4:
        parser.error("--image-size must be a multiple of 4")
    named = args.data.lower() in ("auto", "synthetic", *TORCHVISION)
    if not named and out.resolve().is_relative_to(Path(args.data).expanduser().resolve()):
        parser.error(f"--out {out} lies in --data: a run would read its own pictures; try --out ../run")
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
        if args.generate != 0:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()  # can it be written to?
    except Exception as error:
        parser.error(f"cannot use --device {args.device} or --out {out}: {str(error).splitlines()[0]}")
    return args

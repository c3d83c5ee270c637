# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""DCGAN: a deep convolutional generative adversarial network.

Radford, Metz, Chintala: Unsupervised representation learning with deep convolutional generative
adversarial networks, 2016, arXiv 1511.06434.

The objective of gan.py on networks that are convolutional throughout, with batch norm in both. Averaged
over the batch:

    loss_d = -log D(x) - log(1 - D(x_fake))
    loss_g = -log D(x_fake)

    discriminator  minimises  loss_d
    generator      minimises  loss_g

Differences from the paper:
- at 28 x 28 three layers each way and 32 to 128 channels (the paper: 64 x 64 with four layers and 128 to
  1024); the generator ends in a sigmoid and the discriminator centres its input (tanh);
- batches of 32 (128), Adam at 1e-3 for the generator and 3e-4 for the discriminator (2e-4 for both):
  in so short a run both must learn faster, and the discriminator must not run ahead;
- the generator learns from the images that the discriminator has just seen (the paper: from new noise);
- noise from N(0, I) in 10 dimensions, enough for digits but few for colour pictures (uniform noise in
  100); batch norm's weights start from N(1, 0.02^2), as in the authors' code;
- the pictures come from an exponential moving average of the generator's weights (--ema).

    python dcgan.py --epochs 1
    python dcgan.py --data cifar10 --latent-dim 100 --epochs 25

Files: dcgan.csv, dcgan_samples.png, dcgan_progress.png, dcgan_interpolation.png, dcgan.pt. Columns of
the CSV, as means over the rows' intervals: epoch, step, seconds (of training), loss_d (2 log 2 = 1.39 at
chance), loss_g (log 2 = 0.69 at chance), d_real = D(x), d_fake = D(x_fake).
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    Run, average, interpolate, load_data, make_optimizer, number, parse, predict, shared_flags,
    update_average,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=32, opt="adam", lr=1e-3, latent_dim=10, width=32,
        lr_schedule="constant",
    )  # fmt: skip
    add = parser.add_argument
    add("--lr-d", type=number(float, 1e-9), default=0.3, metavar="FACTOR",
        help="the discriminator's learning rate, as a factor of --lr")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), default=0.999,
        help="decay of the averaged weights that draw the pictures; 0: no averaging")  # fmt: skip
    return parse(parser)


def halvings(size):
    """The sides of the feature maps, halved until one is at most 4: 28 -> [28, 14, 7, 3]."""
    sides = [size]
    while sides[-1] > 4:
        sides.append(sides[-1] // 2)
    return sides


class Generator(nn.Sequential):
    """(B, latent_dim) -> logits (B, C, H, W): transposed convolutions alone."""

    def __init__(self, shape, width, latent_dim):
        *sides, first = halvings(shape[1])
        channels = [shape[0], *(width * 2**i for i in range(len(sides)))]  # from the image inwards
        layers = [
            nn.Unflatten(1, (latent_dim, 1, 1)),
            nn.ConvTranspose2d(latent_dim, channels[-1], first),
        ]
        for i, side in reversed(list(enumerate(sides))):
            layers += [nn.BatchNorm2d(channels[i + 1]), nn.ReLU(inplace=True)]
            up = {"kernel_size": 4, "stride": 2, "padding": 1, "output_padding": side % 2}
            layers += [nn.ConvTranspose2d(channels[i + 1], channels[i], **up)]
        super().__init__(*layers)


class Discriminator(nn.Sequential):
    """(B, C, H, W) in [0, 1] -> logits (B,): strided convolutions alone."""

    def __init__(self, shape, width):
        *sides, last = halvings(shape[1])
        channels = [shape[0], *(width * 2**i for i in range(len(sides)))]
        layers = []
        for i in range(len(sides)):
            layers += [nn.Conv2d(channels[i], channels[i + 1], 4, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(channels[i + 1])] if i else []
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, last), nn.Flatten(0))

    def forward(self, x):
        return super().forward(2 * x - 1)


def initialize(network):
    """Weights from N(0, 0.02^2), those of batch norm from N(1, 0.02^2)."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.02)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, 1, 0.02)
    return network


def discriminator_loss(d_real, d_fake):
    """-log D(x) - log(1 - D(x_fake)) from logits (B,), averaged."""
    return (F.softplus(-d_real) + F.softplus(d_fake)).mean()


def generator_loss(d_fake):
    """-log D(x_fake) from logits (B,), averaged."""
    return F.softplus(-d_fake).mean()


def train_step(x, args, generator, discriminator, opt_g, opt_d):
    """One update of each network on x (B, C, H, W); returns detached scalars for the CSV."""
    # (1) Discriminator: maximise log D(x) + log(1 - D(x_fake)). Real and generated images stay apart:
    # batch norm would mix their statistics
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z).sigmoid()
    d_real, d_fake = discriminator(x), discriminator(x_fake.detach())
    loss_d = discriminator_loss(d_real, d_fake)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()

    # (2) Generator: maximise log D(x_fake)
    loss_g = generator_loss(discriminator(x_fake))
    opt_g.zero_grad()
    loss_g.backward(inputs=list(generator.parameters()))
    opt_g.step()

    losses = {
        "loss_d": loss_d, "loss_g": loss_g, "d_real": d_real.sigmoid().mean(),
        "d_fake": d_fake.sigmoid().mean(),
    }  # fmt: skip
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).sigmoid()


def main(args):
    data = load_data(args)
    generator = initialize(Generator(data.shape, args.width, args.latent_dim))
    discriminator = initialize(Discriminator(data.shape, args.width))
    generator, discriminator = generator.to(args.device), discriminator.to(args.device)
    generator_ema = average(generator)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.5, 0.999))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.5, 0.999))
    networks = {"generator": generator, "discriminator": discriminator, "generator_ema": generator_ema}
    run = Run(args, data, networks, {"generator": opt_g, "discriminator": opt_d})

    def draw(n):
        return sample(generator_ema, torch.randn(n, args.latent_dim, device=args.device)), None

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)

    for epoch in run.epochs():
        for x, _ in data.batches(args.batch_size, args.translate):
            losses = train_step(x, args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, run.step)
            run.log(losses)
        x_fake = sample(generator_ema, z_fixed)
        run.save_grid("samples", x_fake)
        z_path = interpolate(z_fixed[:16], z_fixed.roll(-1, 0)[:16])
        run.save_grid("interpolation", sample(generator_ema, z_path), 6)
        run.end_epoch(x_fake, draw)


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""CGAN: a conditional generative adversarial network.

Mirza, Osindero: Conditional generative adversarial nets, 2014, arXiv 1411.1784.

The GAN of gan.py whose two networks are told the label y, as a one-hot vector: the generator beside the
noise, x_fake = generator(z, y), the discriminator beside the image. Averaged over the batch:

    loss_d = -log D(x, y) - log(1 - D(x_fake, y))
    loss_g = -log D(x_fake, y)

    discriminator  minimises  loss_d
    generator      minimises  loss_g

Differences from the paper:
- the networks, the initialisation, the optimiser and the batches of gan.py, with --arch mlp one learning
  rate for both networks (the paper: maxout layers with dropout, momentum, batches of 100), noise from
  N(0, I) in 100 dimensions with both archs (uniform noise);
- the generator maximises log D (the paper's game is minimax);
- the label joins the first layer alone (the paper: noise and label, image and label each have a hidden
  layer of their own). In the generator it extends z. In the discriminator it is one more channel per
  class of the image (--arch conv, a conditional DCGAN) or one more pixel per class (--arch mlp), the 1
  scaled to about the norm of an image: without that it goes unheard for many epochs. The channels hold 0
  and 1: with -1 and 1 they outweigh the image, and the discriminator falls to chance in two epochs;
- the generator learns from the images that the discriminator has just seen (the paper: from new noise);
- the pictures come from an exponential moving average of the generator's weights (--ema).

    python cgan.py --epochs 1
    python cgan.py --arch conv

Files: cgan.csv, cgan_samples.png (a row per class, the same z down a column), cgan_progress.png,
cgan_interpolation.png, cgan.pt. Columns of the CSV, as means over the rows' intervals: epoch, step,
seconds (of training), loss_d (2 log 2 = 1.39 at chance), loss_g (log 2 = 0.69 at chance),
d_real = D(x, y), d_fake = D(x_fake, y).
"""

import torch
import torch.nn.functional as F

from common import (
    Conditional, Run, average, conv_decoder, conv_discriminator, load_data, make_optimizer, mlp_decoder,
    mlp_discriminator, number, one_hot, parse, predict, shared_flags, update_average, walks,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=16, opt="adam", lr=1e-3, latent_dim=100, width=16,
        lr_schedule="constant",
    )  # fmt: skip
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv brings --lr 2e-3 --lr-d 0.15")  # fmt: skip
    add("--hidden", type=number(int, 1), nargs="+", default=[256, 512, 1024],
        help="hidden layers of the mlp generator; the discriminator's are these reversed")  # fmt: skip
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="in the mlp discriminator")
    add("--lr-d", type=number(float, 1e-9), default=1.0, metavar="FACTOR",
        help="the discriminator's learning rate, as a factor of --lr")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), default=0.999,
        help="decay of the averaged weights that draw the pictures; 0: no averaging")  # fmt: skip
    return parse(parser, arch={"conv": {"lr": 2e-3, "lr_d": 0.15}})


def discriminator_loss(d_real, d_fake):
    """-log D(x, y) - log(1 - D(x_fake, y)) from logits (B,), averaged."""
    return (F.softplus(-d_real) + F.softplus(d_fake)).mean()


def generator_loss(d_fake):
    """-log D(x_fake, y) from logits (B,), averaged."""
    return F.softplus(-d_fake).mean()


def train_step(x, y, args, generator, discriminator, opt_g, opt_d):
    """One update of each network on x (B, C, H, W) and y (B, n_classes); returns detached scalars."""
    # (1) Discriminator: maximise log D(x, y) + log(1 - D(x_fake, y))
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z, y).sigmoid()
    d_real, d_fake = discriminator(torch.cat([x, x_fake.detach()]), torch.cat([y, y])).chunk(2)
    loss_d = discriminator_loss(d_real, d_fake)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()

    # (2) Generator: maximise log D(x_fake, y)
    loss_g = generator_loss(discriminator(x_fake, y))
    opt_g.zero_grad()
    loss_g.backward(inputs=list(generator.parameters()))
    opt_g.step()

    losses = {
        "loss_d": loss_d, "loss_g": loss_g, "d_real": d_real.sigmoid().mean(),
        "d_fake": d_fake.sigmoid().mean(),
    }  # fmt: skip
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z, y):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(generator, z, y).sigmoid()


def main(args):
    data = load_data(args)
    n_classes, (channels, height, width) = len(data.classes), data.shape
    if args.arch == "mlp":
        generator = mlp_decoder(data.shape, args.hidden, args.latent_dim + n_classes)
        shape_d = (channels * height * width + n_classes,)
        discriminator = mlp_discriminator(shape_d, args.hidden[::-1], args.dropout)
    else:
        generator = conv_decoder(data.shape, args.width, args.latent_dim + n_classes)
        shape_d = (channels + n_classes, height, width)
        discriminator = conv_discriminator(shape_d, args.width, hidden=4 * args.width)
    generator, discriminator = Conditional(generator), Conditional(discriminator, args.arch == "mlp")
    generator, discriminator = generator.to(args.device), discriminator.to(args.device)
    generator_ema = average(generator)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.5, 0.999))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.5, 0.999))
    networks = {"generator": generator, "discriminator": discriminator, "generator_ema": generator_ema}
    run = Run(args, data, networks, {"generator": opt_g, "discriminator": opt_d})

    def draw(n):
        labels = torch.randint(n_classes, (n,), device=args.device)
        z = torch.randn(n, args.latent_dim, device=args.device)
        return sample(generator_ema, z, one_hot(labels, n_classes)), labels

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(10, args.latent_dim).to(args.device)
    y_every = torch.eye(n_classes, device=args.device)

    for epoch in run.epochs():
        for x, labels in data.batches(args.batch_size, args.translate):
            y = one_hot(labels, n_classes)
            losses = train_step(x, y, args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, run.step)
            run.log(losses)
        x_fake = sample(generator_ema, z_fixed.repeat(n_classes, 1), y_every.repeat_interleave(10, 0))
        run.save_grid("samples", x_fake, 10)  # a row per class, the same z down a column
        run.save_grid("interpolation", sample(generator_ema, *walks(z_fixed, y_every)), 6)
        run.end_epoch(x_fake[:100:11], draw)


if __name__ == "__main__":
    main(parse_args())

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

Differences from the paper, beside what common.py says:
- --arch mlp: the layers of gan.py (the paper: maxout units), a discriminator that learns more slowly than
  the generator (--lr-d);
- --arch conv: the layers of dcgan.py, a conditional DCGAN, but with He's initialisation and images in [0, 1];
- the label joins the first layers alone (the paper: noise, image and label each have a hidden layer of their
  own): as more numbers of z; beside an image as one more channel of 0 or 1 per class or, for --arch mlp, one
  more pixel per class, scaled to about the norm of a digit to be heard;
- dropout in the mlp discriminator alone (0.5 in both networks), batches of 64 (100), noise from N(0, I)
  (uniform noise).

    python cgan.py --epochs 1
    python cgan.py --arch conv

Files: cgan.csv, cgan.pt, cgan_*.png: samples (a row per class, the same z down a column), progress,
interpolation (eight walks from z to z, eight from label to label). Columns of cgan.csv beside epoch, step,
seconds of training, as means since the row before:

    loss_d     2 log 2 = 1.39 at chance
    d_real     D(x, y)
    d_fake     D(x_fake, y)
    loss_g     log 2 = 0.69 at chance
    fd ...     after each epoch, with --score: see README.md
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    load_data,
    Conditional, conv_decoder, conv_discriminator, he, mlp,
    interpolate, make_optimizer, predict, to_device, update_average,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    parse, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=64, lr=4e-3, latent_dim=100)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp", help="kind of networks")
    add("--hidden", type=int, nargs="+", default=[128, 256, 512], help="mlp layers of G; D's are reversed")
    add("--dropout", type=float, default=0.2, help="in the mlp discriminator")
    add("--lr-d", type=float, default=0.3, help="the discriminator's learning rate, as a factor of --lr")
    add("--ema", type=float, default=0.9995, help="decay of the averaged weights; 0: no averaging")
    return parse(parser, argv, {"--arch conv": "--batch-size 32 --lr 1.4e-3 --lr-d 1"})


def train_step(x, y, args, generator, discriminator, opt_g, opt_d):
    """An update of both networks on x (B, C, H, W) and y (B, n_classes); returns detached scalars."""
    # (1) Discriminator: maximise log D of real images + log(1 - D) of generated ones
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z, y).sigmoid()
    d_real, d_fake = discriminator(x, y), discriminator(x_fake.detach(), y)
    loss_d = (F.softplus(-d_real) + F.softplus(d_fake)).mean()  # -log sigmoid(d) = softplus(-d)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    losses = {"loss_d": loss_d, "d_real": d_real.sigmoid().mean(), "d_fake": d_fake.sigmoid().mean()}

    # (2) Generator: maximise log D of generated images
    loss_g = F.softplus(-discriminator(x_fake, y)).mean()
    opt_g.zero_grad()
    loss_g.backward(inputs=list(generator.parameters()))  # the gradients of this network alone
    opt_g.step()
    losses["loss_g"] = loss_g
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z, y):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(generator, z, y).sigmoid()


def main(args):
    data = load_data(args, conditional=True)
    c, h, w = data.shape
    n_classes = len(data.classes)
    torch.manual_seed(args.seed)
    if args.arch == "mlp":
        generator = mlp([args.latent_dim + n_classes, *args.hidden, c * h * w], norm=True)
        generator = nn.Sequential(generator, nn.Unflatten(1, data.shape))
        sizes = [c * h * w + n_classes, *reversed(args.hidden), 1]
        discriminator = mlp(sizes, leak=0.2, dropout=args.dropout)
        discriminator = he(nn.Sequential(discriminator, nn.Flatten(0)))
    else:
        generator = conv_decoder(data.shape, args.width, args.latent_dim + n_classes)
        discriminator = conv_discriminator((c + n_classes, h, w), args.width, norm=True)
    generator, discriminator = Conditional(generator), Conditional(discriminator, args.arch == "mlp")
    generator_ema = copy.deepcopy(generator)
    networks = nn.ModuleDict({
        "generator": generator, "discriminator": discriminator, "generator_ema": generator_ema,
    })
    to_device(networks, args.device)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.0, 0.99))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.0, 0.99))
    z_fixed = torch.randn(10, args.latent_dim).repeat(n_classes, 1).to(args.device)
    one_hot = torch.eye(n_classes, device=args.device)
    y_fixed = one_hot.repeat_interleave(10, 0)
    log = Log(args, data, networks)
    parts = {**networks, "opt_g": opt_g, "opt_d": opt_d, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        labels = torch.arange(args.generate, device=args.device) % n_classes
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(generator_ema, z, one_hot[labels]), [data.classes[y] for y in labels])
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # a resumed run draws what this one would
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            losses = train_step(x, one_hot[labels], args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, log.step)
            log.add(losses)
        samples = sample(generator_ema, z_fixed, y_fixed)
        save_grid(args, "samples", samples, 10)  # a row per class, the same z down a column
        save_grid(args, "progress", log.progress(samples[::11]), min(10, n_classes))  # its diagonal
        z, y = z_fixed[:9], one_hot.repeat(9, 1)[:9]  # eight walks from z to z, eight from label to label
        z_walk = interpolate(torch.cat([z[:8], z[:8]]), torch.cat([z[1:], z[:8]]))
        y_walk = interpolate(torch.cat([y[:8], y[:8]]), torch.cat([y[:8], y[1:]]))
        save_grid(args, "interpolation", sample(generator_ema, z_walk, y_walk), 6)
        scores = {}
        if args.score:
            labels = torch.arange(10_000, device=args.device) % n_classes
            z = torch.randn(10_000, args.latent_dim, device=args.device)
            scores = score(classifier, data, sample(generator_ema, z, one_hot[labels]), labels)
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks.eval()


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""CGAN: a conditional generative adversarial network.

Mirza, Osindero: Conditional generative adversarial nets, 2014, arXiv 1411.1784.

This is the GAN of gan.py, but both networks also get the label y as a one-hot vector. The generator gets z
and y, x_fake = generator(z, y); the discriminator gets x and y. The losses are averaged over the batch:

    loss_d = -log D(x, y) - log(1 - D(x_fake, y))
    loss_g = -log D(x_fake, y)

    discriminator  minimises  loss_d
    generator      minimises  loss_g

    Differences        here                                     in the paper
      generator        layers of 128, 256, 512; batch norm      200 (z), 1000 (y), then 1200; no batch norm
      discriminator    layers of 512, 256, 128; leaky ReLU      240 (x), 50 (y), then 240; maxout units
      label            joined to z as numbers; to x as channels has a first layer of its own
                       (conv) or as pixels with a digit's norm
      dropout          0.2 after the discriminator's layers     0.5 in both networks
      first weights    discriminator: He's; generator: torch's  not given
      noise            normal                                   uniform
      optimiser        Adam with betas of 0 and 0.99            SGD with momentum
      learning rates   4e-3, the discriminator's 1.2e-3         0.1 for both, decaying
      batches          of 64 images                             of 100
      loss_g           -log D                                   log(1 - D)
      generated batch  the same for both networks               a new one for the generator
      samples          from averaged weights; decay at step t:  from the last weights
                       min(--ema, (1 + t) / (10 + t))
      --arch conv      the layers of dcgan.py: a conditional    fully connected networks
                       DCGAN, but with images in [0, 1]

    python cgan.py --epochs 1
    python cgan.py --arch conv

A run writes cgan.csv, cgan.pt and cgan_*.png: samples (a row per class, the same z down a column), progress
and interpolation (eight rows from z to z, eight from label to label). The CSV's columns are epoch, step,
seconds (of training) and these means since the previous row:

    loss_d     2 log 2 = 1.39 at chance, when D is 1/2
    d_real     D(x, y)
    d_fake     D(x_fake, y)
    loss_g     log 2 = 0.69 at chance
    fd, ...    scores after each epoch, only with --score: see README.md
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
    parse, positive_float, positive_int, share, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=64, lr=4e-3, latent_dim=100)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv changes the defaults to --batch-size 32 --lr 1.4e-3 --lr-d 1")
    add("--hidden", type=positive_int, nargs="+", default=[128, 256, 512],
        help="mlp: sizes of the generator's hidden layers; reversed in the discriminator")
    add("--dropout", type=share, default=0.2, help="mlp: dropout in the discriminator")
    add("--lr-d", type=positive_float, default=0.3, help="the discriminator's learning rate is LR_D * LR")
    add("--ema", type=share, default=0.9995, help="decay of the weights averaged over training; 0: off")
    if parser.parse_known_args(argv)[0].arch == "conv":
        parser.set_defaults(batch_size=32, lr=1.4e-3, lr_d=1.0)
    return parse(parser, argv)


def make_networks(args, shape, n_classes):
    """Generator: z (B, latent_dim), y (B, n_classes) -> logits (B, C, H, W); discriminator: x (B, C, H, W),
    y (B, n_classes) -> logits (B,)."""
    c, h, w = shape
    if args.arch == "mlp":
        generator = mlp([args.latent_dim + n_classes, *args.hidden, c * h * w], norm=True)
        generator = nn.Sequential(generator, nn.Unflatten(1, shape))
        sizes = [c * h * w + n_classes, *reversed(args.hidden), 1]
        discriminator = mlp(sizes, leak=0.2, dropout=args.dropout)
        discriminator = he(nn.Sequential(discriminator, nn.Flatten(0)))
    else:
        generator = conv_decoder(shape, args.width, args.latent_dim + n_classes)
        discriminator = conv_discriminator((c + n_classes, h, w), args.width, norm=True)
    return Conditional(generator), Conditional(discriminator, flat=args.arch == "mlp")


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
    loss_g.backward()  # this also gives the other network gradients; its next update clears them
    opt_g.step()
    losses["loss_g"] = loss_g
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z, y):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(generator, z, y).sigmoid()


def main(args):
    data = load_data(args, conditional=True)
    n_classes = len(data.classes)
    torch.manual_seed(args.seed)
    generator, discriminator = make_networks(args, data.shape, n_classes)
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
        folders = [data.classes[label] for label in labels]
        save_images(args, sample(generator_ema, z, one_hot[labels]), folders)
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    step = done * (len(data.x_train) // args.batch_size)
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # so that a resumed run draws the same
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            losses = train_step(x, one_hot[labels], args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, step)
            step += 1
            log.add(step, losses)
        samples = sample(generator_ema, z_fixed, y_fixed)
        # Samples: a row per class. Progress gets sample i of row i, so one sample of each class
        save_grid(args, "samples", samples, 10)
        save_grid(args, "progress", log.progress(samples[::11]), min(10, n_classes))
        z, y = z_fixed[:9], one_hot[torch.arange(9) % n_classes]
        # Eight walks from z to z with the label fixed, then eight from label to label with z fixed
        z_walk = torch.cat([interpolate(z[:8], z[1:]), z[:8].repeat_interleave(6, 0)])
        y_walk = torch.cat([y[:8].repeat_interleave(6, 0), interpolate(y[:8], y[1:])])
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

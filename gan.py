# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""GAN: a generative adversarial network.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio: Generative adversarial
networks, 2014, arXiv 1406.2661.

A generator turns noise z ~ N(0, I) into an image x_fake = generator(z); a discriminator gives the
probability D that an image is a real one. Averaged over the batch:

    loss_d = -log D(x) - log(1 - D(x_fake))
    loss_g = -log D(x_fake)            (--loss nonsaturating)
    loss_g = log(1 - D(x_fake))        (--loss minimax: little gradient while the discriminator wins)

    discriminator  minimises  loss_d, with every batch
    generator      minimises  loss_g, with every --d-steps-th batch

Differences from the paper, beside what common.py says:
- --arch mlp: the layers of widespread re-implementations, with batch norm in the generator and leaky ReLU in
  the discriminator (the paper: maxout units); --arch conv: the networks of vaegan.py;
- a discriminator that learns more slowly than the generator (--lr-d), batches of 64 (100);
- noise from N(0, I) (uniform noise).

    python gan.py --epochs 1
    python gan.py --arch conv

Files: gan.csv, gan.pt, gan_*.png: samples, progress, interpolation. Columns of gan.csv beside epoch, step,
seconds of training, as means since the row before:

    loss_d     2 log 2 = 1.39 at chance
    d_real     D(x)
    d_fake     D(x_fake)
    loss_g     log 2 = 0.69 at chance, -0.69 with --loss minimax
    fd ...     after each epoch, with --score: see README.md
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    load_data,
    conv_decoder, conv_discriminator, he, mlp,
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
    add("--loss", choices=["nonsaturating", "minimax"], default="nonsaturating", help="the generator's loss")
    add("--d-steps", type=int, default=1, help="discriminator steps per generator step")
    add("--lr-d", type=float, default=0.3, help="the discriminator's learning rate, as a factor of --lr")
    add("--ema", type=float, default=0.9995, help="decay of the averaged weights; 0: no averaging")
    return parse(parser, argv, {"--arch conv": "--batch-size 32 --lr-d 0.15 --latent-dim 8"})


def train_step(x, generator_too, args, generator, discriminator, opt_g, opt_d):
    """An update of both networks, or of the discriminator alone, on x (B, C, H, W); detached scalars."""
    # (1) Discriminator: maximise log D of real images + log(1 - D) of generated ones
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z).sigmoid()
    d_real, d_fake = discriminator(x), discriminator(x_fake.detach())
    loss_d = (F.softplus(-d_real) + F.softplus(d_fake)).mean()  # -log sigmoid(d) = softplus(-d)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    losses = {"loss_d": loss_d, "d_real": d_real.sigmoid().mean(), "d_fake": d_fake.sigmoid().mean()}

    # (2) Generator: maximise log D of generated images
    if generator_too:
        d_fake = discriminator(x_fake)
        loss_g = F.softplus(-d_fake).mean()
        if args.loss == "minimax":  # minimise log(1 - D) of them
            loss_g = -F.softplus(d_fake).mean()
        opt_g.zero_grad()
        loss_g.backward(inputs=list(generator.parameters()))  # the gradients of this network alone
        opt_g.step()
        losses["loss_g"] = loss_g
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).sigmoid()


def main(args):
    data = load_data(args)
    c, h, w = data.shape
    torch.manual_seed(args.seed)
    if args.arch == "mlp":
        generator = mlp([args.latent_dim, *args.hidden, c * h * w], norm=True)
        generator = nn.Sequential(generator, nn.Unflatten(1, data.shape))
        discriminator = mlp([c * h * w, *reversed(args.hidden), 1], leak=0.2, dropout=args.dropout)
        discriminator = he(nn.Sequential(nn.Flatten(), discriminator, nn.Flatten(0)))
    else:
        generator = conv_decoder(data.shape, args.width, args.latent_dim)
        discriminator = conv_discriminator(data.shape, args.width, hidden=[4 * args.width])
    generator_ema = copy.deepcopy(generator)
    networks = nn.ModuleDict({
        "generator": generator, "discriminator": discriminator, "generator_ema": generator_ema,
    })
    to_device(networks, args.device)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.0, 0.99))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.0, 0.99))
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)  # from the CPU: the same on any device
    log = Log(args, data, networks)
    parts = {**networks, "opt_g": opt_g, "opt_d": opt_d, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(generator_ema, z))
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # a resumed run draws what this one would
        log.start_epoch(epoch)
        losses = {}  # loss_g keeps its value from one step of the generator to the next
        for i, (x, labels) in enumerate(data.batches(args.batch_size, args.translate)):
            generator_too = i % args.d_steps == 0
            losses |= train_step(x, generator_too, args, generator, discriminator, opt_g, opt_d)
            if generator_too:
                update_average(generator_ema, generator, args.ema, log.step // args.d_steps)
            log.add(losses)
        samples = sample(generator_ema, z_fixed)
        save_grid(args, "samples", samples)
        save_grid(args, "progress", log.progress(samples), 10)
        z_walk = interpolate(z_fixed[:16], z_fixed[1:17])
        save_grid(args, "interpolation", sample(generator_ema, z_walk), 6)
        scores = {}
        if args.score:
            z = torch.randn(10_000, args.latent_dim, device=args.device)
            scores = score(classifier, data, sample(generator_ema, z))
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks.eval()


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""GAN: a generative adversarial network.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio: Generative adversarial
networks, 2014, arXiv 1406.2661.

A generator turns noise z ~ N(0, I) into an image x_fake = generator(z). A discriminator gives the
probability D that an image is real. The losses are averaged over the batch:

    loss_d = -log D(x) - log(1 - D(x_fake))
    loss_g = -log D(x_fake)            (--loss nonsaturating)
    loss_g = log(1 - D(x_fake))        (--loss minimax: learns slowly while the discriminator wins)

    discriminator  minimises  loss_d, with every batch
    generator      minimises  loss_g, with one batch in --d-steps

    Differences        here                                     in the paper or its code
      generator        layers of 128, 256, 512; batch norm      layers of 1200, 1200; no batch norm
      discriminator    layers of 512, 256, 128; leaky ReLU      layers of 240, 240; maxout units
      dropout          0.2 after the discriminator's layers     0.2 on its input, 0.5 after its layers
      first weights    discriminator: He's; generator: torch's  uniform, up to 0.005; uniform, up to 0.05
      noise            normal                                   uniform
      optimiser        Adam with betas of 0 and 0.99            SGD with momentum
      training         4e-3, discriminator 1.2e-3; batch of 64  0.1, decaying; batch of 100
      generator steps  n = --d-steps: on batches 1, n + 1, ...  on the last of n batches
                       of each epoch (batch norm: on all)
      generated batch  the same for both networks               a new one for the generator
      samples          from averaged weights; decay at step t:  from the last weights
                       min(--ema, (1 + t) / (10 + t))
      --arch conv      the networks of vaegan.py                fully connected networks

    python gan.py --epochs 1
    python gan.py --arch conv

A run writes gan.csv, gan.pt and gan_*.png: samples, progress and interpolation. The CSV's columns are epoch,
step, seconds (of training) and these means since the previous row:

    loss_d     2 log 2 = 1.39 at chance, when D is 1/2
    d_real     D(x)
    d_fake     D(x_fake)
    loss_g     log 2 = 0.69 at chance; -0.69 with --loss minimax
    fd, ...    scores after each epoch, only with --score: see README.md
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
    parse, positive_float, positive_int, share, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=64, lr=4e-3, latent_dim=100)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv changes the defaults to --batch-size 32 --lr-d 0.15 --latent-dim 8")
    add("--hidden", type=positive_int, nargs="+", default=[128, 256, 512],
        help="mlp: sizes of the generator's hidden layers; reversed in the discriminator")
    add("--dropout", type=share, default=0.2, help="mlp: dropout in the discriminator")
    add("--loss", choices=["nonsaturating", "minimax"], default="nonsaturating", help="the generator's loss")
    add("--d-steps", type=positive_int, default=1, help="discriminator steps per generator step")
    add("--lr-d", type=positive_float, default=0.3, help="the discriminator's learning rate is LR_D * LR")
    add("--ema", type=share, default=0.9995, help="decay of the weights averaged over training; 0: off")
    if parser.parse_known_args(argv)[0].arch == "conv":
        parser.set_defaults(batch_size=32, lr_d=0.15, latent_dim=8)
    return parse(parser, argv)


def make_networks(args, shape):
    """Generator: z (B, latent_dim) -> logits (B, C, H, W); discriminator: x (B, C, H, W) -> logits (B,)."""
    c, h, w = shape
    if args.arch == "mlp":
        generator = mlp([args.latent_dim, *args.hidden, c * h * w], norm=True)
        generator = nn.Sequential(generator, nn.Unflatten(1, shape))
        discriminator = mlp([c * h * w, *reversed(args.hidden), 1], leak=0.2, dropout=args.dropout)
        discriminator = he(nn.Sequential(nn.Flatten(), discriminator, nn.Flatten(0)))
    else:
        generator = conv_decoder(shape, args.width, args.latent_dim)
        discriminator = conv_discriminator(shape, args.width, hidden=[4 * args.width])
    return generator, discriminator


def train_step(x, update_generator, args, generator, discriminator, opt_g, opt_d):
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
    if update_generator:
        d_fake = discriminator(x_fake)
        loss_g = F.softplus(-d_fake).mean()
        if args.loss == "minimax":  # minimise log(1 - D) of them
            loss_g = -F.softplus(d_fake).mean()
        opt_g.zero_grad()
        loss_g.backward()  # this also gives the other network gradients; its next update clears them
        opt_g.step()
        losses["loss_g"] = loss_g
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).sigmoid()


def main(args):
    data = load_data(args)
    torch.manual_seed(args.seed)
    generator, discriminator = make_networks(args, data.shape)
    generator_ema = copy.deepcopy(generator)
    networks = nn.ModuleDict({
        "generator": generator, "discriminator": discriminator, "generator_ema": generator_ema,
    })
    to_device(networks, args.device)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.0, 0.99))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.0, 0.99))
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)  # drawn on the CPU, so the same for any device
    log = Log(args, data, networks)
    parts = {**networks, "opt_g": opt_g, "opt_d": opt_d, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(generator_ema, z))
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    step = done * (len(data.x_train) // args.batch_size)
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # so that a resumed run draws the same
        log.start_epoch(epoch)
        for i, (x, labels) in enumerate(data.batches(args.batch_size, args.translate)):
            update_generator = i % args.d_steps == 0
            losses = train_step(x, update_generator, args, generator, discriminator, opt_g, opt_d)
            if update_generator:
                update_average(generator_ema, generator, args.ema, step // args.d_steps)
            step += 1
            log.add(step, losses)
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

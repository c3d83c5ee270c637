# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""DCGAN: a deep convolutional generative adversarial network.

Radford, Metz, Chintala: Unsupervised representation learning with deep convolutional generative
adversarial networks, 2016, arXiv 1511.06434.

This is the GAN of gan.py, but its networks are convolutional throughout: no pooling, no hidden linear layer,
batch norm in both, leaky ReLU in the discriminator. The losses are averaged over the batch:

    loss_d = -log D(x) - log(1 - D(x_fake))
    loss_g = -log D(x_fake)

    discriminator  minimises  loss_d
    generator      minimises  loss_g

    Differences        here                                     in the paper or its code
      networks         three layers each for 28 x 28 pixels,    four layers each for 64 x 64 pixels,
                       16 to 64 channels, kernels of 3 and 4    128 to 1024 channels, kernels of 5
      last layer       the generator's keeps height and width   doubles both
      biases           in all layers, and in batch norm         none
      noise            normal, 10 dimensions: enough for        uniform, 100 dimensions
                       digits, too few for colour pictures
      optimiser        Adam with betas of 0 and 0.99            Adam with betas of 0.5 and 0.999
      learning rates   1.4e-3, the discriminator's 4.2e-4       2e-4 for both
      batches          of 32 images                             of 128
      weight decay     none                                     1e-5
      updates          both networks with the same images       in turn, each with new images
      samples          from averaged weights; decay at step t:  from the last weights
                       min(--ema, (1 + t) / (10 + t))

    python dcgan.py --epochs 1
    python dcgan.py --data cifar10 --latent-dim 100 --epochs 25

A run writes dcgan.csv, dcgan.pt and dcgan_*.png: samples, progress and interpolation. The CSV's columns are
epoch, step, seconds (of training) and these means since the previous row:

    loss_d     2 log 2 = 1.39 at chance, when D is 1/2
    d_real     D(x)
    d_fake     D(x_fake)
    loss_g     log 2 = 0.69 at chance
    fd, ...    scores after each epoch, only with --score: see README.md
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    load_data,
    conv_decoder, conv_discriminator,
    interpolate, make_optimizer, predict, to_device, update_average,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    parse, positive_float, share, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=32, lr=1.4e-3, latent_dim=10)
    add = parser.add_argument
    add("--lr-d", type=positive_float, default=0.3, help="the discriminator's learning rate is LR_D * LR")
    add("--ema", type=share, default=0.9995, help="decay of the weights averaged over training; 0: off")
    return parse(parser, argv)


def make_networks(args, shape):
    """Generator: z (B, latent_dim) -> x_fake (B, C, H, W) before tanh; discriminator: images (B, C, H, W) in
    [-1, 1] -> logits (B,)."""
    generator = initialize(conv_decoder(shape, args.width, args.latent_dim))
    discriminator = initialize(conv_discriminator(shape, args.width, norm=True))
    return generator, discriminator


def initialize(network):
    """Draw weights from N(0, 0.02^2), for batch norm from N(1, 0.02^2), in place, as in the authors' code."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.02)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, 1, 0.02)
    return network


def train_step(x, args, generator, discriminator, opt_g, opt_d):
    """An update of both networks on x (B, C, H, W); returns detached scalars for the CSV."""
    # (1) Discriminator: maximise log D of real images + log(1 - D) of generated ones
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z).tanh()
    d_real, d_fake = discriminator(2 * x - 1), discriminator(x_fake.detach())  # both in [-1, 1]
    loss_d = (F.softplus(-d_real) + F.softplus(d_fake)).mean()  # -log sigmoid(d) = softplus(-d)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    losses = {"loss_d": loss_d, "d_real": d_real.sigmoid().mean(), "d_fake": d_fake.sigmoid().mean()}

    # (2) Generator: maximise log D of generated images
    loss_g = F.softplus(-discriminator(x_fake)).mean()
    opt_g.zero_grad()
    loss_g.backward()  # this also gives the other network gradients; its next update clears them
    opt_g.step()
    losses["loss_g"] = loss_g
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).tanh() / 2 + 0.5


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
        for x, labels in data.batches(args.batch_size, args.translate):
            losses = train_step(x, args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, step)
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

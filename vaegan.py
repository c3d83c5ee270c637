# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""VAE/GAN: a variational autoencoder with a learned similarity metric.

Larsen, Sonderby, Larochelle, Winther: Autoencoding beyond pixels using a learned similarity metric,
2016, arXiv 1512.09300.

This is a VAE whose decoder is also the generator of a GAN. It compares images in the discriminator's features
f, not pixel by pixel. D is the probability that an image is real, x_recon = decoder(z) with z ~ q(z|x), and
x_fake = decoder(z) with z ~ p(z) = N(0, I). The losses are per image and averaged over the batch:

    loss_kl       = KL(q(z|x) || p(z))
    loss_features = 1/2 ||f(x) - f(x_recon)||^2            (-log N(f(x) | f(x_recon), I) + constant)
    loss_d        = -log D(x) - log(1 - D(x_recon)) - log(1 - D(x_fake))
    loss_g        = gamma * loss_features - log D(x_recon) - log D(x_fake)

    discriminator  minimises  loss_d
    encoder        minimises  beta * loss_kl + loss_features
    decoder        minimises  loss_g

    Differences        here                                     in the paper or its code
      networks         two or three layers each for 28 x 28     three or four layers each for 64 x 64
                       pixels, 16 to 64 channels                pixels, 32 to 256 channels
      z                8 dimensions                             128 dimensions
      images           in [0, 1]                                in [-1, 1]
      discriminator    no batch norm, He initialisation         batch norm
      features         of the last convolution but one          of the last convolution
      beta             8, as the variance of f(x); the scale of 1
                       f(x) depends on the discriminator
      gamma            0.01 (it depends on that scale, too)     1e-5; the other losses weigh 1 - gamma
      loss_g           with -log D                              with log(1 - D)
      optimiser        Adam with betas of 0.5 and 0.999         RMSprop
      learning rates   4e-3, the discriminator's 8e-4           3e-4 for all, decaying in the code
      updates          all three networks, with every batch     the code skips a network that wins
      batches          of 32 images                             of 64
      pictures         from averaged weights; decay at step t:  from the last weights
                       min(--ema, (1 + t) / (10 + t))

    python vaegan.py --epochs 1 --opt adam
    python vaegan.py --data cifar10 --latent-dim 64 --beta 0.05 --gamma 0.3 --lr 1e-3 --lr-d 0.5  # for colour

A run writes vaegan.csv, vaegan.pt and vaegan_*.png: samples, progress, interpolation, reconstructions and
traversal. The CSV's columns are epoch, step, seconds (of training) and these means since the previous row:

    loss_d                     3 log 2 = 2.08 at chance, when D is 1/2
    d_real, d_recon, d_fake    D(x), D(x_recon), D(x_fake)
    loss_kl                    in nats per image
    loss_features, loss_g
    fd, ...                    scores after each epoch, only with --score: see README.md
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import (
    load_data,
    conv_decoder, conv_discriminator, conv_encoder,
    interpolate, make_optimizer, predict, to_device, traverse, update_average,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    nonnegative_float, parse, positive_float, share, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=32, lr=4e-3, latent_dim=8)
    add = parser.add_argument
    add("--beta", type=nonnegative_float, default=8.0, help="weight of the KL divergence")
    add("--gamma", type=nonnegative_float, default=0.01, help="weight of loss_features in the decoder's loss")
    add("--lr-d", type=positive_float, default=0.2, help="the discriminator's learning rate is LR_D * LR")
    add("--ema", type=share, default=0.9995, help="decay of the weights averaged over training; 0: off")
    return parse(parser, argv)


def make_networks(args, shape):
    """Encoder: x (B, C, H, W) -> mu and logvar (B, 2 latent_dim); decoder: z (B, latent_dim) -> logits
    (B, C, H, W); discriminator: x (B, C, H, W) -> logits (B,), in two parts, head(features(x))."""
    encoder = conv_encoder(shape, args.width, 2 * args.latent_dim)
    decoder = conv_decoder(shape, args.width, args.latent_dim)
    discriminator = conv_discriminator(shape, args.width, hidden=[4 * args.width])
    return encoder, decoder, discriminator


def posterior(output):
    """q(z|x), a Normal of shape (B, latent_dim), from the encoder's output (B, 2 latent_dim)."""
    mu, logvar = output.chunk(2, 1)
    return Normal(mu, (logvar / 2).exp(), validate_args=False)


def train_step(x, args, encoder, decoder, discriminator, opt_e, opt_g, opt_d):
    """An update of the three networks on x (B, C, H, W); returns detached scalars for the CSV."""
    q, prior = posterior(encoder(x)), Normal(0.0, 1.0)
    z = torch.cat([q.rsample(), torch.randn_like(q.mean)])  # one batch: batch norm averages over both
    x_recon, x_fake = decoder(z).sigmoid().chunk(2)
    f_real, f_recon = discriminator.features(x), discriminator.features(x_recon)
    d_real, d_recon = discriminator.head(f_real), discriminator.head(f_recon)
    d_fake = discriminator(x_fake)
    loss_kl = kl_divergence(q, prior).sum(1).mean()
    loss_features = (f_real - f_recon).square().flatten(1).sum(1).mean() / 2

    # The losses share one graph, so backward(inputs=...) gives each network only the gradients of its own
    # loss. All gradients are computed before any network is updated, as in the paper.

    # (1) Discriminator: maximise log D(x) + log(1 - D(x_recon)) + log(1 - D(x_fake))
    # From logits d: -log D = softplus(-d)
    loss_d = (F.softplus(-d_real) + F.softplus(d_recon) + F.softplus(d_fake)).mean()
    opt_d.zero_grad()
    loss_d.backward(inputs=list(discriminator.parameters()), retain_graph=True)

    # (2) Encoder: minimise beta KL + feature error; it gets no gradient of loss_d or loss_g
    loss_e = args.beta * loss_kl + loss_features
    opt_e.zero_grad()
    loss_e.backward(inputs=list(encoder.parameters()), retain_graph=True)

    # (3) Decoder: minimise gamma feature error - log D(x_recon) - log D(x_fake)
    loss_g = args.gamma * loss_features + (F.softplus(-d_recon) + F.softplus(-d_fake)).mean()
    opt_g.zero_grad()
    loss_g.backward(inputs=list(decoder.parameters()))

    for optimizer in (opt_d, opt_e, opt_g):
        optimizer.step()
    losses = {
        "loss_d": loss_d, "d_real": d_real.sigmoid().mean(), "d_recon": d_recon.sigmoid().mean(),
        "d_fake": d_fake.sigmoid().mean(), "loss_kl": loss_kl, "loss_features": loss_features,
        "loss_g": loss_g,
    }
    return {name: loss.detach() for name, loss in losses.items()}


def sample(decoder, z):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(decoder, z).sigmoid()


def main(args):
    data = load_data(args)
    torch.manual_seed(args.seed)
    encoder, decoder, discriminator = make_networks(args, data.shape)
    encoder_ema, decoder_ema = copy.deepcopy(encoder), copy.deepcopy(decoder)
    networks = nn.ModuleDict({
        "encoder": encoder, "decoder": decoder, "discriminator": discriminator,
        "encoder_ema": encoder_ema, "decoder_ema": decoder_ema,
    })
    to_device(networks, args.device)
    opt_e = make_optimizer(args, encoder, args.lr, betas=(0.5, 0.999))
    opt_g = make_optimizer(args, decoder, args.lr, betas=(0.5, 0.999))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.5, 0.999))
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)  # drawn on the CPU, so the same for any device
    x_fixed = data.x_test[:32].float() / 255
    log = Log(args, data, networks)
    parts = {**networks, "opt_e": opt_e, "opt_g": opt_g, "opt_d": opt_d, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(decoder_ema, z))
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    step = done * (len(data.x_train) // args.batch_size)
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # so that a resumed run draws the same
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            losses = train_step(x, args, encoder, decoder, discriminator, opt_e, opt_g, opt_d)
            update_average(encoder_ema, encoder, args.ema, step)
            update_average(decoder_ema, decoder, args.ema, step)
            step += 1
            log.add(step, losses)
        samples = sample(decoder_ema, z_fixed)
        save_grid(args, "samples", samples)
        save_grid(args, "progress", log.progress(samples), 10)
        z_walk = interpolate(z_fixed[:16], z_fixed[1:17])
        save_grid(args, "interpolation", sample(decoder_ema, z_walk), 6)
        mu = posterior(predict(encoder_ema, x_fixed)).mean
        pairs = torch.stack([x_fixed, sample(decoder_ema, mu)], 1)
        save_grid(args, "reconstructions", pairs.flatten(0, 1))
        save_grid(args, "traversal", sample(decoder_ema, traverse(mu[0], mu)), 10)
        scores = {}
        if args.score:
            z = torch.randn(10_000, args.latent_dim, device=args.device)
            scores = score(classifier, data, sample(decoder_ema, z))
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks.eval()


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""WGAN: a Wasserstein GAN, with weight clipping or with a gradient penalty.

Arjovsky, Chintala, Bottou: Wasserstein GAN, 2017, arXiv 1701.07875. Gulrajani, Ahmed, Arjovsky,
Dumoulin, Courville: Improved training of Wasserstein GANs, 2017, arXiv 1704.00028.

A critic gives numbers, not probabilities. Its slope is bounded, and it learns to widen the gap between real
and generated images; at slope 1 the gap is their Wasserstein distance. Losses are averaged over the batch:

    wasserstein = critic(x) - critic(x_fake)
    loss_d      = -wasserstein                            (--lipschitz clip: weights in [-clip, clip])
    loss_d      = -wasserstein + gp_weight * penalty      (--lipschitz gp)
    penalty     = (||gradient of critic at x_hat|| - 1)^2, x_hat = a random point between x and x_fake
    loss_g      = -critic(x_fake)

    critic         minimises  loss_d, with every batch
    generator      minimises  loss_g, with one batch in --n-critic

    Differences        here                                     in the papers or their code
      networks         16 to 64 channels; a hidden layer in     64 channels and more; no hidden layer
                       the critic
      batch norm       in the generator                         clip: in both networks; gp: none for digits
      first weights    critic: He's; generator: torch's         clip: N(0, 0.02^2); gp: much like He's
      noise            10 dimensions                            clip: 100; gp: 128
      optimiser        clip: RMSprop; gp: Adam, betas 0, 0.9    the same; gp's code: betas 0.5, 0.9
      learning rates   clip: 2e-3, the critic's 5e-5            clip: 5e-5 for both
                       gp: 3e-3, the critic's 7.5e-4            gp: 1e-4 for both
      weights          clip: in [-0.1, 0.1]                     clip: in [-0.01, 0.01]
      batches          of 32 images                             of 64
      generator steps  n = --n-critic: on batches 1, n + 1, ... on the last of n batches (clip's code: n is
                       of each epoch (batch norm: on all)       sometimes a hundred)
      generated batch  the same for both networks               a new one for the generator
      samples          from averaged weights; decay at step t:  from the last weights
                       min(--ema, (1 + t) / (10 + t))

--norm batch mixes the images of a batch, so there is no longer a gradient penalty for each single image.

    python wgan.py --epochs 1
    python wgan.py --lipschitz clip

A run writes wgan.csv, wgan.pt and wgan_*.png: samples, progress and interpolation. The CSV's columns are
epoch, step, seconds (of training) and these means since the previous row:

    loss_d, loss_g
    wasserstein       the estimated distance, times the critic's slope
    penalty           0 with --lipschitz clip
    fd, ...           scores after each epoch, only with --score: see README.md
"""

import copy

import torch
from torch import nn

from common import (
    load_data,
    conv_decoder, conv_discriminator, he, mlp,
    interpolate, make_optimizer, predict, to_device, update_average,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    nonnegative_float, parse, positive_float, positive_int, share, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=32, lr=3e-3, latent_dim=10)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="conv", help="kind of networks")
    add("--hidden", type=positive_int, nargs="+", default=[128, 256, 512],
        help="mlp: sizes of the generator's hidden layers; reversed in the critic")
    add("--lipschitz", choices=["clip", "gp"], default="gp",
        help="how to bound the slope; clip changes the defaults to --opt rmsprop --lr 2e-3 --lr-d 0.025")
    add("--clip", type=positive_float, default=0.1, help="clip: the critic's weights stay in [-CLIP, CLIP]")
    add("--gp-weight", type=nonnegative_float, default=10.0, help="gp: weight of the gradient penalty")
    add("--n-critic", type=positive_int, default=5, help="critic steps per generator step")
    add("--norm", choices=["batch", "none"], default="none",
        help="normalisation in the critic; with batch, the gradient penalty is not one per image")
    add("--lr-d", type=positive_float, default=0.25, help="the critic's learning rate is LR_D * LR")
    add("--ema", type=share, default=0.9995, help="decay of the weights averaged over training; 0: off")
    if parser.parse_known_args(argv)[0].lipschitz == "clip":
        parser.set_defaults(opt="rmsprop", lr=2e-3, lr_d=0.025)
    return parse(parser, argv)


def make_networks(args, shape):
    """Generator: z (B, latent_dim) -> logits (B, C, H, W); critic: x (B, C, H, W) -> numbers (B,)."""
    c, h, w = shape
    if args.arch == "mlp":
        generator = mlp([args.latent_dim, *args.hidden, c * h * w], norm=True)
        generator = nn.Sequential(generator, nn.Unflatten(1, shape))
        critic = mlp([c * h * w, *reversed(args.hidden), 1], args.norm == "batch", leak=0.2)
        critic = he(nn.Sequential(nn.Flatten(), critic, nn.Flatten(0)))
    else:
        generator = conv_decoder(shape, args.width, args.latent_dim)
        critic = conv_discriminator(shape, args.width, [16 * args.width], args.norm == "batch")
    return generator, critic


def gradient_penalty(critic, x, x_fake):
    """Mean of (||gradient of critic at x_hat|| - 1)^2; x_hat lies between x and x_fake (B, C, H, W)."""
    epsilon = torch.rand(len(x), 1, 1, 1, device=x.device)
    x_hat = torch.lerp(x, x_fake, epsilon).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def train_step(x, update_generator, args, generator, critic, opt_g, opt_d):
    """An update of both networks, or of the critic alone, on x (B, C, H, W); returns detached scalars."""
    # (1) Critic: maximise critic(x) - critic(x_fake), with a bounded slope
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z).sigmoid()
    wasserstein = (critic(x) - critic(x_fake.detach())).mean()
    penalty = torch.zeros_like(wasserstein)
    if args.lipschitz == "gp":
        penalty = gradient_penalty(critic, x, x_fake.detach())
    loss_d = -wasserstein + args.gp_weight * penalty
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    if args.lipschitz == "clip":
        for weight in critic.parameters():
            weight.data.clamp_(-args.clip, args.clip)
    losses = {"loss_d": loss_d, "wasserstein": wasserstein, "penalty": penalty}

    # (2) Generator: maximise critic(x_fake)
    if update_generator:
        loss_g = -critic(x_fake).mean()
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
    generator, critic = make_networks(args, data.shape)
    generator_ema = copy.deepcopy(generator)
    networks = nn.ModuleDict({
        "generator": generator, "critic": critic, "generator_ema": generator_ema,
    })
    to_device(networks, args.device)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.0, 0.9))
    opt_d = make_optimizer(args, critic, args.lr * args.lr_d, betas=(0.0, 0.9))
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
            update_generator = i % args.n_critic == 0
            losses = train_step(x, update_generator, args, generator, critic, opt_g, opt_d)
            if update_generator:
                update_average(generator_ema, generator, args.ema, step // args.n_critic)
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

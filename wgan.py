# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""WGAN: a Wasserstein GAN, with weight clipping or with a gradient penalty.

Arjovsky, Chintala, Bottou: Wasserstein GAN, 2017, arXiv 1701.07875. Gulrajani, Ahmed, Arjovsky,
Dumoulin, Courville: Improved training of Wasserstein GANs, 2017, arXiv 1704.00028.

The critic gives a number, not a probability: among functions of slope at most 1 the one that differs
most between real and generated images shows their Wasserstein distance. Averaged over the batch:

    wasserstein = critic(x) - critic(x_fake)
    loss_d      = -wasserstein                            (--lipschitz clip: weights in [-clip, clip])
    loss_d      = -wasserstein + lambda * penalty         (--lipschitz gp)
    penalty     = (||gradient of critic at x_hat|| - 1)^2, x_hat = between x and x_fake at random
    loss_g      = -critic(x_fake)

    critic         minimises  loss_d, n_critic times
    generator      minimises  loss_g

Differences from the papers:
- no normalisation in the critic (Arjovsky et al.: batch norm; Gulrajani et al. recommend layer norm);
  He's initialisation; small networks: --arch conv has the decoder of vae.py, with gp one convolution
  more, and the discriminator of vaegan.py with a larger hidden layer, --arch mlp two hidden layers;
- one to three critic steps per generator step (the papers: five), of a critic that learns more slowly
  than the generator, so that an epoch has many generator steps; --critic-warmup steps ahead (Arjovsky et
  al.'s code: 100 for each of the first 25 generator steps, and for every 500th);
- gp: Adam at 2e-3 for the generator and 5e-4 for the critic (1e-4 for both), batches of 16 (64);
- clip: weights in [-0.1, 0.1], with --arch mlp in [-0.02, 0.02] ([-0.01, 0.01], for networks that are
  wider and scaled by batch norm), RMSprop at 1e-3 for the generator and 5e-5 for the critic (5e-5 for
  both), batches of 16 (64);
- the generator learns from the images that the critic has just seen (the papers: from new noise);
- the pictures come from an exponential moving average of the generator's weights (--ema).

    python wgan.py --epochs 1
    python wgan.py --lipschitz clip

Files: wgan.csv, wgan_samples.png, wgan_progress.png, wgan_interpolation.png, wgan.pt. Columns of the
CSV, as means over the rows' intervals, of the last critic step of each generator step: epoch, step,
seconds (of training), loss_d, wasserstein (the estimated distance, times the critic's slope), c_real =
critic(x), c_fake = critic(x_fake), penalty (0 with clip); then loss_g and grad_norm, the critic's slope
at x_fake.
"""

from itertools import islice

import torch

from common import (
    Run, average, conv_decoder, conv_discriminator, interpolate, load_data, make_optimizer, mlp_decoder,
    mlp_discriminator, number, parse, predict, shared_flags, update_average,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=16, opt="adam", lr=2e-3, latent_dim=100, width=16,
        lr_schedule="constant",
    )  # fmt: skip
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="conv",
        help="kind of networks; mlp brings --clip 0.02")  # fmt: skip
    add("--hidden", type=number(int, 1), nargs="+", default=[256, 512],
        help="hidden layers of the mlp generator; the critic's are these reversed")  # fmt: skip
    add("--lipschitz", choices=["clip", "gp"], default="gp",
        help="what bounds the critic's slope: clipped weights (brings --opt rmsprop --lr 1e-3 "
        "--lr-d 0.05) or a gradient penalty")  # fmt: skip
    add("--clip", type=number(float, 0), default=0.1, help="clip: largest weight of the critic")
    add("--gp-weight", type=number(float, 0), default=10.0, help="gp: weight of the gradient penalty")
    add("--n-critic", type=number(int, 1),
        help="critic steps per generator step; by default gp: 1 (mlp: 2), clip: 3 (mlp: 1)")  # fmt: skip
    add("--critic-warmup", type=number(int, 0), default=100,
        help="critic steps before the first epoch, at most a pass over the data")  # fmt: skip
    add("--lr-d", type=number(float, 1e-9), default=0.25, metavar="FACTOR",
        help="the critic's learning rate, as a factor of --lr")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), default=0.999,
        help="decay of the averaged weights that draw the pictures; 0: no averaging")  # fmt: skip
    clip = {"opt": "rmsprop", "lr": 1e-3, "lr_d": 0.05}
    args = parse(parser, arch={"mlp": {"clip": 0.02}}, lipschitz={"clip": clip})
    n_critic = {("gp", "conv"): 1, ("gp", "mlp"): 2, ("clip", "conv"): 3, ("clip", "mlp"): 1}
    args.n_critic = args.n_critic or n_critic[args.lipschitz, args.arch]
    args.images_per_step = args.batch_size * args.n_critic
    return args


def critic_loss(c_real, c_fake):
    """critic(x_fake) - critic(x) from numbers (B,), averaged: minus the estimated distance."""
    return c_fake.mean() - c_real.mean()


def generator_loss(c_fake):
    """-critic(x_fake) from numbers (B,), averaged."""
    return -c_fake.mean()


def gradient_penalty(critic, x, x_fake):
    """(||gradient of critic at x_hat|| - 1)^2, averaged; x_hat between x and x_fake (B, C, H, W)."""
    epsilon = torch.rand(len(x), 1, 1, 1, device=x.device)
    x_hat = torch.lerp(x, x_fake, epsilon).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_step(x, args, generator, critic, opt_d):
    """One update of the critic on x (B, C, H, W); returns x_fake and detached scalars for the CSV."""
    z = torch.randn(len(x), args.latent_dim, device=x.device)
    x_fake = generator(z).sigmoid()
    c_real, c_fake = critic(torch.cat([x, x_fake.detach()])).chunk(2)
    loss, penalty = critic_loss(c_real, c_fake), torch.zeros((), device=x.device)
    if args.lipschitz == "gp":
        penalty = gradient_penalty(critic, x, x_fake.detach())
    loss_d = loss + args.gp_weight * penalty
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    if args.lipschitz == "clip":
        for weight in critic.parameters():
            weight.data.clamp_(-args.clip, args.clip)
    losses = {
        "loss_d": loss_d, "wasserstein": -loss, "c_real": c_real.mean(), "c_fake": c_fake.mean(),
        "penalty": penalty,
    }  # fmt: skip
    return x_fake, {name: loss.detach() for name, loss in losses.items()}


def train_step(x, args, generator, critic, opt_g, opt_d):
    """One update of the generator on x (n_critic * B, C, H, W); returns detached scalars for the CSV."""
    # (1) Critic, n_critic times: maximise critic(x) - critic(x_fake), with a bounded slope
    for x_real in x.split(args.batch_size):
        x_fake, losses = critic_step(x_real, args, generator, critic, opt_d)

    # (2) Generator: maximise critic(x_fake) of the last x_fake
    loss_g = generator_loss(critic(x_fake))
    opt_g.zero_grad()
    loss_g.backward(inputs=[x_fake, *generator.parameters()])
    opt_g.step()

    slope = len(x_fake) * x_fake.grad.flatten(1).norm(dim=1).mean()
    return {**losses, "loss_g": loss_g.detach(), "grad_norm": slope}


def sample(generator, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).sigmoid()


def main(args):
    data = load_data(args)
    if args.arch == "mlp":
        generator = mlp_decoder(data.shape, args.hidden, args.latent_dim)
        critic = mlp_discriminator(data.shape, args.hidden[::-1])
    else:
        deep = args.lipschitz == "gp"
        generator = conv_decoder(data.shape, args.width, args.latent_dim, deep=deep)
        critic = conv_discriminator(data.shape, args.width, hidden=16 * args.width)
    generator, critic = generator.to(args.device), critic.to(args.device)
    generator_ema = average(generator)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.0, 0.9))
    opt_d = make_optimizer(args, critic, args.lr * args.lr_d, betas=(0.0, 0.9))
    networks = {"generator": generator, "critic": critic, "generator_ema": generator_ema}
    run = Run(args, data, networks, {"generator": opt_g, "critic": opt_d})

    def draw(n):
        return sample(generator_ema, torch.randn(n, args.latent_dim, device=args.device)), None

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)

    for epoch in run.epochs():
        head_start = args.critic_warmup if epoch == 1 else 0
        for x, _ in islice(data.batches(args.batch_size, args.translate), head_start):
            critic_step(x, args, generator, critic, opt_d)
        for x, _ in data.batches(args.images_per_step, args.translate):
            losses = train_step(x, args, generator, critic, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, run.step)
            run.log(losses)
        x_fake = sample(generator_ema, z_fixed)
        run.save_grid("samples", x_fake)
        z_path = interpolate(z_fixed[:16], z_fixed.roll(-1, 0)[:16])
        run.save_grid("interpolation", sample(generator_ema, z_path), 6)
        run.end_epoch(x_fake, draw)


if __name__ == "__main__":
    main(parse_args())

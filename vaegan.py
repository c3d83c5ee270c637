# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""VAE/GAN: a variational autoencoder with a learned similarity metric.

Larsen, Sonderby, Larochelle, Winther: Autoencoding beyond pixels using a learned similarity metric,
2016, arXiv 1512.09300.

A VAE whose decoder is also a GAN's generator. Images are compared in the discriminator's features f
instead of pixel by pixel. With x_recon = decoder(z), z ~ q(z|x), and x_fake = decoder(z), z ~ p(z), per
image and averaged over the batch:

    loss_kl       = KL(q(z|x) || N(0, I))
    loss_features = 1/2 ||f(x) - f(x_recon)||^2
    loss_d        = -log D(x) - log(1 - D(x_recon)) - log(1 - D(x_fake))
    loss_g        = gamma * loss_features - log D(x_recon) - log D(x_fake)
    penalty       = 1/2 ||gradient of D(x)'s logit in x||^2

    discriminator  minimises  loss_d + r1 * penalty
    encoder        minimises  beta * loss_kl + loss_features
    decoder        minimises  loss_g

Differences from the paper:
- small networks and 10 latent dimensions for 28 x 28 digits (the paper: 128 for 64 x 64 faces); the
  discriminator has twice the encoder's channels, as the decoder has, and no batch norm; its input is
  centred, its initialisation He's, and its features are taken before the activation;
- every other image of a batch is encoded and reconstructed, beside as many samples (the paper: every
  image): the discriminator sees as many real images as generated ones, and a step costs less;
- a discriminator that learns more slowly than the other two (--lr-d; the paper: as fast);
- p(z), from which samples are drawn, is a mixture of Gaussians fitted to the codes of training images,
  again and again as these move (--components; 0: N(0, I), as in the paper). N(0, I) has much of its mass
  between the clusters of the codes, and what the decoder draws there is no digit. A mixture fitted once,
  after the training: Ghosh et al. 2020, arXiv 1903.12436;
- the penalty (R1 of Mescheder et al. 2018, arXiv 1801.04406), without which the discriminator slowly
  wins over many epochs. It begins with the second, as in the first it would only hold the discriminator
  back, and comes at every eighth step;
- beta (the paper: 1): the features' scale is arbitrary, and with it the balance between the two losses
  of the encoder; beta is the variance of the Gaussian around f(x_recon); gamma depends on it likewise;
- the decoder maximises log D, as GANs do in practice, instead of minimising log(1 - D);
- reconstructions and samples share a batch, and with it the decoder's batch norm;
- Adam at 6e-3 (the paper: RMSprop at 3e-4; with --opt rmsprop the rate rises over the first 100 steps);
- the pictures, and the codes that p(z) is fitted to (the means of q(z|x)), come from an exponential
  moving average of the weights (--ema).

    python vaegan.py --epochs 1 --opt adam
    python vaegan.py --opt rmsprop --lr 3e-4 --image-size 64 --width 32 --latent-dim 128

Files: vaegan.csv, vaegan_samples.png, vaegan_progress.png, vaegan_reconstructions.png,
vaegan_interpolation.png, vaegan_traversal.png, vaegan.pt. Columns of the CSV, as means over the rows'
intervals: epoch, step, seconds (of training), loss_d (3 log 2 = 2.08 at chance), loss_g, loss_kl (nats;
divide by --latent-dim for nats per dimension), loss_features, d_real = D(x), d_recon = D(x_recon),
d_fake = D(x_fake).
"""

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    Run, average, conv_decoder, conv_discriminator, conv_encoder, interpolate, kl_divergence, load_data,
    make_optimizer, number, parse, predict, reparameterize, shared_flags, traverse, update_average,
)  # fmt: skip

R1_EVERY = 8  # steps: eight times the weight at one step in eight takes less time
FIT_EVERY, FIT_CODES = 150, 8192  # steps between two fits of p(z), and how many codes each looks at
CODES_EACH = 32  # at least, for a component on average: with fewer, p(z) would learn images by heart


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=64, opt="adam", lr=6e-3, latent_dim=10, width=8,
        lr_schedule="constant",
    )  # fmt: skip
    add = parser.add_argument
    add("--beta", type=number(float, 0), default=5.0, help="weight of the KL divergence")
    add("--gamma", type=number(float, 0), default=0.02,
        help="weight of the feature error in the decoder's loss")  # fmt: skip
    add("--lr-d", type=number(float, 1e-9), default=0.2, metavar="FACTOR",
        help="the discriminator's learning rate, as a factor of --lr")  # fmt: skip
    most = FIT_CODES // CODES_EACH
    add("--components", type=number(int, 0, most), default=most,
        help="Gaussians in p(z), the mixture that samples come from, of which one for every 32 "
        "training images is used; 0: N(0, I)")  # fmt: skip
    add("--r1", type=number(float, 0), default=0.05,
        help="weight of the penalty on the discriminator's slope, from the second epoch on")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), default=0.996,
        help="decay of the averaged weights that draw the pictures; 0: no averaging")  # fmt: skip
    return parse(parser)


class Mixture(nn.Module):
    """p(z): a mixture of K diagonal Gaussians. N(0, I) until it is fitted.

    weights (K,), which sum to 1; means and stds (K, latent_dim).
    """

    def __init__(self, components, latent_dim):
        super().__init__()
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("means", torch.zeros(components, latent_dim))
        self.register_buffer("stds", torch.ones(components, latent_dim))

    def noise(self, n):
        """What sample() makes n codes of: Gumbel noise (n, K), which chooses components, and
        normal noise (n, latent_dim)."""
        gumbel = -torch.empty(n, len(self.weights), device=self.weights.device).exponential_().log()
        return gumbel, torch.randn(n, self.means.shape[1], device=self.means.device)

    def sample(self, gumbel, normal):
        """z (n, latent_dim). The same noise gives the same codes but for what a fit changes."""
        k = (self.weights.log() + gumbel).argmax(1)
        return self.means[k] + self.stds[k] * normal

    @torch.no_grad()
    def fit(self, z, steps=5):
        """Expectation maximisation on z (N, latent_dim), going on from the last fit.

        With fewer than CODES_EACH codes for each component, only the first len(z) // CODES_EACH of
        them, or one, are used, and the others have weight 0.
        """
        used = min(len(self.weights), max(len(z) // CODES_EACH, 1))
        self.weights[used:] = 0
        # Components that were never fitted, or lost their codes, begin at a code
        new = (self.means == 0).all(1) | (self.weights < 0.1 / used)
        new[used:] = False
        self.means[new] = z[torch.randint(len(z), new.shape, device=z.device)][new]
        self.stds[new] = z.std(0, correction=0).clamp(min=1e-3) / 2
        self.weights[new] = 1 / used
        for _ in range(steps):
            # log(weight * N(z | mean, std^2)) but for a constant: multiplied out, two matrix products
            precision = self.stds.pow(-2)
            log_p = z @ (self.means * precision).T - z.square() @ precision.T / 2
            log_p += self.weights.log() - (self.means.square() * precision / 2 + self.stds.log()).sum(1)
            p = log_p.softmax(1)  # (N, K): which component each code came from
            n = p.sum(0)
            self.weights = n / n.sum()
            n = n.clamp(min=1e-6)[:, None]
            self.means = p.T @ z / n
            self.stds = (p.T @ z.square() / n - self.means.square()).clamp(min=1e-6).sqrt()


def discriminator_loss(d_real, d_recon, d_fake):
    """-log D(x) - log(1 - D(x_recon)) - log(1 - D(x_fake)), averaged.

    From logits: d_real (B,), d_recon and d_fake (B / 2,).
    """
    return F.softplus(-d_real).mean() + (F.softplus(d_recon) + F.softplus(d_fake)).mean()


def adversarial_loss(d_recon, d_fake):
    """-log D(x_recon) - log D(x_fake) from logits (B / 2,), averaged."""
    return (F.softplus(-d_recon) + F.softplus(-d_fake)).mean()


def feature_loss(f, f_recon):
    """1/2 ||f(x) - f(x_recon)||^2, -log N(f(x) | f(x_recon), I) but for a constant; averaged."""
    return (f - f_recon).square().flatten(1).sum(1).mean() / 2


def gradient_penalty(discriminator, x):
    """R1: 1/2 ||gradient of the logit in x||^2 at real images x (B, C, H, W), averaged."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


def train_step(x, r1, args, prior, encoder, decoder, discriminator, opt_e, opt_g, opt_d):
    """One update of each network on x (B, C, H, W), with the weight r1 of this step's gradient penalty.

    Returns detached scalars for the CSV.
    """
    # The discriminator sees as many real images as generated ones: half of x is reconstructed
    mu, logvar = encoder(x[::2]).chunk(2, 1)  # (B / 2, latent_dim) each
    z = reparameterize(mu, logvar)
    # One batch, and so one batch norm statistic for both, as there is in eval mode
    x_recon_fake = decoder(torch.cat([z, prior.sample(*prior.noise(len(z)))])).sigmoid()
    f_real, f_recon_fake = discriminator.features(x), discriminator.features(x_recon_fake)
    d_real = discriminator.head(f_real)
    d_recon, d_fake = discriminator.head(f_recon_fake).chunk(2)
    f_recon, _ = f_recon_fake.chunk(2)
    loss_kl = kl_divergence(mu, logvar).mean()
    loss_features = feature_loss(f_real[::2], f_recon)

    # (1) Discriminator: maximise log D(x) + log(1 - D(x_recon)) + log(1 - D(x_fake))
    loss_d = discriminator_loss(d_real, d_recon, d_fake)
    opt_d.zero_grad()
    loss_d.backward(inputs=list(discriminator.parameters()), retain_graph=True)
    if r1:
        (r1 * gradient_penalty(discriminator, x)).backward(inputs=list(discriminator.parameters()))

    # (2) Encoder: minimise beta KL + feature error; no adversarial gradient reaches it
    loss_e = args.beta * loss_kl + loss_features
    opt_e.zero_grad()
    loss_e.backward(inputs=list(encoder.parameters()), retain_graph=True)

    # (3) Decoder: minimise gamma feature error - log D(x_recon) - log D(x_fake)
    loss_g = args.gamma * loss_features + adversarial_loss(d_recon, d_fake)
    opt_g.zero_grad()
    loss_g.backward(inputs=list(decoder.parameters()))

    # As in the paper: no network answers a change of another within the step
    for optimizer in (opt_d, opt_e, opt_g):
        optimizer.step()

    losses = {
        "loss_d": loss_d, "loss_g": loss_g, "loss_kl": loss_kl, "loss_features": loss_features,
        "d_real": d_real.sigmoid().mean(), "d_recon": d_recon.sigmoid().mean(),
        "d_fake": d_fake.sigmoid().mean(),
    }  # fmt: skip
    return {name: loss.detach() for name, loss in losses.items()}


def sample(decoder, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(decoder, z).sigmoid()


def encode(encoder, x):
    """The means of q(z|x), (N, latent_dim)."""
    return predict(encoder, x).chunk(2, 1)[0]


def main(args):
    data = load_data(args)
    encoder = conv_encoder(data.shape, args.width, 2 * args.latent_dim).to(args.device)
    decoder = conv_decoder(data.shape, args.width, args.latent_dim).to(args.device)
    discriminator = conv_discriminator(data.shape, 2 * args.width, hidden=8 * args.width).to(args.device)
    encoder_ema, decoder_ema = average(encoder), average(decoder)
    prior = Mixture(max(args.components, 1), args.latent_dim)
    noise_fixed = [noise.to(args.device) for noise in prior.noise(64)]  # the same on any device
    prior.to(args.device)
    opt_e = make_optimizer(args, encoder, args.lr, betas=(0.5, 0.99))
    opt_g = make_optimizer(args, decoder, args.lr, betas=(0.5, 0.99))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.5, 0.99))
    networks = {
        "encoder": encoder, "decoder": decoder, "discriminator": discriminator,
        "encoder_ema": encoder_ema, "decoder_ema": decoder_ema, "prior": prior,
    }  # fmt: skip
    optimizers = {"encoder": opt_e, "decoder": opt_g, "discriminator": opt_d}
    # RMSprop lacks Adam's correction for a short past: its first steps would be up to ten times as long
    run = Run(args, data, networks, optimizers, warmup=100 if args.opt == "rmsprop" else 0)

    def draw(n):
        return sample(decoder_ema, prior.sample(*prior.noise(n))), None

    if args.generate:
        return run.generate(draw)
    x_fixed, _ = data.examples(32)

    for epoch in run.epochs():
        for x, _ in data.batches(args.batch_size, args.translate):
            r1 = 0 if epoch == 1 or run.step % R1_EVERY else args.r1 * R1_EVERY
            losses = train_step(x, r1, args, prior, encoder, decoder, discriminator, opt_e, opt_g, opt_d)
            update_average(encoder_ema, encoder, args.ema, run.step)
            update_average(decoder_ema, decoder, args.ema, run.step)
            run.log(losses)
            epoch_ends = run.step == epoch * run.steps_per_epoch
            if args.components and (epoch_ends or run.step % FIT_EVERY == 0):
                images, _ = next(data.batches(min(FIT_CODES, len(data.x_train)), args.translate))
                prior.fit(encode(encoder_ema, images))
        x_fake = sample(decoder_ema, prior.sample(*noise_fixed))
        mu = encode(encoder_ema, x_fixed)
        x_recon = sample(decoder_ema, mu)
        run.save_grid("samples", x_fake)
        run.save_grid("reconstructions", torch.stack([x_fixed, x_recon], 1).flatten(0, 1))
        run.save_grid("interpolation", sample(decoder_ema, interpolate(mu[:16], mu.roll(-1, 0)[:16])), 6)
        run.save_grid("traversal", sample(decoder_ema, traverse(mu[0], mu)), 10)
        run.end_epoch(x_fake, draw)


if __name__ == "__main__":
    main(parse_args())

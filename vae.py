# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""VAE: a variational autoencoder.

Kingma, Welling: Auto-encoding variational Bayes, 2014, arXiv 1312.6114.

An encoder gives mu and logvar = log sigma^2 of q(z|x) = N(mu, sigma^2), and a decoder gives p(x|z). Together
they minimise the negative evidence lower bound (-ELBO) of an image, averaged over the batch:

    loss       = loss_recon + beta * loss_kl                    (beta = 1: -ELBO >= -log p(x))
    loss_recon = -log p(x|z), z = mu + sigma * epsilon, epsilon ~ N(0, I)
    loss_kl    = KL(q(z|x) || p(z)), p(z) = N(0, I)

--arch pixelcnn is the PixelVAE of Gulrajani, Kumar, Ahmed, Ali Taiga, Visin, Vazquez, Courville, 2017, arXiv
1611.05013. A pixel depends on z and on the pixels before it: p(x|z) = prod_i p(x_i | x_1 ... x_i-1, z).

    Differences        here                                     in the papers or their code
      layers           512, 256; ReLU, batch norm               one of 500; tanh
      --arch conv      the networks of vaegan.py                fully connected networks
      first weights    torch's                                  from N(0, 0.01)
      training         Adam at 3e-3, decaying; batches of 128   Adagrad, weight decay; batches of 100
      pixels           grey, as Bernoulli means; or --binarize  binary
      PixelVAE: z      added after the first convolution        joined to the image, or used in all gates
        convolutions   five, residual, ReLU; miss some pixels   gated; two stacks, miss no pixels
        other layers   an encoder of two; batch norm            an encoder of eight; weight norm
        training       2e-3, decaying; beta rises for 2 epochs  1e-3; beta rises for 20 epochs
        binary pixels  drawn again for each batch               drawn once

    python vae.py --epochs 10
    python vae.py --latent-dim 2 --epochs 20

A run writes vae.csv, vae.pt and vae_*.png: samples, progress, interpolation, reconstructions, traversal and,
with --latent-dim 2, manifold and latent. The CSV's columns are epoch, step, seconds (of training) and

    loss, loss_recon, loss_kl              means since the previous row, in nats per image
    test_neg_elbo, test_recon, test_kl     the same for the test set, with beta = 1, after each epoch
    fd, ...                                scores after each epoch, only with --score: see README.md
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import (
    load_data,
    conv_decoder, conv_encoder, mlp,
    interpolate, make_optimizer, predict, to_device, traverse,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    fail, nonnegative_float, parse, positive_int, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=128, lr=3e-3, latent_dim=20)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv", "pixelcnn"], default="mlp",
        help="kind of networks; conv changes the defaults to --batch-size 32 --latent-dim 8, pixelcnn to "
        "--batch-size 64 --latent-dim 16 --lr 2e-3 --kl-warmup 2 --binarize")
    add("--hidden", type=positive_int, nargs="+", default=[512, 256],
        help="mlp: sizes of the encoder's hidden layers; reversed in the decoder")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--recon", choices=["bce", "mse"], default="bce", help="cross-entropy or squared error of pixels")
    add("--binarize", action="store_true", help="draw binary pixels; in training, again for each batch")
    add("--beta", type=nonnegative_float, default=1.0, help="weight of the KL divergence")
    add("--kl-warmup", type=nonnegative_float, default=0.0, help="epochs over which beta rises from 0")
    add("--lr-schedule", choices=["constant", "linear"], default="linear", help="linear: --lr falls to zero")
    arch = parser.parse_known_args(argv)[0].arch
    if arch == "conv":
        parser.set_defaults(batch_size=32, latent_dim=8)
    if arch == "pixelcnn":
        parser.set_defaults(batch_size=64, latent_dim=16, lr=2e-3, kl_warmup=2.0, binarize=True)
    return parse(parser, argv)


def make_networks(args, shape):
    """Encoder: x (B, C, H, W) -> mu, logvar (B, 2 latent_dim); decoder: z (B, latent_dim) -> logits of x."""
    c, h, w = shape
    norm = args.norm == "batch"
    if args.arch == "mlp":
        encoder = nn.Sequential(nn.Flatten(), mlp([c * h * w, *args.hidden, 2 * args.latent_dim], norm))
        decoder = mlp([args.latent_dim, *reversed(args.hidden), c * h * w], norm)
        decoder = nn.Sequential(decoder, nn.Unflatten(1, shape))
    else:
        encoder = conv_encoder(shape, args.width, 2 * args.latent_dim, norm)
        make_decoder = PixelCNN if args.arch == "pixelcnn" else conv_decoder
        decoder = make_decoder(shape, args.width, args.latent_dim, norm)
    if args.arch == "pixelcnn" and (c > 1 or args.recon == "mse"):
        fail("--arch pixelcnn draws binary pixels; use grey images and --recon bce")
    return encoder, decoder


def posterior(output):
    """q(z|x), a Normal of shape (B, latent_dim), from the encoder's output (B, 2 latent_dim)."""
    mu, logvar = output.chunk(2, 1)
    return Normal(mu, (logvar / 2).exp(), validate_args=False)


def reconstruction_loss(logits, x, kind):
    """-log p(x|z) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    if kind == "mse":
        return ((logits.sigmoid() - x).square() + math.log(math.pi) / 2).flatten(1).sum(1)
    loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return loss.flatten(1).sum(1)


def decode(decoder, z, x):
    """Logits of p(x|z), (B, C, H, W); a PixelCNN also looks at the pixels of x."""
    return decoder(z, x) if isinstance(decoder, PixelCNN) else decoder(z)


def train_step(x, beta, args, encoder, decoder, opt):
    """An update of both networks on x (B, C, H, W); returns detached scalars for the CSV."""
    # Encoder and decoder: minimise -log p(x|z) + beta KL(q(z|x) || p(z))
    q, prior = posterior(encoder(x)), Normal(0.0, 1.0)
    logits = decode(decoder, q.rsample(), x)
    loss_recon = reconstruction_loss(logits, x, args.recon).mean()
    loss_kl = kl_divergence(q, prior).sum(1).mean()
    loss = loss_recon + beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    losses = {"loss": loss, "loss_recon": loss_recon, "loss_kl": loss_kl}
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def evaluate(data, args, encoder, decoder):
    """-ELBO and its two terms on the test set, in nats per image, with one z drawn for each image."""
    training = encoder.training
    encoder.eval()
    decoder.eval()
    torch.manual_seed(args.seed)
    prior = Normal(0.0, 1.0)
    batches = []
    for x, labels in data.test_batches(args.binarize):
        q = posterior(encoder(x))
        recon = reconstruction_loss(decode(decoder, q.sample(), x), x, args.recon)
        kl = kl_divergence(q, prior).sum(1)
        batches.append(torch.stack([recon + kl, recon, kl]))
    encoder.train(training)
    decoder.train(training)
    return dict(zip(["test_neg_elbo", "test_recon", "test_kl"], torch.cat(batches, 1).mean(1).tolist()))


def sample(decoder, z):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim); a PixelCNN draws binary samples."""
    return predict(decoder, z).sigmoid()


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees only earlier pixels in reading order; kind "B" also sees the current one."""

    def __init__(self, kind, c_in, c_out, size):
        super().__init__(c_in, c_out, size, padding=size // 2)
        before = torch.arange(size * size).view(size, size) < size * size // 2 + (kind == "B")
        self.register_buffer("mask", before.float(), persistent=False)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """z (B, latent_dim), x (B, 1, H, W) -> logits (B, 1, H, W), each from z and the pixels of x before it."""

    def __init__(self, shape, width, latent_dim, norm, layers=5):
        super().__init__()
        self.context = conv_decoder((width, *shape[1:]), width, latent_dim, norm)
        self.first = MaskedConv2d("A", 1, width, 7)
        self.layers = nn.ModuleList(MaskedConv2d("B", width, width, 3) for _ in range(layers))
        self.last = nn.Conv2d(width, 1, 1)
        self.reach = 3 + layers  # a pixel depends on this many rows above

    def logits(self, x, context):
        h = self.first(2 * x - 1) + context
        for layer in self.layers:
            h = h + layer(h.relu())
        return self.last(h.relu())

    def forward(self, z, x=None):
        if x is None:
            return self.draw(z)
        return self.logits(x, self.context(z))

    def draw(self, z):
        """Draw binary samples (B, 1, H, W) pixel by pixel; return their logits, -inf for 0 and inf for 1."""
        context = self.context(z)
        x = torch.zeros_like(context[:, :1])
        for i in range(x.shape[2]):
            rows = slice(max(0, i - self.reach), i + 1)
            for j in range(x.shape[3]):
                logits = self.logits(x[:, :, rows], context[:, :, rows])
                x[:, 0, i, j] = torch.bernoulli(logits[:, 0, -1, j].sigmoid())
        return torch.logit(x)


def main(args):
    data = load_data(args)
    torch.manual_seed(args.seed)
    encoder, decoder = make_networks(args, data.shape)
    networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    to_device(networks, args.device)
    opt = make_optimizer(args, networks, args.lr)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)  # drawn on the CPU, so the same for any device
    x_fixed = next(data.test_batches(args.binarize))[0][:32]
    log = Log(args, data, networks)
    parts = {**networks, "opt": opt, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(decoder, z))
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    steps_per_epoch = len(data.x_train) // args.batch_size
    step = done * steps_per_epoch
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # so that a resumed run draws the same
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            if args.lr_schedule == "linear":
                opt.param_groups[0]["lr"] = args.lr * (1 - step / (args.epochs * steps_per_epoch))
            if args.binarize:
                x = torch.bernoulli(x)
            beta = args.beta
            if step < args.kl_warmup * steps_per_epoch:
                beta *= step / (args.kl_warmup * steps_per_epoch)
            losses = train_step(x, beta, args, encoder, decoder, opt)
            step += 1
            log.add(step, losses)
        samples = sample(decoder, z_fixed)
        save_grid(args, "samples", samples)
        save_grid(args, "progress", log.progress(samples), 10)
        z_walk = interpolate(z_fixed[:16], z_fixed[1:17])
        save_grid(args, "interpolation", sample(decoder, z_walk), 6)
        mu = posterior(predict(encoder, x_fixed)).mean
        pairs = torch.stack([x_fixed, sample(decoder, mu)], 1)
        save_grid(args, "reconstructions", pairs.flatten(0, 1))
        if args.latent_dim == 2:
            ticks = Normal(0.0, 1.0).icdf((torch.arange(20) + 0.5) / 20)  # equally probable under N(0, 1)
            plane = torch.cartesian_prod(-ticks, ticks).flip(1).to(args.device)  # row by row: (400, 2)
            save_grid(args, "manifold", sample(decoder, plane), 20)
            x_test = torch.cat([x for x, _ in data.test_batches(args.binarize)])
            codes = posterior(predict(encoder, x_test)).mean
            nearest = torch.cdist(plane, codes).argmin(1)  # the test image nearest to each point
            save_grid(args, "latent", x_test[nearest], 20)
        save_grid(args, "traversal", sample(decoder, traverse(mu[0], mu)), 10)
        scores = evaluate(data, args, encoder, decoder)
        if args.score:
            z = torch.randn(10_000, args.latent_dim, device=args.device)
            if args.arch == "pixelcnn":  # drawing 10,000 pixel by pixel takes minutes
                z = z[:1_000]
            scores |= score(classifier, data, sample(decoder, z), binarize=args.arch == "pixelcnn")
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks.eval()


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""VAE: a variational autoencoder.

Kingma, Welling: Auto-encoding variational Bayes, 2014, arXiv 1312.6114.

An encoder gives mu and logvar of q(z|x) = N(mu, sigma^2); a decoder gives the pixels of p(x|z). Both
minimise, per image and averaged over the batch, the negative evidence lower bound

    loss       = loss_recon + beta * loss_kl                    (beta = 1: -ELBO >= -log p(x))
    loss_recon = -log p(x|z), z = mu + sigma * epsilon
    loss_kl    = KL(q(z|x) || p(z)), p(z) = N(0, I)

--arch pixelcnn is the PixelVAE (Gulrajani, Kumar, Ahmed, Ali Taiga, Visin, Vazquez, Courville: PixelVAE:
a latent variable model for natural images, 2017, arXiv 1611.05013): a pixel depends on z and on the
pixels before it, p(x|z) = prod_i p(x_i | x_1 ... x_i-1, z).

Differences from the paper, beside what common.py says of all scripts:
- --arch mlp: layers of 512 and 256 units with ReLU and batch norm (the paper: 500 with tanh), batches of 128
  (100), a learning rate that falls to zero (Adagrad); --arch conv: the networks of vaegan.py;
- grey levels in [0, 1] count as Bernoulli means unless --binarize draws pixels from them;
- PixelVAE: masked convolutions with residual connections and one layer of z (the paper: gated ones, several
  layers), a KL divergence whose weight rises over the first epochs; --score draws 1,000 samples of it.

    python vae.py --epochs 10
    python vae.py --latent-dim 2 --epochs 20

Files: vae.csv, vae.pt, vae_*.png: samples, progress, interpolation, reconstructions, traversal (if z has two
dimensions also manifold and latent). Columns of the CSV: epoch, step, seconds of training; in nats, as
means since the row before, loss, loss_recon, loss_kl; of the test set test_neg_elbo (with beta = 1),
test_recon, test_kl and, at the end, --nll's test_nll; the scores of --score.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import (
    conv_decoder, conv_encoder, mlp, mlp_decoder,
    interpolate, make_optimizer, predict, to_device, traverse,
    Log, load_checkpoint, load_classifier, load_data, parse, save_checkpoint, save_grid, save_images, score,
    shared_flags,
    fail, scatter,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=128, lr=3e-3, latent_dim=20, width=16)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv", "pixelcnn"], default="mlp", help="networks; conv brings "
        "--batch-size 32 --latent-dim 8; pixelcnn brings --lr 2e-3 --batch-size 64 --latent-dim 16 "
        "--kl-warmup 2 --binarize")
    add("--hidden", type=int, nargs="+", default=[512, 256],
        help="hidden layers of the mlp encoder; the decoder's are these reversed")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--recon", choices=["bce", "mse"], default="bce",
        help="-log p(x|z) of a Bernoulli, or of a Gaussian with variance 1/2")
    add("--binarize", action="store_true", help="draw binary pixels: anew per batch, once for testing")
    add("--beta", type=float, default=1.0, help="weight of the KL divergence")
    add("--kl-warmup", type=float, default=0.0, help="epochs in which this weight rises from 0 to --beta")
    add("--nll", type=int, default=1, help="at the end, importance samples for -log p(x); 1: only -ELBO")
    add("--lr-schedule", choices=["constant", "linear"], default="linear",
        help="linear: the learning rate falls to zero over the run")
    pixelcnn = {"lr": 2e-3, "batch_size": 64, "latent_dim": 16, "kl_warmup": 2.0, "binarize": True}
    args = parse(parser, argv, arch={"conv": {"batch_size": 32, "latent_dim": 8}, "pixelcnn": pixelcnn})
    if args.arch == "pixelcnn" and args.recon != "bce":
        parser.error("--arch pixelcnn draws binary pixels: --recon bce only")
    return args


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees, of rows read like a text, the pixels before its own; "B" its own too."""

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
        self.reach = 3 + layers  # how many rows and columns away the farthest pixel lies that is seen

    def logits(self, x, context):
        h = self.first(2 * x - 1) + context
        for layer in self.layers:
            h = h + layer(h.relu())
        return self.last(h.relu())

    def forward(self, z, x=None):
        return self.draw(z) if x is None else self.logits(x, self.context(z))

    def draw(self, z):
        """Binary images (B, 1, H, W) as logits of 0 and 1, pixel by pixel, each from a window around it."""
        context, r = self.context(z), self.reach
        x = torch.zeros_like(context[:, :1])
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                top, left = max(0, i - r), max(0, j - r)
                seen = (..., slice(top, i + 1), slice(left, j + r + 1))
                logits = self.logits(x[seen], context[seen])[:, 0, i - top, j - left]
                x[:, 0, i, j] = torch.bernoulli(logits.sigmoid())
        return torch.logit(x)


def posterior(output):
    """q(z|x), a Normal of shape (B, latent_dim), from the encoder's output (B, 2 latent_dim)."""
    mu, logvar = output.chunk(2, 1)
    return Normal(mu, (logvar / 2).exp(), validate_args=False)


def reconstruction_loss(logits, x, kind):
    """-log p(x|z) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    return ((logits.sigmoid() - x).square() + math.log(math.pi) / 2).flatten(1).sum(1)


def decode(decoder, z, x):
    """Logits of p(x|z), (B, C, H, W); a PixelCNN looks at the pixels of x too."""
    return decoder(z, x) if isinstance(decoder, PixelCNN) else decoder(z)


def train_step(x, beta, args, encoder, decoder, opt):
    """An update of both networks on x (B, C, H, W); returns detached scalars for the CSV."""
    # Encoder and decoder: minimise -log p(x|z) + beta KL(q(z|x) || p(z))
    q, p = posterior(encoder(x)), Normal(0.0, 1.0)
    loss_recon = reconstruction_loss(decode(decoder, q.rsample(), x), x, args.recon).mean()
    loss_kl = kl_divergence(q, p).sum(1).mean()
    loss = loss_recon + beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {"loss": loss.detach(), "loss_recon": loss_recon.detach(), "loss_kl": loss_kl.detach()}


@torch.no_grad()
def evaluate(data, args, encoder, decoder, k):
    """-ELBO and its two terms on the test set, in nats per image; with k > 1 samples of each z -log p(x) too.

    With w = p(x|z) p(z) / q(z|x), z ~ q(z|x): -ELBO is the mean of -log w; -log p(x) about -log of the mean
    of w, from above and the closer the more samples (Burda et al. 2016, arXiv 1509.00519)."""
    encoder.eval(), decoder.eval()
    torch.manual_seed(args.seed)
    p, parts = Normal(0.0, 1.0), []
    for x, _ in data.test_batches(args.binarize):
        q, recon, log_w = posterior(encoder(x)), [], []
        for z in (q.sample() for _ in range(k)):
            recon.append(reconstruction_loss(decode(decoder, z, x), x, args.recon))
            log_w.append((p.log_prob(z) - q.log_prob(z)).sum(1) - recon[-1])
        recon, kl = torch.stack(recon).mean(0), kl_divergence(q, p).sum(1)
        parts.append(torch.stack([recon + kl, recon, kl, math.log(k) - torch.stack(log_w).logsumexp(0)]))
    encoder.train(), decoder.train()
    names = ["test_neg_elbo", "test_recon", "test_kl"] + ["test_nll"] * (k > 1)
    return dict(zip(names, torch.cat(parts, 1).mean(1).tolist()))


def sample(decoder, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim); a PixelCNN draws binary ones."""
    return predict(decoder, z).sigmoid()


def main(args):
    data = load_data(args)
    c, h, w = data.shape
    if args.arch == "pixelcnn" and c != 1:
        fail("--arch pixelcnn draws binary pixels: grey images only")
    torch.manual_seed(args.seed)
    norm = args.norm == "batch"
    if args.arch == "mlp":
        encoder = nn.Sequential(nn.Flatten(), mlp([c * h * w, *args.hidden, 2 * args.latent_dim], norm))
        decoder = mlp_decoder(data.shape, args.hidden[::-1], args.latent_dim, norm)
    else:
        encoder = conv_encoder(data.shape, args.width, 2 * args.latent_dim, norm)
        network = PixelCNN if args.arch == "pixelcnn" else conv_decoder
        decoder = network(data.shape, args.width, args.latent_dim, norm)
    encoder, decoder = to_device(encoder, args.device), to_device(decoder, args.device)
    opt = make_optimizer(args, nn.ModuleList([encoder, decoder]), args.lr)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)
    x_fixed = next(data.test_batches(args.binarize))[0][:32]
    networks = {"encoder": encoder, "decoder": decoder}
    log = Log(args, data, networks)
    parts = {**networks, "opt": opt, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate:
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(decoder, z))
        return networks
    classifier = load_classifier(args, data) if args.score else None

    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # a resumed run draws what this one would
        log.start_epoch(epoch)
        for x, _ in data.batches(args.batch_size, args.translate):
            if args.lr_schedule == "linear":
                opt.param_groups[0]["lr"] = args.lr * (1 - log.step / (args.epochs * log.steps_per_epoch))
            x = torch.bernoulli(x) if args.binarize else x
            warmup = args.kl_warmup * log.steps_per_epoch
            beta = args.beta * min(1, log.step / warmup if warmup else 1)
            log.add(train_step(x, beta, args, encoder, decoder, opt))
        x_fake = sample(decoder, z_fixed)
        save_grid(args, "samples", x_fake)
        save_grid(args, "progress", log.progress(x_fake), 10)
        z_walk = interpolate(z_fixed[:16], z_fixed.roll(-1, 0)[:16])
        save_grid(args, "interpolation", sample(decoder, z_walk), 6)
        mu = posterior(predict(encoder, x_fixed)).mean
        pairs = torch.stack([x_fixed, sample(decoder, mu)], 1)
        save_grid(args, "reconstructions", pairs.flatten(0, 1))
        if args.latent_dim == 2:
            ticks = torch.special.ndtri((torch.arange(20) + 0.5) / 20)  # equally probable under N(0, I)
            plane = torch.cartesian_prod(-ticks, ticks).flip(1).to(args.device)  # row by row: (400, 2)
            save_grid(args, "manifold", sample(decoder, plane), 20)
            codes = [posterior(predict(encoder, x)).mean for x, _ in data.test_batches(args.binarize)]
            save_grid(args, "latent", scatter(torch.cat(codes), data.y_test, data.classes)[None] / 255)
        z = traverse(mu[0], mu)
        save_grid(args, "traversal", sample(decoder, z), 10)
        scores = evaluate(data, args, encoder, decoder, args.nll if epoch == args.epochs else 1)
        if args.score:
            n = 1_000 if args.arch == "pixelcnn" else 10_000  # pixel by pixel, 10,000 would take minutes
            z = torch.randn(n, args.latent_dim, device=args.device)
            scores |= score(classifier, data, sample(decoder, z))
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks


if __name__ == "__main__":
    main(parse_args())

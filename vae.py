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
    loss_kl    = KL(q(z|x) || N(0, I))

--arch pixelcnn is the PixelVAE (Gulrajani, Kumar, Ahmed, Ali Taiga, Visin, Vazquez, Courville: PixelVAE:
a latent variable model for natural images, 2017, arXiv 1611.05013): a pixel depends on z and on the
pixels before it, p(x|z) = prod_i p(x_i | x_1 ... x_i-1, z).

Differences from the paper:
- two hidden layers of 512 and 256 units (the paper: one of 500), ReLU (tanh), batch norm (none), 20
  latent dimensions, Adam (Adagrad) with a learning rate that falls to zero, batches of 128 (100); --arch
  conv has the encoder and decoder of vaegan.py, twice as wide, and 8 latent dimensions;
- grey levels in [0, 1] count as Bernoulli means unless --binarize draws pixels from them;
- no weight decay (the paper: a N(0, I) prior on the weights);
- PixelVAE: masked convolutions with residual connections, 16 channels, one layer of z (the paper:
  larger, gated too, several layers of z). Drawing pixel by pixel is slow: --score takes 1,000 samples of
  it, whose fd lies higher than that of 10,000.

    python vae.py --epochs 10
    python vae.py --latent-dim 2 --epochs 20

Files: vae.csv, vae_samples.png, vae_progress.png, vae_reconstructions.png, vae_interpolation.png,
vae_traversal.png (--latent-dim 2: vae_manifold.png and vae_latent.png instead), vae.pt. Columns of the
CSV: epoch, step, seconds (of training), then in nats, as means over the rows' intervals, loss,
loss_recon, loss_kl and on an epoch's last row the test set's test_neg_elbo (-ELBO, with beta = 1),
test_recon, test_kl; on the last row of all, with --nll, test_nll.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from common import (
    Run, conv_decoder, conv_encoder, fail, interpolate, kl_divergence, load_data, make_optimizer,
    mlp_decoder, mlp_encoder, number, parse, predict, reparameterize, save_png, shared_flags, show,
    traverse,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=128, opt="adam", lr=3e-3, latent_dim=20, width=16,
        lr_schedule="linear",
    )  # fmt: skip
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv", "pixelcnn"], default="mlp",
        help="kind of networks; conv brings --lr 2e-3 --batch-size 64 --latent-dim 8; pixelcnn, the "
        "PixelVAE, --lr 2e-3 --batch-size 64 --latent-dim 16 --kl-warmup 2 --binarize")  # fmt: skip
    add("--hidden", type=number(int, 1), nargs="+", default=[512, 256], help="hidden layers of the mlp")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--recon", choices=["bce", "mse"], default="bce",
        help="-log p(x|z) of a Bernoulli, or of a Gaussian with variance 1/2")  # fmt: skip
    add("--binarize", action="store_true", help="draw binary pixels: anew per batch, once for testing")
    add("--beta", type=number(float, 0), default=1.0, help="weight of the KL divergence")
    add("--kl-warmup", type=number(float, 0), default=0.0, metavar="EPOCHS",
        help="let the KL divergence's weight rise from 0 to --beta over the first epochs")  # fmt: skip
    add("--nll", type=number(int, 0), default=0, metavar="K",
        help="at the end, estimate -log p(x) of the test set from K importance samples")  # fmt: skip
    conv = {"lr": 2e-3, "batch_size": 64, "latent_dim": 8}
    pixelcnn = {"lr": 2e-3, "batch_size": 64, "latent_dim": 16, "kl_warmup": 2.0, "binarize": True}
    args = parse(parser, arch={"conv": conv, "pixelcnn": pixelcnn})
    if args.arch == "pixelcnn" and args.recon != "bce":
        fail("--arch pixelcnn draws binary pixels: --recon bce only")
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
    """The decoder of a PixelVAE: z (B, latent_dim) and x (B, 1, H, W) -> logits (B, 1, H, W).

    Each pixel's logit depends on z and on the pixels of x before it: above, and left in its row.
    Without x it draws binary images.
    """

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
        return self.sample(z) if x is None else self.logits(x, self.context(z))

    def sample(self, z):
        """Binary images (B, 1, H, W), drawn pixel by pixel."""
        context, r = self.context(z), self.reach
        x = torch.zeros_like(context[:, :1])
        _, _, height, width = x.shape
        for i in range(height):
            show(f"drawing {len(z)} images: {100 * i // height}%")
            for j in range(width):
                top, left = max(0, i - r), max(0, j - r)
                seen = (..., slice(top, i + 1), slice(left, j + r + 1))
                logits = self.logits(x[seen], context[seen])[:, 0, i - top, j - left]
                x[:, 0, i, j] = torch.bernoulli(logits.sigmoid())
        show("")
        return x


def reconstruction_loss(logits, x, kind):
    """-log p(x|z) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    return ((logits.sigmoid() - x).square() + math.log(math.pi) / 2).flatten(1).sum(1)


def decode(decoder, z, x):
    """Logits of p(x|z), (B, C, H, W); a PixelCNN looks at the pixels of x too."""
    return decoder(z, x) if isinstance(decoder, PixelCNN) else decoder(z)


def elbo_terms(x, args, encoder, decoder):
    """The two terms of -ELBO with one z per image, each (B,)."""
    mu, logvar = encoder(x).chunk(2, 1)  # (B, latent_dim) each
    logits = decode(decoder, reparameterize(mu, logvar), x)
    return reconstruction_loss(logits, x, args.recon), kl_divergence(mu, logvar)


def train_step(x, beta, args, encoder, decoder, opt):
    """One update on x (B, C, H, W); returns detached scalars for the CSV."""
    # Encoder and decoder: minimise -log p(x|z) + beta KL(q(z|x) || p(z))
    loss_recon, loss_kl = (term.mean() for term in elbo_terms(x, args, encoder, decoder))
    loss = loss_recon + beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {"loss": loss.detach(), "loss_recon": loss_recon.detach(), "loss_kl": loss_kl.detach()}


def nll_terms(x, args, encoder, decoder):
    """-log p(x), estimated from args.nll importance samples of each z: (B,).

    -log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x): Burda et al. 2016, arXiv 1509.00519. At
    K = 1 it is -ELBO on average; it falls with K towards the truth.
    """
    mu, logvar = encoder(x).chunk(2, 1)
    p, q = Normal(0.0, 1.0), Normal(mu, (logvar / 2).exp())
    log_w = []  # log p(x|z) + log p(z) - log q(z|x), (B,) each
    for _ in range(args.nll):
        z = q.sample()
        log_p = -reconstruction_loss(decode(decoder, z, x), x, args.recon)
        log_w.append(log_p + (p.log_prob(z) - q.log_prob(z)).sum(1))
    return (math.log(args.nll) - torch.stack(log_w).logsumexp(0),)


@torch.no_grad()
def evaluate(terms, data, args, encoder, decoder):
    """Means of elbo_terms() or nll_terms() over the test set, in nats per image.

    With --binarize the binary test images are the same for every run; the noise depends on --seed.
    """
    encoder.eval(), decoder.eval()
    torch.manual_seed(args.seed)
    batches = data.test_batches(args.binarize)
    parts = [torch.stack(terms(x, args, encoder, decoder)) for x, _ in batches]
    encoder.train(), decoder.train()
    return torch.cat(parts, 1).mean(1).tolist()


def sample(decoder, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim); a PixelCNN draws binary ones."""
    x = predict(decoder, z)
    return x if isinstance(decoder, PixelCNN) else x.sigmoid()


def encode(encoder, x):
    """The means of q(z|x), (N, latent_dim)."""
    return predict(encoder, x).chunk(2, 1)[0]


def plane(n, device):
    """n x n codes of two dimensions, equally probable under N(0, I), row by row: (n^2, 2)."""
    ticks = torch.special.ndtri((torch.arange(n) + 0.5) / n)
    return torch.cartesian_prod(-ticks, ticks).flip(1).to(device)


def scatter(codes, labels, n_classes, size=600):
    """Codes (N, 2) as dots on white, from -4 to 4 both ways, coloured by class: (3, size, size + 25).

    The bar on the right has the classes' colours, class 0 at the top.
    """
    codes, labels = codes.cpu(), labels.cpu()
    angle = torch.arange(n_classes)[:, None] * 2 * math.pi / n_classes
    colors = 0.5 + 0.45 * torch.cos(angle + torch.tensor([0, 2, 4]) * math.pi / 3)  # (n_classes, 3)
    colors[1::2] *= 0.6  # neighbours differ in brightness too
    image = torch.ones(3, size, size)
    column, row = ((codes * torch.tensor([1, -1]) / 4 + 1) / 2 * (size - 3)).long().clamp(0, size - 3).T
    for i in range(9):  # dots of 3 x 3 pixels
        image[:, row + i // 3, column + i % 3] = colors[labels].T
    bar = colors[torch.arange(size) * n_classes // size].T[:, :, None].expand(3, size, 20)
    return torch.cat([image, torch.ones(3, size, 5), bar], 2)


def main(args):
    data = load_data(args)
    if args.arch == "pixelcnn" and data.shape[0] != 1:
        fail("--arch pixelcnn draws binary pixels: grey images only")
    norm = args.norm == "batch"
    if args.arch == "mlp":
        encoder = mlp_encoder(data.shape, args.hidden, 2 * args.latent_dim, norm)
        decoder = mlp_decoder(data.shape, args.hidden[::-1], args.latent_dim, norm)
    else:
        encoder = conv_encoder(data.shape, args.width, 2 * args.latent_dim, norm)
        network = PixelCNN if args.arch == "pixelcnn" else conv_decoder
        decoder = network(data.shape, args.width, args.latent_dim, norm)
    encoder, decoder = encoder.to(args.device), decoder.to(args.device)
    opt = make_optimizer(args, nn.ModuleList([encoder, decoder]), args.lr)
    run = Run(args, data, {"encoder": encoder, "decoder": decoder}, {"both": opt})

    def draw(n):
        n = min(n, 1000) if args.arch == "pixelcnn" else n  # pixel by pixel, 10,000 would take minutes
        return sample(decoder, torch.randn(n, args.latent_dim, device=args.device)), None

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)
    x_fixed, _ = data.examples(32)
    x_fixed = torch.bernoulli(x_fixed.cpu()).to(args.device) if args.binarize else x_fixed
    warmup = args.kl_warmup * run.steps_per_epoch

    for epoch in run.epochs():
        for x, _ in data.batches(args.batch_size, args.translate):
            x = torch.bernoulli(x) if args.binarize else x
            beta = args.beta * min(1, run.step / warmup if warmup else 1)
            run.log(train_step(x, beta, args, encoder, decoder, opt))
        x_fake, mu = sample(decoder, z_fixed), encode(encoder, x_fixed)
        x_recon = sample(decoder, mu)
        run.save_grid("samples", x_fake)
        run.save_grid("reconstructions", torch.stack([x_fixed, x_recon], 1).flatten(0, 1))
        run.save_grid("interpolation", sample(decoder, interpolate(mu[:16], mu.roll(-1, 0)[:16])), 6)
        if args.latent_dim == 2:
            codes = torch.cat([encode(encoder, x) for x, _ in data.test_batches(args.binarize)])
            run.save_grid("manifold", sample(decoder, plane(20, args.device)), 20)
            save_png(run.path("_latent.png"), scatter(codes, data.y_test, len(data.classes)))
        else:
            run.save_grid("traversal", sample(decoder, traverse(mu[0], mu)), 10)
        recon, kl = evaluate(elbo_terms, data, args, encoder, decoder)
        test = {"test_neg_elbo": recon + kl, "test_recon": recon, "test_kl": kl}
        run.end_epoch(x_fake, draw, test)
    if args.nll:
        (nll,) = evaluate(nll_terms, data, args, encoder, decoder)
        run.add_to_last_row({"test_nll": nll})


if __name__ == "__main__":
    main(parse_args())

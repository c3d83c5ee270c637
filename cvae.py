# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""CVAE: a conditional variational autoencoder.

Sohn, Lee, Yan: Learning structured output representation using deep conditional generative models, 2015,
NeurIPS; with images given labels, not labels given images: Kingma et al. 2014, arXiv 1406.5298, model
M2.

The VAE of vae.py whose encoder and decoder are told the label y, as a one-hot vector: q(z|x, y) = N(mu,
sigma^2) and p(x|z, y). z need not say what digit it is: it is left with the style. Per image and
averaged over the batch:

    loss       = loss_recon + beta * loss_kl                    (beta = 1: -ELBO >= -log p(x|y))
    loss_recon = -log p(x|z, y), z = mu + sigma * epsilon
    loss_kl    = KL(q(z|x, y) || N(0, I))

Differences from the papers:
- z has a fixed prior N(0, I) (Sohn et al.: a prior that depends on the condition);
- one label per image, always given (Kingma et al. infer missing ones);
- the label joins the pixels and z in the first layers alone; the encoder sees it scaled to about the
  norm of an image (--arch mlp) or as one more channel of 0 or 1 per class (--arch conv);
- layers, optimiser and learning rate of vae.py; 8 latent dimensions: with 20, more of a digit's identity
  stays in z, and fewer samples carry the label asked for;
- grey levels in [0, 1] count as Bernoulli means unless --binarize draws pixels from them.

    python cvae.py --epochs 10
    python cvae.py --arch conv --epochs 10

Files: cvae.csv, cvae_samples.png (a row per class, the same z down a column), cvae_progress.png,
cvae_reconstructions.png, cvae_interpolation.png, cvae_traversal.png, cvae.pt. Columns of the CSV: epoch,
step, seconds (of training), then in nats, as means over the rows' intervals, loss, loss_recon, loss_kl
and on an epoch's last row the test set's test_neg_elbo (-ELBO, with beta = 1), test_recon, test_kl; on
the last row of all, with --nll, test_nll.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from common import (
    Conditional, Run, conv_decoder, conv_encoder, kl_divergence, load_data, make_optimizer, mlp_decoder,
    mlp_encoder, number, one_hot, parse, predict, reparameterize, shared_flags, traverse, walks,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=128, opt="adam", lr=3e-3, latent_dim=8, width=16,
        lr_schedule="linear",
    )  # fmt: skip
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv brings --lr 2e-3 --batch-size 64")  # fmt: skip
    add("--hidden", type=number(int, 1), nargs="+", default=[512, 256], help="hidden layers of the mlp")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--recon", choices=["bce", "mse"], default="bce",
        help="-log p(x|z, y) of a Bernoulli, or of a Gaussian with variance 1/2")  # fmt: skip
    add("--binarize", action="store_true", help="draw binary pixels: anew per batch, once for testing")
    add("--beta", type=number(float, 0), default=1.0, help="weight of the KL divergence")
    add("--nll", type=number(int, 0), default=0, metavar="K",
        help="at the end, estimate -log p(x|y) of the test set from K importance samples")  # fmt: skip
    return parse(parser, arch={"conv": {"lr": 2e-3, "batch_size": 64}})


def reconstruction_loss(logits, x, kind):
    """-log p(x|z, y) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    return ((logits.sigmoid() - x).square() + math.log(math.pi) / 2).flatten(1).sum(1)


def elbo_terms(x, y, args, encoder, decoder):
    """The two terms of -ELBO with one z per image, each (B,)."""
    mu, logvar = encoder(x, y).chunk(2, 1)  # (B, latent_dim) each
    logits = decoder(reparameterize(mu, logvar), y)
    return reconstruction_loss(logits, x, args.recon), kl_divergence(mu, logvar)


def train_step(x, y, args, encoder, decoder, opt):
    """One update on x (B, C, H, W) and y (B, n_classes); returns detached scalars for the CSV."""
    # Encoder and decoder: minimise -log p(x|z, y) + beta KL(q(z|x, y) || p(z))
    loss_recon, loss_kl = (term.mean() for term in elbo_terms(x, y, args, encoder, decoder))
    loss = loss_recon + args.beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {"loss": loss.detach(), "loss_recon": loss_recon.detach(), "loss_kl": loss_kl.detach()}


def nll_terms(x, y, args, encoder, decoder):
    """-log p(x|y), estimated from args.nll importance samples of each z: (B,).

    -log 1/K sum_k p(x|z_k, y) p(z_k) / q(z_k|x, y), z_k ~ q(z|x, y): Burda et al. 2016, arXiv
    1509.00519. At K = 1 it is -ELBO on average; it falls with K towards the truth.
    """
    mu, logvar = encoder(x, y).chunk(2, 1)
    p, q = Normal(0.0, 1.0), Normal(mu, (logvar / 2).exp())
    log_w = []  # log p(x|z, y) + log p(z) - log q(z|x, y), (B,) each
    for _ in range(args.nll):
        z = q.sample()
        log_p = -reconstruction_loss(decoder(z, y), x, args.recon)
        log_w.append(log_p + (p.log_prob(z) - q.log_prob(z)).sum(1))
    return (math.log(args.nll) - torch.stack(log_w).logsumexp(0),)


@torch.no_grad()
def evaluate(terms, data, args, encoder, decoder):
    """Means of elbo_terms() or nll_terms() over the test set, in nats per image.

    With --binarize the binary test images are the same for every run; the noise depends on --seed.
    """
    encoder.eval(), decoder.eval()
    torch.manual_seed(args.seed)
    parts = []
    for x, labels in data.test_batches(args.binarize):
        y = one_hot(labels, len(data.classes))
        parts.append(torch.stack(terms(x, y, args, encoder, decoder)))
    encoder.train(), decoder.train()
    return torch.cat(parts, 1).mean(1).tolist()


def sample(decoder, z, y):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(decoder, z, y).sigmoid()


def encode(encoder, x, y):
    """The means of q(z|x, y), (N, latent_dim)."""
    return predict(encoder, x, y).chunk(2, 1)[0]


def main(args):
    data = load_data(args)
    norm, n_classes, (channels, height, width) = args.norm == "batch", len(data.classes), data.shape
    if args.arch == "mlp":
        shape_e = (channels * height * width + n_classes,)
        encoder = mlp_encoder(shape_e, args.hidden, 2 * args.latent_dim, norm)
        decoder = mlp_decoder(data.shape, args.hidden[::-1], args.latent_dim + n_classes, norm)
    else:
        encoder = conv_encoder(
            (channels + n_classes, height, width), args.width, 2 * args.latent_dim, norm
        )
        decoder = conv_decoder(data.shape, args.width, args.latent_dim + n_classes, norm)
    encoder, decoder = Conditional(encoder, args.arch == "mlp"), Conditional(decoder)
    encoder, decoder = encoder.to(args.device), decoder.to(args.device)
    opt = make_optimizer(args, nn.ModuleList([encoder, decoder]), args.lr)
    run = Run(args, data, {"encoder": encoder, "decoder": decoder}, {"both": opt})

    def draw(n):
        labels = torch.randint(n_classes, (n,), device=args.device)
        z = torch.randn(n, args.latent_dim, device=args.device)
        return sample(decoder, z, one_hot(labels, n_classes)), labels

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(10, args.latent_dim).to(args.device)
    y_every = torch.eye(n_classes, device=args.device)
    x_fixed, labels = data.examples(32)
    x_fixed = torch.bernoulli(x_fixed.cpu()).to(args.device) if args.binarize else x_fixed
    y_fixed = one_hot(labels, n_classes)

    for epoch in run.epochs():
        for x, labels in data.batches(args.batch_size, args.translate):
            x = torch.bernoulli(x) if args.binarize else x
            run.log(train_step(x, one_hot(labels, n_classes), args, encoder, decoder, opt))
        x_fake = sample(decoder, z_fixed.repeat(n_classes, 1), y_every.repeat_interleave(10, 0))
        mu = encode(encoder, x_fixed, y_fixed)
        x_recon = sample(decoder, mu, y_fixed)
        run.save_grid("samples", x_fake, 10)  # a row per class, the same z down a column
        run.save_grid("reconstructions", torch.stack([x_fixed, x_recon], 1).flatten(0, 1))
        run.save_grid("interpolation", sample(decoder, *walks(z_fixed, y_every)), 6)
        z = traverse(mu[0], mu)
        run.save_grid("traversal", sample(decoder, z, y_fixed[:1].expand(len(z), -1)), 10)
        recon, kl = evaluate(elbo_terms, data, args, encoder, decoder)
        test = {"test_neg_elbo": recon + kl, "test_recon": recon, "test_kl": kl}
        run.end_epoch(x_fake[:100:11], draw, test)
    if args.nll:
        (nll,) = evaluate(nll_terms, data, args, encoder, decoder)
        run.add_to_last_row({"test_nll": nll})


if __name__ == "__main__":
    main(parse_args())

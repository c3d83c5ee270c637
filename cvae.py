# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""CVAE: a conditional variational autoencoder.

Sohn, Lee, Yan: Learning structured output representation using deep conditional generative models, 2015,
NeurIPS; with images given labels, not labels given images: Kingma et al. 2014, arXiv 1406.5298, model M2.

The VAE of vae.py whose encoder and decoder are told the label y, one-hot: q(z|x, y) = N(mu, sigma^2) and
p(x|z, y). z is left with the style. Per image and averaged over the batch:

    loss       = loss_recon + beta * loss_kl                    (beta = 1: -ELBO >= -log p(x|y))
    loss_recon = -log p(x|z, y), z = mu + sigma * epsilon
    loss_kl    = KL(q(z|x, y) || p(z)), p(z) = N(0, I)

Differences from the papers, beside what common.py says:
- z has a fixed prior (Sohn et al.: one that depends on the condition); the label of an image is always given
  (Kingma et al. infer missing ones), and joins the first layers alone, see common.Conditional;
- layers, batches, learning rate and pixels as in vae.py; 8 latent dimensions: with 20, more of a digit's
  identity stays in z, and fewer samples carry the label asked for.

    python cvae.py --epochs 10
    python cvae.py --arch conv

Files: cvae.csv, cvae.pt, cvae_*.png: samples (a row per class, the same z down a column), progress,
interpolation (eight walks from z to z, eight from label to label), reconstructions, traversal. Columns of
cvae.csv beside epoch, step, seconds of training, in nats:

    loss, loss_recon, loss_kl              means since the row before
    test_neg_elbo, test_recon, test_kl     of the test set, with beta = 1, after each epoch
    fd ...                                 after each epoch, with --score: see README.md
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import (
    load_data,
    Conditional, conv_decoder, conv_encoder, mlp,
    interpolate, make_optimizer, predict, to_device, traverse,
    load_classifier, score,
    Log, load_checkpoint, save_checkpoint, save_grid, save_images,
    parse, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=128, lr=3e-3, latent_dim=8)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp", help="kind of networks")
    add("--hidden", type=int, nargs="+", default=[512, 256], help="mlp layers; the decoder's are reversed")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--binarize", action="store_true", help="draw binary pixels: anew per batch, once for testing")
    add("--beta", type=float, default=1.0, help="weight of the KL divergence")
    add("--lr-schedule", choices=["constant", "linear"], default="linear", help="linear: it falls to zero")
    return parse(parser, argv, {"--arch conv": "--batch-size 32"})


def posterior(output):
    """q(z|x, y), a Normal of shape (B, latent_dim), from the encoder's output (B, 2 latent_dim)."""
    mu, logvar = output.chunk(2, 1)
    return Normal(mu, (logvar / 2).exp(), validate_args=False)


def reconstruction_loss(logits, x):
    """-log p(x|z, y) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return loss.flatten(1).sum(1)


def train_step(x, y, args, encoder, decoder, opt):
    """An update of both networks on x (B, C, H, W) and y (B, n_classes); returns detached scalars."""
    # Encoder and decoder: minimise -log p(x|z, y) + beta KL(q(z|x, y) || p(z))
    q, p = posterior(encoder(x, y)), Normal(0.0, 1.0)
    logits = decoder(q.rsample(), y)
    loss_recon = reconstruction_loss(logits, x).mean()
    loss_kl = kl_divergence(q, p).sum(1).mean()
    loss = loss_recon + args.beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    losses = {"loss": loss, "loss_recon": loss_recon, "loss_kl": loss_kl}
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def evaluate(data, args, encoder, decoder):
    """-ELBO and its two terms on the test set, in nats per image, with one sample of each z."""
    training = encoder.training
    encoder.eval()
    decoder.eval()
    torch.manual_seed(args.seed)
    p = Normal(0.0, 1.0)
    batches = []
    for x, labels in data.test_batches(args.binarize):
        y = F.one_hot(labels, len(data.classes)).float()
        q = posterior(encoder(x, y))
        recon = reconstruction_loss(decoder(q.sample(), y), x)
        kl = kl_divergence(q, p).sum(1)
        batches.append(torch.stack([recon + kl, recon, kl]))
    encoder.train(training)
    decoder.train(training)
    names = ["test_neg_elbo", "test_recon", "test_kl"]
    return dict(zip(names, torch.cat(batches, 1).mean(1).tolist()))


def sample(decoder, z, y):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(decoder, z, y).sigmoid()


def main(args):
    data = load_data(args, conditional=True)
    c, h, w = data.shape
    n_classes = len(data.classes)
    torch.manual_seed(args.seed)
    norm = args.norm == "batch"
    if args.arch == "mlp":
        encoder = mlp([c * h * w + n_classes, *args.hidden, 2 * args.latent_dim], norm)
        decoder = mlp([args.latent_dim + n_classes, *reversed(args.hidden), c * h * w], norm)
        decoder = nn.Sequential(decoder, nn.Unflatten(1, data.shape))
    else:
        encoder = conv_encoder((c + n_classes, h, w), args.width, 2 * args.latent_dim, norm)
        decoder = conv_decoder(data.shape, args.width, args.latent_dim + n_classes, norm)
    encoder, decoder = Conditional(encoder, args.arch == "mlp"), Conditional(decoder)
    networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    to_device(networks, args.device)
    opt = make_optimizer(args, networks, args.lr)
    z_fixed = torch.randn(10, args.latent_dim).repeat(n_classes, 1).to(args.device)
    x_fixed = next(data.test_batches(args.binarize))[0][:32]
    one_hot = torch.eye(n_classes, device=args.device)
    y_fixed = one_hot.repeat_interleave(10, 0)
    log = Log(args, data, networks)
    parts = {**networks, "opt": opt, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate is not None:
        labels = torch.arange(args.generate, device=args.device) % n_classes
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(decoder, z, one_hot[labels]), [data.classes[y] for y in labels])
        return networks.eval()
    classifier = load_classifier(args, data) if args.score else None

    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # a resumed run draws what this one would
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            if args.lr_schedule == "linear":
                opt.param_groups[0]["lr"] = args.lr * (1 - log.step / (args.epochs * log.steps_per_epoch))
            if args.binarize:
                x = torch.bernoulli(x)
            log.add(train_step(x, one_hot[labels], args, encoder, decoder, opt))
        samples = sample(decoder, z_fixed, y_fixed)
        save_grid(args, "samples", samples, 10)  # a row per class, the same z down a column
        save_grid(args, "progress", log.progress(samples[::11]), min(10, n_classes))  # its diagonal
        z, y = z_fixed[:9], one_hot.repeat(9, 1)[:9]  # eight walks from z to z, eight from label to label
        z_walk = interpolate(torch.cat([z[:8], z[:8]]), torch.cat([z[1:], z[:8]]))
        y_walk = interpolate(torch.cat([y[:8], y[:8]]), torch.cat([y[:8], y[1:]]))
        save_grid(args, "interpolation", sample(decoder, z_walk, y_walk), 6)
        y = one_hot[data.y_test[:32]]
        mu = posterior(predict(encoder, x_fixed, y)).mean
        pairs = torch.stack([x_fixed, sample(decoder, mu, y)], 1)
        save_grid(args, "reconstructions", pairs.flatten(0, 1))
        z = traverse(mu[0], mu)
        save_grid(args, "traversal", sample(decoder, z, y[:1].expand(len(z), -1)), 10)
        scores = evaluate(data, args, encoder, decoder)
        if args.score:
            labels = torch.arange(10_000, device=args.device) % n_classes
            z = torch.randn(10_000, args.latent_dim, device=args.device)
            scores |= score(classifier, data, sample(decoder, z, one_hot[labels]), labels)
        log.end_epoch(scores)
        save_checkpoint(args, data, parts, epoch)
    return networks.eval()


if __name__ == "__main__":
    main(parse_args())

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

Differences from the papers, beside what common.py says of all scripts:
- z has a fixed prior (Sohn et al.: one that depends on the condition); the label of an image is always given
  (Kingma et al. infer missing ones), and joins the first layers alone, see common.Conditional;
- layers, batches, learning rate and pixels as in vae.py; 8 latent dimensions: with 20, more of a digit's
  identity stays in z, and fewer samples carry the label asked for.

    python cvae.py --epochs 10
    python cvae.py --arch conv

Files: cvae.csv, cvae_samples.png (a row per class, the same z down a column), cvae_progress.png,
cvae_interpolation.png (eight walks from z to z, eight from label to label), cvae_reconstructions.png,
cvae_traversal.png, cvae.pt. Columns of the CSV: epoch, step, seconds of training; in nats, as means since the
row before, loss, loss_recon, loss_kl; at an epoch's end the test set's test_neg_elbo (with beta = 1),
test_recon, test_kl; the scores of --score.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from common import (
    Conditional, conv_decoder, conv_encoder, mlp, mlp_decoder,
    interpolate, make_optimizer, predict, to_device, traverse,
    Log, load_checkpoint, load_classifier, load_data, parse, save_checkpoint, save_grid, save_images, score,
    shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=128, lr=3e-3, latent_dim=8, width=16)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp", help="networks; conv brings --batch-size 32")
    add("--hidden", type=int, nargs="+", default=[512, 256],
        help="hidden layers of the mlp encoder; the decoder's are these reversed")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--binarize", action="store_true", help="draw binary pixels: anew per batch, once for testing")
    add("--beta", type=float, default=1.0, help="weight of the KL divergence")
    add("--lr-schedule", choices=["constant", "linear"], default="linear",
        help="linear: the learning rate falls to zero over the run")
    return parse(parser, argv, arch={"conv": {"batch_size": 32}})


def posterior(output):
    """q(z|x, y), a Normal of shape (B, latent_dim), from the encoder's output (B, 2 latent_dim)."""
    mu, logvar = output.chunk(2, 1)
    return Normal(mu, (logvar / 2).exp(), validate_args=False)


def reconstruction_loss(logits, x):
    """-log p(x|z, y) per image, summed over the pixels: (B, C, H, W) twice -> (B,)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def train_step(x, y, args, encoder, decoder, opt):
    """An update of both networks on x (B, C, H, W) and y (B, n_classes); returns detached scalars."""
    # Encoder and decoder: minimise -log p(x|z, y) + beta KL(q(z|x, y) || p(z))
    q, p = posterior(encoder(x, y)), Normal(0.0, 1.0)
    loss_recon = reconstruction_loss(decoder(q.rsample(), y), x).mean()
    loss_kl = kl_divergence(q, p).sum(1).mean()
    loss = loss_recon + args.beta * loss_kl
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {"loss": loss.detach(), "loss_recon": loss_recon.detach(), "loss_kl": loss_kl.detach()}


@torch.no_grad()
def evaluate(data, args, encoder, decoder):
    """-ELBO and its two terms on the test set, in nats per image, with one sample of each z."""
    encoder.eval(), decoder.eval()
    torch.manual_seed(args.seed)
    p, parts = Normal(0.0, 1.0), []
    for x, labels in data.test_batches(args.binarize):
        y = F.one_hot(labels, len(data.classes)).float()
        q = posterior(encoder(x, y))
        recon, kl = reconstruction_loss(decoder(q.sample(), y), x), kl_divergence(q, p).sum(1)
        parts.append(torch.stack([recon + kl, recon, kl]))
    encoder.train(), decoder.train()
    names = ["test_neg_elbo", "test_recon", "test_kl"]
    return dict(zip(names, torch.cat(parts, 1).mean(1).tolist()))


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
        decoder = mlp_decoder(data.shape, args.hidden[::-1], args.latent_dim + n_classes, norm)
    else:
        encoder = conv_encoder((c + n_classes, h, w), args.width, 2 * args.latent_dim, norm)
        decoder = conv_decoder(data.shape, args.width, args.latent_dim + n_classes, norm)
    encoder, decoder = Conditional(encoder, args.arch == "mlp"), Conditional(decoder)
    encoder, decoder = to_device(encoder, args.device), to_device(decoder, args.device)
    opt = make_optimizer(args, nn.ModuleList([encoder, decoder]), args.lr)
    z_fixed = torch.randn(10, args.latent_dim).repeat(n_classes, 1).to(args.device)
    x_fixed = next(data.test_batches(args.binarize))[0][:32]
    one_hot = torch.eye(n_classes, device=args.device)
    y_fixed = one_hot.repeat_interleave(10, 0)
    networks = {"encoder": encoder, "decoder": decoder}
    log = Log(args, data, networks)
    parts = {**networks, "opt": opt, "log": log}
    done = load_checkpoint(args, data, parts)
    if args.generate:
        labels = torch.arange(args.generate, device=args.device) % n_classes
        z = torch.randn(args.generate, args.latent_dim, device=args.device)
        save_images(args, sample(decoder, z, one_hot[labels]), [data.classes[y] for y in labels])
        return networks
    classifier = load_classifier(args, data) if args.score else None

    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed + 1_000_000 * epoch)  # a resumed run draws what this one would
        log.start_epoch(epoch)
        for x, labels in data.batches(args.batch_size, args.translate):
            if args.lr_schedule == "linear":
                opt.param_groups[0]["lr"] = args.lr * (1 - log.step / (args.epochs * log.steps_per_epoch))
            x = torch.bernoulli(x) if args.binarize else x
            log.add(train_step(x, one_hot[labels], args, encoder, decoder, opt))
        x_fake = sample(decoder, z_fixed, y_fixed)
        save_grid(args, "samples", x_fake, 10)  # a row per class, the same z down a column
        save_grid(args, "progress", log.progress(x_fake[::11]), min(10, n_classes))
        a = 11 * torch.arange(8) % len(z_fixed)  # eight walks to the next z, eight to the next label
        a, b = torch.cat([a, a]), torch.cat([a + 1, (a + 10) % len(z_fixed)])
        z_walk, y_walk = interpolate(z_fixed[a], z_fixed[b]), interpolate(y_fixed[a], y_fixed[b])
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
    return networks


if __name__ == "__main__":
    main(parse_args())

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""CVAE: a conditional variational autoencoder.

Sohn, Lee, Yan: Learning structured output representation using deep conditional generative models, 2015,
NeurIPS. They complete an image from a part of it. For images from labels, see model M2 of Kingma, Rezende,
Mohamed, Welling: Semi-supervised learning with deep generative models, 2014, arXiv 1406.5298.

This is the VAE of vae.py, but both networks also get the label y as a one-hot vector. The encoder gives
q(z|x, y) = N(mu, sigma^2), and the decoder gives p(x|z, y). As y tells the class, z need only tell the style.
Together they minimise the loss of an image, averaged over the batch:

    loss       = loss_recon + beta * loss_kl                    (beta = 1: -ELBO >= -log p(x|y))
    loss_recon = -log p(x|z, y), z = mu + sigma * epsilon, epsilon ~ N(0, I)
    loss_kl    = KL(q(z|x, y) || p(z)), p(z) = N(0, I)

    Differences        here                                     in the papers or their code
      condition        the label                                Sohn et al.: a part of the image
      labels           always given                             Kingma et al.: missing ones are inferred
      prior of z       N(0, I)                                  Sohn et al.: depends on the condition
      z                8 dimensions; with more, z also tells    Kingma et al.: 50 dimensions
                       the class, and y matters less
      layers           512, 256; ReLU, batch norm               Kingma et al.: 500, 500; softplus
      label            joined to z as numbers; to x as channels Kingma et al.: joined as numbers, not scaled
                       (conv) or as pixels with a digit's norm
      optimiser        Adam at 3e-3, decaying to zero           Kingma et al.: Adam at 3e-4
      batches          of 128 images                            Kingma et al.: of 1000
      pixels           grey, as Bernoulli means; or --binarize  Kingma et al.: binary, drawn for each batch
      --arch conv      the networks of vaegan.py                fully connected networks

    python cvae.py --epochs 10
    python cvae.py --arch conv

A run writes cvae.csv, cvae.pt and cvae_*.png: samples (a row per class, the same z down a column), progress,
interpolation (eight rows from z to z, eight from label to label), reconstructions and traversal. The CSV's
columns are epoch, step, seconds (of training) and

    loss, loss_recon, loss_kl              means since the previous row, in nats per image
    test_neg_elbo, test_recon, test_kl     the same for the test set, with beta = 1, after each epoch
    fd, ...                                scores after each epoch, only with --score: see README.md
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
    nonnegative_float, parse, positive_int, shared_flags,
)


def parse_args(argv=None):
    parser = shared_flags(__file__, __doc__, batch_size=128, lr=3e-3, latent_dim=8)
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv changes the defaults to --batch-size 32")
    add("--hidden", type=positive_int, nargs="+", default=[512, 256],
        help="mlp: sizes of the encoder's hidden layers; reversed in the decoder")
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation in both networks")
    add("--binarize", action="store_true", help="draw binary pixels; in training, again for each batch")
    add("--beta", type=nonnegative_float, default=1.0, help="weight of the KL divergence")
    add("--lr-schedule", choices=["constant", "linear"], default="linear", help="linear: --lr falls to zero")
    if parser.parse_known_args(argv)[0].arch == "conv":
        parser.set_defaults(batch_size=32)
    return parse(parser, argv)


def make_networks(args, shape, n_classes):
    """Encoder: x (B, C, H, W), y (B, n_classes) -> mu and logvar (B, 2 latent_dim); decoder:
    z (B, latent_dim), y (B, n_classes) -> logits (B, C, H, W)."""
    c, h, w = shape
    norm = args.norm == "batch"
    if args.arch == "mlp":
        encoder = mlp([c * h * w + n_classes, *args.hidden, 2 * args.latent_dim], norm)
        decoder = mlp([args.latent_dim + n_classes, *reversed(args.hidden), c * h * w], norm)
        decoder = nn.Sequential(decoder, nn.Unflatten(1, shape))
    else:
        encoder = conv_encoder((c + n_classes, h, w), args.width, 2 * args.latent_dim, norm)
        decoder = conv_decoder(shape, args.width, args.latent_dim + n_classes, norm)
    return Conditional(encoder, flat=args.arch == "mlp"), Conditional(decoder)


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
    q, prior = posterior(encoder(x, y)), Normal(0.0, 1.0)
    logits = decoder(q.rsample(), y)
    loss_recon = reconstruction_loss(logits, x).mean()
    loss_kl = kl_divergence(q, prior).sum(1).mean()
    loss = loss_recon + args.beta * loss_kl
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
        y = F.one_hot(labels, len(data.classes)).float()
        q = posterior(encoder(x, y))
        recon = reconstruction_loss(decoder(q.sample(), y), x)
        kl = kl_divergence(q, prior).sum(1)
        batches.append(torch.stack([recon + kl, recon, kl]))
    encoder.train(training)
    decoder.train(training)
    return dict(zip(["test_neg_elbo", "test_recon", "test_kl"], torch.cat(batches, 1).mean(1).tolist()))


def sample(decoder, z, y):
    """Samples (N, C, H, W) in [0, 1] from z (N, latent_dim) and y (N, n_classes)."""
    return predict(decoder, z, y).sigmoid()


def main(args):
    data = load_data(args, conditional=True)
    n_classes = len(data.classes)
    torch.manual_seed(args.seed)
    encoder, decoder = make_networks(args, data.shape, n_classes)
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
        folders = [data.classes[label] for label in labels]
        save_images(args, sample(decoder, z, one_hot[labels]), folders)
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
            losses = train_step(x, one_hot[labels], args, encoder, decoder, opt)
            step += 1
            log.add(step, losses)
        samples = sample(decoder, z_fixed, y_fixed)
        # Samples: a row per class. Progress gets sample i of row i, so one sample of each class
        save_grid(args, "samples", samples, 10)
        save_grid(args, "progress", log.progress(samples[::11]), min(10, n_classes))
        z, y = z_fixed[:9], one_hot[torch.arange(9) % n_classes]
        # Eight walks from z to z with the label fixed, then eight from label to label with z fixed
        z_walk = torch.cat([interpolate(z[:8], z[1:]), z[:8].repeat_interleave(6, 0)])
        y_walk = torch.cat([y[:8].repeat_interleave(6, 0), interpolate(y[:8], y[1:])])
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

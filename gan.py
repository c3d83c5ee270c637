# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""GAN: a generative adversarial network.

Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville, Bengio: Generative adversarial
networks, 2014, arXiv 1406.2661.

A generator turns noise z ~ N(0, I) into an image x_fake = generator(z); a discriminator gives the
probability D that an image is a real one. Averaged over the batch:

    loss_d = -log D(x) - log(1 - D(x_fake))
    loss_g = -log D(x_fake)            (--loss nonsaturating)
    loss_g = log(1 - D(x_fake))        (--loss minimax: little gradient while the discriminator wins)

    discriminator  minimises  loss_d, --d-steps times
    generator      minimises  loss_g

Differences from the paper:
- --arch mlp has the layers of widespread re-implementations: a generator of 256, 512 and 1024 units with
  batch norm and ReLU, a discriminator of 1024, 512 and 256 with leaky ReLU (the paper: maxout units and
  dropout in the discriminator). --arch conv has the decoder of vae.py, twice as
  wide as vaegan.py's, and vaegan.py's discriminator;
- He's initialisation and a centred input in the discriminator;
- Adam at 1e-3 for the generator and 1.5e-4 for the discriminator, with --arch conv at 2e-3 and 3e-4
  (momentum), batches of 16 (100), noise from N(0, I) in 100 or 10 dimensions (uniform noise);
- the generator maximises log D, which the paper recommends; its game in theory is --loss minimax;
- the generator learns from the images that the discriminator has just seen (the paper: from new noise);
- the pictures come from an exponential moving average of the generator's weights (--ema).

    python gan.py --epochs 1
    python gan.py --opt adam --lr 2e-4 --lr-d 1 --batch-size 64 --dropout 0.3 --epochs 50

Files: gan.csv, gan_samples.png, gan_progress.png, gan_interpolation.png, gan.pt. Columns of the CSV, as
means over the rows' intervals, of the last discriminator step of each generator step: epoch, step,
seconds (of training), loss_d (2 log 2 = 1.39 at chance), loss_g (log 2 = 0.69 at chance, -0.69 with
--loss minimax), d_real = D(x), d_fake = D(x_fake).
"""

import torch
import torch.nn.functional as F

from common import (
    Run, average, conv_decoder, conv_discriminator, interpolate, load_data, make_optimizer, mlp_decoder,
    mlp_discriminator, number, parse, predict, shared_flags, update_average,
)  # fmt: skip


def parse_args():
    parser = shared_flags(
        __file__, __doc__, epochs=10, batch_size=16, opt="adam", lr=1e-3, latent_dim=100, width=16,
        lr_schedule="constant",
    )  # fmt: skip
    add = parser.add_argument
    add("--arch", choices=["mlp", "conv"], default="mlp",
        help="kind of networks; conv brings --lr 2e-3 --latent-dim 10")  # fmt: skip
    add("--hidden", type=number(int, 1), nargs="+", default=[256, 512, 1024],
        help="hidden layers of the mlp generator; the discriminator's are these reversed")  # fmt: skip
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="in the mlp discriminator")
    add("--loss", choices=["nonsaturating", "minimax"], default="nonsaturating",
        help="what the generator minimises")  # fmt: skip
    add("--d-steps", type=number(int, 1), default=1, help="discriminator steps per generator step")
    add("--lr-d", type=number(float, 1e-9), default=0.15, metavar="FACTOR",
        help="the discriminator's learning rate, as a factor of --lr")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), default=0.999,
        help="decay of the averaged weights that draw the pictures; 0: no averaging")  # fmt: skip
    args = parse(parser, arch={"conv": {"lr": 2e-3, "latent_dim": 10}})
    args.images_per_step = args.batch_size * args.d_steps
    return args


def discriminator_loss(d_real, d_fake):
    """-log D(x) - log(1 - D(x_fake)) from logits (B,), averaged."""
    return (F.softplus(-d_real) + F.softplus(d_fake)).mean()


def generator_loss(d_fake, kind):
    """-log D(x_fake), or with kind "minimax" log(1 - D(x_fake)), from logits (B,), averaged."""
    return (-F.softplus(d_fake) if kind == "minimax" else F.softplus(-d_fake)).mean()


def train_step(x, args, generator, discriminator, opt_g, opt_d):
    """One update of the generator on x (d_steps * B, C, H, W); returns detached scalars for the CSV."""
    # (1) Discriminator, d_steps times: maximise log D(x) + log(1 - D(x_fake))
    for x_real in x.split(args.batch_size):
        z = torch.randn(len(x_real), args.latent_dim, device=x.device)
        x_fake = generator(z).sigmoid()
        d_real, d_fake = discriminator(torch.cat([x_real, x_fake.detach()])).chunk(2)
        loss_d = discriminator_loss(d_real, d_fake)
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

    # (2) Generator: maximise log D(x_fake), or minimise log(1 - D(x_fake)), of the last x_fake
    loss_g = generator_loss(discriminator(x_fake), args.loss)
    opt_g.zero_grad()
    loss_g.backward(inputs=list(generator.parameters()))
    opt_g.step()

    losses = {
        "loss_d": loss_d, "loss_g": loss_g, "d_real": d_real.sigmoid().mean(),
        "d_fake": d_fake.sigmoid().mean(),
    }  # fmt: skip
    return {name: loss.detach() for name, loss in losses.items()}


def sample(generator, z):
    """Images (N, C, H, W) in [0, 1] from z (N, latent_dim)."""
    return predict(generator, z).sigmoid()


def main(args):
    data = load_data(args)
    if args.arch == "mlp":
        generator = mlp_decoder(data.shape, args.hidden, args.latent_dim)
        discriminator = mlp_discriminator(data.shape, args.hidden[::-1], args.dropout)
    else:
        generator = conv_decoder(data.shape, args.width, args.latent_dim)
        discriminator = conv_discriminator(data.shape, args.width, hidden=4 * args.width)
    generator, discriminator = generator.to(args.device), discriminator.to(args.device)
    generator_ema = average(generator)
    opt_g = make_optimizer(args, generator, args.lr, betas=(0.5, 0.999))
    opt_d = make_optimizer(args, discriminator, args.lr * args.lr_d, betas=(0.5, 0.999))
    networks = {"generator": generator, "discriminator": discriminator, "generator_ema": generator_ema}
    run = Run(args, data, networks, {"generator": opt_g, "discriminator": opt_d})

    def draw(n):
        return sample(generator_ema, torch.randn(n, args.latent_dim, device=args.device)), None

    if args.generate:
        return run.generate(draw)
    z_fixed = torch.randn(64, args.latent_dim).to(args.device)

    for epoch in run.epochs():
        for x, _ in data.batches(args.images_per_step, args.translate):
            losses = train_step(x, args, generator, discriminator, opt_g, opt_d)
            update_average(generator_ema, generator, args.ema, run.step)
            run.log(losses)
        x_fake = sample(generator_ema, z_fixed)
        run.save_grid("samples", x_fake)
        z_path = interpolate(z_fixed[:16], z_fixed.roll(-1, 0)[:16])
        run.save_grid("interpolation", sample(generator_ema, z_path), 6)
        run.end_epoch(x_fake, draw)


if __name__ == "__main__":
    main(parse_args())

"""python test_smoke.py tests the scripts beside it, python test_smoke.py gan one of them; it needs no data.

Each script runs on a few tiny pictures. What it computed and wrote is computed once more from the formulas;
a failure says what differs. Layers and rates are tested in the whole collection only."""

import copy
import csv
import functools
import importlib
import inspect
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common

HERE = Path(__file__).resolve().parent
ALL = ["vae", "cvae", "gan", "cgan", "dcgan", "wgan", "vaegan"]
NAMED = [name for name in ALL if {name, f"{name}.py"} & {*sys.argv[1:]}]
SCRIPTS = NAMED or [name for name in ALL if (HERE / f"{name}.py").exists()]
FIRST = SCRIPTS[0]
DOCUMENTS = [*HERE.glob("README.md"), *sorted((HERE / "assets").glob("*.md"))]
TEXT = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
whole = unittest.skipUnless(SCRIPTS == ALL and TEXT, "of the whole collection")
KINDS = [*ALL, "vae --arch conv", "vae --arch pixelcnn", "cvae --arch conv", "gan --arch conv",
         "cgan --arch conv", "wgan --arch mlp"]
TINY = "--device=cpu --data-dir=none --epochs 3 --batch-size 2 --log-every 2 --width 4"
TEMP = tempfile.TemporaryDirectory()
PICTURES, COLOUR = Path(TEMP.name, "pictures"), Path(TEMP.name, "colour")


def make_pictures(folder, classes, n, size=(8, 8), mode="L"):
    for i in range(n):
        path = Path(folder, classes[i % len(classes)], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        bands = [Image.effect_noise(size, 50) for _ in mode]
        Image.merge(mode, bands).save(path)


make_pictures(PICTURES / "train", "ab", 27)
make_pictures(PICTURES / "test", "ab", 34)
make_pictures(COLOUR, "abc", 30, mode="RGB")


def read_images(paths):
    return torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255


@functools.cache
def pictures(part):
    """Images (N, 1, 8, 8), one-hot labels (N, 2) of the folder "train" or "test"."""
    paths = sorted(Path(PICTURES, part).glob("*/*.png"))
    y = torch.tensor([path.parent.name == "b" for path in paths]).long()
    return read_images(paths), F.one_hot(y, 2).float()


def listen(function, calls, during=lambda call: None):
    """`function`; `calls` keeps the arguments by name, "result", networks "before" and "after"."""
    def listening(*args, **kwargs):
        call = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
        networks = {name: x for name, x in call.items() if isinstance(x, nn.Module)}
        call["before"] = copy.deepcopy(networks)
        call["result"] = function(*args, **kwargs)
        during(call)
        calls.append({**call, "after": copy.deepcopy(networks)})
        return call["result"]
    return listening


class Run:
    """A run of a script in this process: what it did, and what it left in `out`."""

    def __init__(self, command, out, during=lambda run, call: None):
        self.command, self.out = command, Path(out)
        self.script, *flags = command.split()
        self.module, self.labels = importlib.import_module(self.script), self.script in ("cvae", "cgan")
        self.steps, self.drawn, self.scored, self.grids = [], [], [], {}
        flags = [f"--data={PICTURES}", f"--out={out}", *TINY.split(), *flags]
        self.args = self.module.parse_args(flags)
        score = mock.create_autospec(common.score, return_value={"fd": 7})
        patches = {
            "train_step": listen(self.module.train_step, self.steps, lambda call: during(self, call)),
            "sample": listen(self.module.sample, self.drawn), "score": listen(score, self.scored),
            "save_grid": self.save_grid, "load_classifier": mock.Mock(),
        }
        with mock.patch.multiple(self.module, **patches), redirect_stdout(io.StringIO()):
            self.networks = self.module.main(self.args)
        lines = (self.out / f"{self.script}.csv").read_text().splitlines()
        self.rows = list(csv.DictReader(lines))
        pngs = {path.name: path.read_bytes() for path in self.out.glob(f"{self.script}_*.png")}
        self.files = [{**row, "seconds": ""} for row in self.rows], pngs

    def save_grid(self, args, what, images, *columns):
        self.grids.setdefault(what, []).append(images)
        common.save_grid(args, what, images, *columns)

    def call(self, what, epoch=-1):
        """The call of sample() whose result is the grid `what`."""
        x = self.grids[what][epoch]
        x = x[1::2] if what == "reconstructions" else x
        alike = [call for call in self.drawn if torch.equal(call["result"], x)]
        assert alike, f"{what} does not show what sample() returned"
        return alike[-1]

    def network(self, *names):
        """The network of one of these names, averaged over training if it is."""
        names = [f"{name}_ema" for name in names] + [*names]
        return next(self.networks[name] for name in names if name in self.networks)

    def draw(self, call):
        """What the network that draws makes of the noise and the labels of a call."""
        inputs = [call[key] for key in "zy" if key in call]
        logits = self.network("generator", "decoder")(*inputs).detach()
        return logits.tanh() / 2 + 0.5 if self.script == "dcgan" else logits.sigmoid()


@functools.cache
def tiny_run(command):
    return Run(command, tempfile.mkdtemp(dir=TEMP.name))


def load(command):
    script, *flags = command.split()
    module = importlib.import_module(script)
    return module, module.parse_args(["--device=cpu", "--data-dir=none", "--data=synthetic", *flags])


def trained(call):
    """The names of the networks whose weights each optimiser of a train_step() has."""
    found = {name: [] for name in call if name.startswith("opt")}
    for name, names in found.items():
        ids = {id(weight) for group in call[name].param_groups for weight in group["params"]}
        names += [key for key in call["before"] if ids & {*map(id, call[key].parameters())}]
    return found


def each(*commands):
    """Runs a test once for each of these commands whose script is to be tested."""
    def decorate(test):
        @functools.wraps(test)
        def tests(self):
            for command in commands:
                if command.split()[0] in SCRIPTS:
                    with self.subTest(command):
                        torch.set_default_dtype(torch.float)
                        test(self, tiny_run(command))
        return tests
    return decorate


class Case(unittest.TestCase):
    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(tempfile.mkdtemp(dir=TEMP.name))
        torch.manual_seed(0)

    def same(self, got, expected, words, tolerance=1e-4):
        got, expected = (torch.as_tensor(x).double() for x in (got, expected))
        self.assertEqual(got.shape, expected.shape, words)
        by = (got - expected).abs() / expected.abs().clamp(min=1)
        if not (by <= tolerance).all():
            self.fail(f"{words}: differs by up to {by.max():.2g}")

    def find(self, x, part, words):
        """The indices of images x in the folder "train" or "test"."""
        found = [[image.equal(x_i) for image in pictures(part)[0]] for x_i in x]
        if not all(map(any, found)):
            self.fail(f"{words}: an image is none of the {part} set, in [0, 1]")
        return [row.index(True) for row in found]

    def check_fails(self, cases, status=2, run=functools.partial(Run, out=".")):
        for command, message in cases.items():
            if command.split()[0] in SCRIPTS:
                with self.subTest(command), redirect_stderr(io.StringIO()) as error:
                    with self.assertRaises(SystemExit) as end, redirect_stdout(io.StringIO()):
                        run(command)
                    self.assertIn(message, error.getvalue())
                    self.assertEqual(end.exception.code, status)


class Formulas(Case):
    """Two steps of plain gradient descent: by train_step(), and by the formulas here."""

    def descend(self, loss, *networks):
        """A step of the networks' weights that minimises `loss`, averaged over the batch."""
        weights = [weight for network in networks for weight in network.parameters()]
        gradients = torch.autograd.grad(loss.mean(), weights, retain_graph=True)
        for weight, gradient in zip(weights, gradients):
            weight.data -= 0.01 * gradient

    def encode(self, encoder, x, *y):
        mu, logvar = encoder(x, *y).chunk(2, 1)
        kl = (mu.square() + logvar.exp() - 1 - logvar).sum(1) / 2
        return mu + (logvar / 2).exp() * torch.randn_like(mu), kl

    def elbo(self, args, x, y, encoder, decoder):
        z, kl = self.encode(encoder, x, *y)
        logits = decoder(z, x) if args.arch == "pixelcnn" else decoder(z, *y)
        p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
        if "mse" in vars(args).values():
            p = torch.distributions.Normal(logits.sigmoid(), 0.5**0.5)
        return -p.log_prob(x).flatten(1).sum(1), kl

    def vae(self, args, x, y, encoder, decoder):
        recon, kl = self.elbo(args, x, y, encoder, decoder)
        loss = recon + args.beta * kl
        self.descend(loss, encoder, decoder)
        return {"loss": loss, "loss_recon": recon, "loss_kl": kl}

    cvae = vae

    def gan(self, args, x, y, generator, discriminator):
        logits = generator(torch.randn(2, args.latent_dim), *y)
        x_fake = logits.sigmoid()
        if args.name == "dcgan":  # both kinds of images in [-1, 1]
            x, x_fake = 2 * x - 1, logits.tanh()
        real, fake = discriminator(x, *y), discriminator(x_fake, *y)
        loss_d = -F.logsigmoid(real) - F.logsigmoid(-fake)
        self.descend(loss_d, discriminator)
        again = discriminator(x_fake, *y)
        loss_g = -F.logsigmoid(again)
        if "minimax" in vars(args).values():
            loss_g = F.logsigmoid(-again)
        self.descend(loss_g, generator)
        return {"loss_d": loss_d, "loss_g": loss_g, "d_real": real.sigmoid(), "d_fake": fake.sigmoid()}

    cgan = dcgan = gan

    def wgan(self, args, x, y, generator, critic):
        x_fake = generator(torch.randn(2, args.latent_dim)).sigmoid()
        wasserstein, penalty = critic(x) - critic(x_fake), torch.zeros(())
        if args.lipschitz == "gp":
            epsilon = torch.rand(2, 1, 1, 1)
            x_hat = (epsilon * x_fake + (1 - epsilon) * x).detach().requires_grad_()
            total = critic(x_hat).sum()
            (slope,) = torch.autograd.grad(total, x_hat, create_graph=True)
            penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square()
        loss_d = -wasserstein + args.gp_weight * penalty
        self.descend(loss_d, critic)
        for weight in critic.parameters() if args.lipschitz == "clip" else ():
            weight.data.clamp_(-args.clip, args.clip)
        loss_g = -critic(x_fake)
        self.descend(loss_g, generator)
        return {"loss_d": loss_d, "loss_g": loss_g, "wasserstein": wasserstein, "penalty": penalty}

    def vaegan(self, args, x, y, encoder, decoder, discriminator):
        z, kl = self.encode(encoder, x)
        both = decoder(torch.cat([z, torch.randn_like(z)])).sigmoid()
        x_recon, x_fake = both.chunk(2)
        real, recon, fake = (discriminator(images) for images in (x, x_recon, x_fake))
        features = discriminator.features(x) - discriminator.features(x_recon)
        features = features.square().flatten(1).sum(1) / 2
        loss_d = -F.logsigmoid(real) - F.logsigmoid(-recon) - F.logsigmoid(-fake)
        loss_g = args.gamma * features - F.logsigmoid(recon) - F.logsigmoid(fake)
        self.descend(args.beta * kl + features, encoder)
        self.descend(loss_g, decoder)
        self.descend(loss_d, discriminator)
        losses = {"loss_d": loss_d, "loss_g": loss_g, "loss_kl": kl, "loss_features": features}
        return {**losses, "d_real": real.sigmoid(), "d_recon": recon.sigmoid(), "d_fake": fake.sigmoid()}

    @each(*KINDS, "vae --beta 3 --recon mse", "cvae --beta 3", "gan --loss minimax",
          "wgan --gp-weight 3", "wgan --lipschitz clip --clip 0.02", "vaegan --gamma 0.1 --beta 3")
    def test_updates(self, run):
        given = run.steps[0]
        ours, theirs = (nn.ModuleDict(copy.deepcopy(given["before"])).double() for _ in range(2))
        for module in (*ours.modules(), *theirs.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        args = copy.copy(run.args)
        args.beta = given.get("beta", vars(args).get("beta"))  # which may rise
        opts = trained(given)
        for opt, names in opts.items():
            if len(opts) > 1 and len(names) > 1:
                self.fail(f"{opt} updates {' and '.join(names)}, it should update one of them")
            opts[opt] = torch.optim.SGD(nn.ModuleList(theirs[name] for name in names).parameters(), 0.01)
        given = {**given, **theirs, **opts, "x": given["x"].double()}
        given = {name: given[name] for name in inspect.signature(run.module.train_step).parameters}
        y = [given["y"]] if run.labels else []
        torch.set_default_dtype(torch.double)
        self.addCleanup(torch.set_default_dtype, torch.float)
        for update in ("first", "second"):
            old = copy.deepcopy(theirs)
            torch.manual_seed(0)
            expected = getattr(self, run.script)(args, given["x"], y, *ours.values())
            torch.manual_seed(0)
            losses = run.module.train_step(**given)
            self.compare(f"{run.script}.py, {update} update", losses, expected, old, theirs, ours)

    def compare(self, words, losses, expected, old, theirs, ours):
        for name in losses.keys() & expected.keys():
            value, total = losses[name], expected[name].sum().item()
            mean = expected[name].mean().item()
            self.assertFalse(value.requires_grad, f"{words}: {name} is not detached")
            if mean != total and abs(value.item() - total) < 1e-6:
                self.fail(f"{words}: {name} is a sum over the batch, not a mean")
            self.same(value, mean, f"{words}: {name} is not the formula's")
        for name in theirs:
            new, by_hand, was = (list(n[name].parameters()) for n in (theirs, ours, old))
            if all(map(torch.equal, new, was)):
                self.fail(f"{words}: the {name} does not learn")
            by = max((a - b).abs().max().item() for a, b in zip(new, by_hand))
            if by > 1e-9:
                hint = "; the first is right: zero_grad()?" if "second" in words else ""
                self.fail(f"{words} of the {name}: its weights are not the formula's, by {by:.2g}{hint}")

    @each("vae --recon mse --beta 3", "cvae", "vae --binarize --latent-dim 2", "cvae --binarize")
    def test_negative_elbo_of_the_test_set(self, run):
        for x in (run.steps[-1]["x"], run.grids["reconstructions"][-1][::2]):
            self.assertEqual(len(x.unique()) == 2, run.args.binarize, "binary pixels?")
        (x, y), networks = pictures("test"), run.networks.values()
        data, parts = mock.Mock(classes="ab"), [slice(30), slice(30, 34)]
        data.test_batches.return_value = [(x[i], y[i].argmax(1)) for i in parts]
        torch.manual_seed(run.args.seed)
        found = run.module.evaluate(data, run.args, *networks)
        torch.manual_seed(run.args.seed)
        terms = [self.elbo(run.args, x[i], [y[i]] if run.labels else [], *networks) for i in parts]
        recon, kl = (torch.cat(term).mean().detach() for term in zip(*terms))
        expected = {"test_neg_elbo": recon + kl, "test_recon": recon, "test_kl": kl}
        for name, value in expected.items():
            self.same(found[name], value, f"{name}, with beta 1, of all images")


class Training(Case):
    @each(*ALL)
    def test_an_epoch_is_the_training_set(self, run):
        other = tiny_run(f"{run.script} --epochs 1 --seed 1 --score")
        steps = [run.steps[i : i + 13] for i in (0, 13, 26)] + [other.steps]
        x = [torch.cat([step["x"] for step in part]) for part in steps]
        orders = [self.find(images, "train", "training") for images in x]
        self.assertEqual([len({*order}) for order in orders], [26] * 4, "an image comes twice")
        self.assertEqual(len({(*order,) for order in orders}), 4, "the order is the same again")
        self.assertFalse(run.call("samples")["z"].equal(other.call("samples")["z"]), "--seed")
        if run.labels:
            y = torch.cat([step["y"] for step in steps[0]])
            self.same(y, pictures("train")[1][orders[0]], "labels are not those of the images")
        training = [network.training for step in run.steps for network in step["after"].values()]
        self.assertTrue(all(training), "a network trains in eval mode")

    @each(*KINDS, "gan --d-steps 3")
    def test_csv_has_the_means_of_the_losses(self, run):
        losses, done = [step["result"] for step in run.steps], 0
        for row in run.rows:
            part, done = losses[done : int(row["step"])], int(row["step"])
            self.assertTrue(int(row["epoch"]) == math.ceil(done / 13) and len(part) < 3)
            for name in losses[0]:
                values = [step[name] for step in part if name in step]
                cell = [float(row[name])] if row[name] else []
                mean = [torch.stack(values).mean()] if values else []
                self.same(cell, mean, f"CSV: {name} is not the mean")
            for name in {*row} - {*losses[0], "epoch", "step", "seconds"}:
                self.assertEqual(row[name] > "", done % 13 == 0, f"{name}: at epochs' ends")

    @whole
    @each(*ALL, "wgan --lipschitz clip", "vae --lr-schedule constant", "gan --lr-d 2 --ema 0.5")
    def test_optimizers_and_schedules(self, run):
        betas = {"vae": (0.9, 0.999), "cvae": (0.9, 0.999), "wgan": (0.0, 0.9)}
        betas |= {"vaegan": (0.5, 0.999), "wgan --lipschitz clip": None}  # RMSprop
        lr, lr_d = run.args.lr, vars(run.args).get("lr_d")
        rates = {"opt": lr if "constant" in run.command else lr / 39}
        for name in trained(run.steps[-1]):
            (group,) = run.steps[-1][name].param_groups
            rate = lr * lr_d if name == "opt_d" else rates.get(name, lr)
            self.same(group["lr"], rate, f"learning rate of {name}", 1e-9)
            known = betas.get(run.command, betas.get(run.script, (0.0, 0.99)))
            self.assertEqual(group.get("betas"), known)
        if run.command == "vae":
            rising = [step["beta"] for step in tiny_run("vae --beta 4 --kl-warmup 2").steps]
            self.same(rising, [4 * i / 26 for i in range(26)] + [4.0] * 13, "beta")

    @each("gan --d-steps 3 --ema 0.4", "cgan", "dcgan", "wgan", "wgan --n-critic 2", "vaegan", "gan --ema 0")
    def test_turns_and_averaged_weights(self, run):
        n = vars(run.args).get("d_steps", vars(run.args).get("n_critic", 1))
        turns = [i for i, step in enumerate(run.steps) if "loss_g" in step["result"]]
        self.assertEqual(turns, [i for i in range(39) if i % 13 % n == 0], "generator's turns")
        for name in {"encoder", "decoder", "generator"} & {*run.networks}:
            average = copy.deepcopy(run.steps[0]["before"][name].state_dict())
            for i, step in enumerate(run.steps):
                decay = min(run.args.ema, (1 + i // n) / (10 + i // n)) if i in turns else 1
                for key, value in step["after"][name].state_dict().items():
                    average[key] = decay * average[key] + (1 - decay) * value
                old, new = (step[when][name].parameters() for when in ("before", "after"))
                moved = not all(map(torch.equal, old, new))
                self.assertEqual(moved, i in turns, f"the {name} moves at step {i}")
            for key, value in run.networks[f"{name}_ema"].state_dict().items():
                if value.is_floating_point():
                    self.same(value, average[key], f"{key} of {name}_ema is not the average")


class Pictures(Case):
    @each(*KINDS, "vae --latent-dim 2")
    def test_pictures_show_what_the_saved_network_draws(self, run):
        for name, grids in run.grids.items():
            (image,) = read_images([run.out / f"{run.script}_{name}.png"])
            cells = image[:1, 2:, 2:].unfold(1, 8, 10).unfold(2, 8, 10).flatten(0, 2)
            self.same(cells[: len(grids[-1]), None], grids[-1], f"grey levels of {name}.png", 1 / 255)
        known = {"samples", "interpolation", "reconstructions", "traversal", "manifold"}
        for name in known & {*run.grids} if "pixelcnn" not in run.command else ():
            call = run.call(name)
            self.same(call["result"], run.draw(call), f"{name}: not drawn by the saved network")
        row = slice(0, 20, 11) if run.labels else slice(10)
        rows = torch.cat([images[row] for images in run.grids["samples"]])
        self.same(run.grids["progress"][-1], rows, "progress: each epoch's samples", 1 / 255)

    @each(*ALL)
    def test_sample_is_in_eval_mode(self, run):
        call, network = run.call("samples", 0), copy.deepcopy(run.network("generator", "decoder"))
        inputs = [call[key] for key in "zy" if key in call]
        both = run.module.sample(network.train(), *inputs)
        few = run.module.sample(network, *[part[:3] for part in inputs])
        self.same(few, both[:3], "a sample depends on the others of its batch: eval mode?")
        self.assertFalse(both.requires_grad, "sample() keeps gradients")
        self.assertTrue(all(m.training for m in network.modules()), "sample() leaves eval mode")
        self.assertTrue(0 <= both.min() and both.max() <= 1, "samples are not in [0, 1]")

    @each(*ALL)
    def test_noise_and_walks(self, run):
        def walks(a, b):
            t = torch.arange(6)[:, None] / 5
            return torch.cat([start + (end - start) * t for start, end in zip(a, b)])
        z, walk = run.call("samples")["z"], run.call("interpolation")
        for epoch in range(3):
            self.same(run.call("samples", epoch)["z"], z, "each epoch draws from other noise", 0)
        if z.mean().abs() + (z.std() - 1).abs() > 0.4:
            self.fail(f"noise of mean {z.mean():.2f} and deviation {z.std():.2f} is not N(0, I)")
        if not run.labels:
            return self.same(walk["z"], walks(z[:16], z[1:17]), "noise of the interpolation")
        y = torch.eye(2)
        self.same(run.call("samples")["y"], y.repeat_interleave(10, 0), "a row per class")
        self.same(z[:10], z[10:], "the same noise down a column")
        y = y.repeat(5, 1)[:9]
        expected = torch.cat([walks(z[:8], z[1:9]), walks(z[:8], z[:8])])
        self.same(walk["z"], expected, "noise of the interpolation")
        expected = torch.cat([walks(y[:8], y[:8]), walks(y[:8], y[1:])])
        self.same(walk["y"], expected, "labels of the interpolation")

    @each("vae", "vae --arch conv", "cvae", "vaegan")
    def test_codes(self, run):
        (x, y), recon = pictures("test"), run.call("reconstructions")
        traversal, shown = run.call("traversal"), run.grids["reconstructions"][-1][::2]
        which = self.find(shown, "test", "reconstructions")
        encoder = run.network("encoder")
        codes = (encoder(x, y) if run.labels else encoder(x)).detach().chunk(2, 1)[0]
        dims = codes[which].var(0).argsort(descending=True)[:10]  # those that vary most
        z = codes[which[:1]].repeat(len(dims), 10, 1)
        for i, dim in enumerate(dims):
            z[i, :, dim] = torch.arange(10) * 6 / 9 - 3
        self.same(recon["z"], codes[which], "reconstructions: z is not the mean of q(z|x)")
        self.same(traversal["z"], z.flatten(0, 1), "traversal: z")
        if run.labels:
            self.same(recon["y"], y[which], "reconstructions: labels")
            self.same(traversal["y"], y[which[:1]].repeat(len(z) * 10, 1), "traversal: labels")
    @each(*[f"{script} --epochs 1 --seed 1 --score" for script in ALL],
          "vae --arch pixelcnn --epochs 1 --score")
    def test_scores_are_of_the_network_that_draws(self, run):
        (scored,), call = run.scored, run.drawn[-1]
        pixelcnn, z = "pixelcnn" in run.command, call["z"]
        self.assertTrue(scored["x"] is call["result"], "what is scored")
        self.assertEqual(len(z), 1_000 if pixelcnn else 10_000)
        self.assertLess(z.mean().abs() + (z.std() - 1).abs(), 0.1, "noise is not N(0, I)")
        self.assertEqual(scored.get("binarize", False), pixelcnn)
        self.assertEqual([row["fd"] for row in run.rows], [""] * 6 + ["7"])
        if not pixelcnn:
            self.same(call["result"], run.draw(call), "scored samples are of another network")
        if run.labels:
            self.same(call["y"], F.one_hot(scored["labels"]), "labels of the scored samples")
            self.same(scored["labels"], torch.arange(10_000) % 2, "labels given to score()")

    @each(*ALL)
    def test_generate(self, run):
        wrong = AssertionError("--generate reads the data")
        with mock.patch("common.load_folder", side_effect=wrong):
            (call,) = Run(f"{run.script} --generate 6", run.out).drawn
            loaded = Run(f"{run.script} --generate 0", run.out).networks
        paths = sorted(run.out.rglob("00*.png"), key=lambda path: path.name)
        if run.labels:
            self.assertEqual("".join(path.parent.name for path in paths), "ababab")
            self.same(call["y"], torch.eye(2).repeat(3, 1), "labels of generated samples")
        self.same(read_images(paths), run.draw(call), "generated PNG files", 0.51 / 255)
        self.assertLess(call["z"].min(), -0.5, "noise of generated samples")
        for key, value in loaded.state_dict().items():
            self.same(value, run.networks.state_dict()[key], f"{key} of the checkpoint", 0)
        self.assertFalse(any(m.training for m in loaded.modules()), "main() returns eval mode")

    @each(*[f"{script} --data {COLOUR} --epochs 1" for script in ALL])
    def test_colour(self, run):
        self.assertEqual(run.grids["samples"][0].shape[1:], (3, 8, 8), "colour")


class Resuming(Case):
    @each(*KINDS)
    def test_resumed_run_ends_like_one_that_was_not_stopped(self, run):
        def stop(stopped, call):
            if len(stopped.steps) == 14:  # in the second epoch
                raise KeyboardInterrupt
        with tempfile.TemporaryDirectory() as out:
            with self.assertRaises(KeyboardInterrupt):
                Run(run.command, out, stop)
            resumed = Run(f"{run.script} --resume", out)
        self.assertEqual(resumed.files, run.files, "a resumed run ends otherwise")
        seconds = [float(row["seconds"]) for row in resumed.rows]
        self.assertEqual(seconds, sorted(seconds), "the seconds begin again")

    def test_bad_input(self):
        Path(f"{FIRST}.pt").write_bytes(b"no checkpoint")
        cases = {"--epochs -1 --dry-run": "argument --epochs: -1 is not in [1, inf)", "--lr nan": "[1e-12",
                 "--translate 1": "not in [0, 1)", "--batch-size 1": "in [2", "--image-size 30": "multiple",
                 "--device meta": "--device", f"--out {FIRST}.pt": "--out", "--resume": "no checkpoint of",
                 "--resume --generate 1": "not allowed with", "--data . --out run": "lies in --data"}
        self.check_fails({f"{FIRST} {flags}": message for flags, message in cases.items()})
        self.assertEqual(os.listdir(), [f"{FIRST}.pt"], "a refused run leaves files")
        Run(f"{FIRST} --epochs 1", "out")
        make_pictures("other", "ac", 40)
        shutil.copy(f"out/{FIRST}.pt", "out/vaegan.pt")
        cases = {"--generate 1 --latent-dim 3": "other networks", "--generate 1 --out .": "train first",
                 "--resume --image-size 12": "another shape, (1, 8, 8)", "--resume --data other": "other classes"}
        self.check_fails({f"{FIRST} --out out {flags}": text for flags, text in cases.items()})
        self.check_fails({"vaegan --generate 1 --out out": "it is of"})

    @each(*ALL)
    def test_what_is_not_finite_ends_a_run_and_is_not_saved(self, run):
        def spoil(spoilt, call):
            if len(spoilt.steps) == 25:  # the last of the second epoch: no loss will tell
                name = next(iter(call["before"]))
                next(call[name].parameters()).data.fill_(math.nan)
        spoilt = functools.partial(Run, out="out", during=spoil)
        self.check_fails({run.script: "is not finite at step 26"}, 1, spoilt)
        path = f"out/{run.script}.pt"
        self.assertEqual(torch.load(path)["epoch"], 1, "weights that are not finite are saved")
        self.assertIn("\n2,24,", Path(f"out/{run.script}.csv").read_text())


class Maths(Case):
    @whole
    def test_layers(self):
        """C8x4: a convolution from 4 to 8 channels; l: leaky ReLU of slope 0.2; D: dropout of 0.3 ..."""
        kinds = {nn.Linear: "L", nn.Conv2d: "C", nn.ConvTranspose2d: "T", nn.BatchNorm1d: "B", nn.ReLU: "R",
                 nn.BatchNorm2d: "B", nn.LeakyReLU: "l", nn.Dropout: "D", nn.Flatten: "F", nn.Unflatten: "U"}
        encoder, decoder = "C4x1 B4 l F L16x64", "L128x8 U B8 R T8x4 B4 R T4x1"
        dcgan = "C4x1 l C8x4 B8 l F L1x32 F"
        table = {
            "vae --hidden 9 7": "F L9x64 B9 R L7x9 B7 R L16x7 L7x8 B7 R L9x7 B9 R L64x9 U",
            "vae --arch conv": f"{encoder} {decoder}",
            "vae --arch conv --norm none": "C4x1 l F L16x64 L128x8 U R T8x4 R T4x1",
            "cvae --arch conv": "C4x3 B4 l F L16x64 L128x10 U B8 R T8x4 B4 R T4x1",
            "gan --hidden 9 7 --dropout 0.3": "L9x8 B9 R L7x9 B7 R L64x7 U F L7x64 l D L9x7 l D L1x9 F",
            "gan --arch conv": f"{decoder} C4x1 l C8x4 l F L16x32 l L1x16 F",
            "cgan --hidden 9 --dropout 0.3": "L9x10 B9 R L64x9 U L9x66 l D L1x9 F",
            "cgan --arch conv": f"L128x10 U B8 R T8x4 B4 R T4x1 C4x3{dcgan[4:]}",
            "dcgan": f"{decoder} {dcgan}", "wgan": f"{decoder} C4x1 l C8x4 l F L64x32 l L1x64 F",
            "wgan --arch mlp --hidden 9 --norm batch": "L9x8 B9 R L64x9 U F L9x64 B9 l L1x9 F",
            "vaegan": f"{encoder} {decoder} C4x1 l C8x4 l F L16x32 l L1x16 F",
        }
        for command, expected in table.items():
            module, args = load(f"{command} --latent-dim 8 --width 4")
            labels, said = [2] if args.name in ("cvae", "cgan") else [], []
            for layer in nn.ModuleList(module.make_networks(args, (1, 8, 8), *labels)).modules():
                rate = getattr(layer, "p", getattr(layer, "negative_slope", 0.2))
                if type(layer) in kinds and rate in (0.2, 0.3):
                    shape = getattr(layer, "weight", torch.ones(())).shape[:2]
                    said.append(kinds[type(layer)] + "x".join(map(str, shape)))
            self.assertEqual(" ".join(said), expected, command)
        for name, weight in tiny_run("dcgan").steps[0]["before"]["generator"].named_parameters():
            if name.endswith("weight"):  # as in the paper's code
                self.same([weight.mean(), weight.std()], [weight.dim() == 1, 0.02], name, 0.015)

    def test_networks(self):
        layer = common.he(nn.Linear(400, 300))
        self.same(layer.weight.std(), (2 / 1.04 / 400) ** 0.5, "he(): weights", 1e-3)
        self.same(layer.bias, torch.zeros(300), "he(): biases", 0)
        features = common.conv_discriminator((1, 16, 16), 4).features
        self.assertNotIsInstance(features[-1], nn.LeakyReLU, "features: before activation")
        joined = common.Conditional(nn.Identity(), flat=True)(torch.zeros(1, 1, 20, 20), torch.eye(4)[:1])
        self.same(joined[0, -4:], [10.0, 0, 0, 0], "a flat label has the norm of a digit")

    @unittest.skipUnless("vae" in SCRIPTS, "of vae.py")
    def test_pixelcnn(self):
        decoder = load("vae")[0].PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval()
        z, x = torch.randn(2, 3), torch.rand(2, 1, 12, 12).round().requires_grad_()
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(decoder(z, x).flatten(1)[:, i].sum(), x)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertTrue((seen < i).all() and bool(len(seen)) == (i > 0), "pixels it sees")
        self.assertFalse(decoder(z, x).equal(decoder(-z, x)), "the PixelCNN ignores z")
        with mock.patch("torch.bernoulli", torch.round):  # each pixel from z and those before it
            drawn = common.predict(decoder, z).sigmoid()
            self.same(drawn, (decoder(z, drawn) > 0).float(), "pixels that it draws")

    def test_scores(self):
        """The features are the pixels; the classes come in unequal shares, 5, 2, 2 and 1, 2, 5."""
        shown, truth = torch.tensor([0] * 5 + [1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
        x, real = torch.rand(9, 1, 1, 3), torch.randint(256, (8, 1, 1, 3), dtype=torch.uint8)
        x[range(9), 0, 0, shown] += 1
        data, asked = common.Data((real, truth), (real, truth), list("abc")), (shown + 1) // 2
        classifier = nn.Sequential(nn.Flatten(), nn.Identity())
        scores = common.score(classifier, data, x, asked)
        f, g = x.flatten(1), real.flatten(1) / 255
        kl = 5 * math.log(5 / 9 * 8) + 2 * math.log(2 / 9 * 4) + 2 * math.log(2 / 9 * 8 / 5)

        def covered(points, centres):
            near = [sorted((c - d).norm() for d in centres)[3] for c in centres]
            inside = [any((p - c).norm() <= r for c, r in zip(centres, near)) for p in points]
            return sum(inside) / len(points)
        expected = {"fd": common.fd(f, g), "classes": 3, "class_kl": kl / 9, "precision": covered(f, g),
                    "recall": covered(g, f), "label_accuracy": (shown == asked).float().mean()}
        for name, value in expected.items():
            self.same(scores[name], value, f"score(): {name}")
        f = torch.randn(100_000, 3)
        g = torch.randn(100_000, 3) * torch.tensor([2.0, 3.0, 1.0]) + 1
        self.assertAlmostEqual(common.fd(f, g), 3 + 1 + 4, delta=0.2)  # means, deviations

    def test_classifier_learns_from_the_training_set(self):
        (x, y), (test, truth) = common.draw_digits(2000, 3), common.draw_digits(500, 4)
        for channels in (1, 3):
            x, test = x[:, :1].expand(-1, channels, -1, -1), test[:, :1].expand(-1, channels, -1, -1)
            data = common.Data((x, (y + 1) % 10), (test, truth), list("0123456789"))
            with redirect_stdout(io.StringIO()):
                network = common.load_classifier(mock.Mock(device="cpu", translate=0.1), data)
            guess = common.predict(network, test / 255).argmax(1)
            right = ((truth + 1) % 10 == guess).float().mean()
            self.assertGreater(right, 0.7, "it does not know its training set's labels")


class DataSets(Case):
    def read(self, data, flags=""):
        with redirect_stdout(io.StringIO()) as self.printed:
            return common.load_data(load(f"{FIRST} --batch-size 2 --data {data} {flags}")[1])

    def test_shifted_images(self):
        x = F.pad(torch.ones(2000, 2, 1, 3), (10, 7, 10, 9))
        moved = common.shift(x, 0.1)
        _, _, row, column = moved.nonzero().T
        self.assertEqual([row.min(), row.max(), column.min(), column.max()], [8, 12, 8, 14])
        self.same(moved.sum((1, 2, 3)), x.sum((1, 2, 3)), "images lose pixels")
        flags = ("", "--translate 0.2", "--translate 0.2 --seed 1")
        plain, once, again = (self.read(PICTURES, flag).x_test for flag in flags)
        self.assertTrue(once.equal(again) and not once.equal(plain), "the shifted test set")
        steps = Run(f"{FIRST} --translate 0.2 --epochs 1", "out").steps
        with self.assertRaisesRegex(AssertionError, "none of the train", msg="--translate has no say"):
            self.find(torch.cat([step["x"] for step in steps]), "train", "")

    def test_folders(self):
        make_pictures("d", ["9", "10", "11"], 24, (20, 16))
        for path in ("d/9/r.png", "d/r.png", "d/9/.r.png", "d/__MACOSX/r.png", "d/.r/r.png"):
            Path(path).parent.mkdir(exist_ok=True)
            Image.new("RGBA", (9, 9), (255, 0, 0, 128)).save(path)
        make_pictures("split/Train", "ba", 20)
        make_pictures("split/test", "ab", 4)
        Path("split/Train/a/01.png").write_bytes(b"no picture")
        make_pictures("flat", [""], 12, (200, 100))
        Image.new("L", (8, 8)).save("flat/00.png")
        cases = {"~/d": (["10", "11", "9"], 23, 2, (3, 16, 16)), "split": (["a", "b"], 19, 4, (1, 8, 8)),
                 "flat": (["flat"], 11, 1, (1, 64, 64))}
        for folder, expected in cases.items():
            with mock.patch.dict(os.environ, HOME=os.getcwd()):
                data = self.read(folder)
            found = data.classes, len(data.x_train), len(data.x_test), data.shape
            self.assertEqual(found, expected)
            left_out = "Left out 1 unreadable pictures, the first is" in self.printed.getvalue()
            self.assertEqual(left_out, folder == "split")

    def test_what_is_refused_and_why(self):
        folders = {"deep/pictures/train": ("ab", 30), "other/train": ("ab", 30), "other/test": ("bc", 30),
                   "poor": ("abc", 9), "flat": ([""], 99), "few": ([""], 9), "old": ([""], 30)}
        for folder, (classes, n) in folders.items():
            make_pictures(folder, classes, n)
        make_pictures("poor", "ab", 24)
        Path("old/00.png").rename("old/vae_progress.png")
        cases = {"deep": "point --data at one of", "gone": "No such file", "few": "9 pictures are too few",
                 "other": "must have the classes of", "old": "was drawn by a run"}
        self.check_fails({f"{FIRST} --data {name}": message for name, message in cases.items()})
        self.check_fails({"cgan --data flat": "one class", "cvae --data poor": "class c needs ten",
                          "vae --data flat --batch-size 99": "do not fill a batch"})

    @mock.patch("urllib.request.urlopen", side_effect=OSError("no network"))
    def test_mnist(self, _):
        self.read("auto", "--dry-run")
        self.assertRegex(self.printed.getvalue(), "MNIST was not found.*synthetic digits.*none/MNIST/raw")
        Path("none/MNIST/raw").mkdir(parents=True, exist_ok=True)
        Path("none/MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"truncated")
        self.check_fails({f"{FIRST} --data auto": "four files belong into none/MNIST/raw"})
        x = torch.arange(32).view(2, 4, 4).byte()
        digits = mock.Mock(data=x, targets=torch.tensor([0, 1]), classes=["0", "1"])
        with mock.patch.dict(common.TORCHVISION, mnist=lambda *_, **__: digits):
            self.same(self.read("MNIST").x_train, x[:, None], "MNIST is transposed")


class Documents(Case):
    def test_every_script_runs(self):
        for script in SCRIPTS:
            run = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data=synthetic", "--out=out"]
            done = subprocess.run(run, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout + done.stderr)
            self.assertRegex(done.stdout, r"\nepoch 1/1  step 2/2  0:\d\d, 0:00 left  loss")
            self.assertEqual(os.listdir("out"), ["dry-run"])

    @whole
    def test_documented_commands_are_understood(self):
        text = TEXT + "".join(importlib.import_module(script).__doc__ for script in ALL)
        start = r"(?:python |uv run |^\| `)(?!test_smoke|measure)"  # or a table's first cell
        commands = re.findall(start + r"(\w+)\.py([^`\n|#]*)", text, re.M)
        self.assertGreater(len(commands), 100)
        for script, flags in commands:
            load(script + re.sub(r"--resume|--generate \d+", "", flags))

    @whole
    def test_documented_python_works(self):
        def tiny(script):
            parse_args = importlib.import_module(script).parse_args
            return lambda argv: parse_args([f"--data={PICTURES}", "--out=.", *TINY.split(), *argv])
        Run("vae", ".")
        digits, two = [(Image.new("L", (28, 28)), 7)], nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with (
            mock.patch("gan.parse_args", tiny("gan")), mock.patch("vae.parse_args", tiny("vae")),
            mock.patch("torchvision.datasets.MNIST", return_value=digits),
            mock.patch("common.load_classifier", lambda *_: two), redirect_stdout(io.StringIO()),
        ):
            for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
                scripts = ["vaegan", "cgan", "wgan"] if "measure.py: python" in code else [""]
                for script in scripts if "pandas" not in code else []:
                    out = script and str(tiny_run(script).out)
                    with mock.patch("sys.argv", ["measure.py", script, out]):
                        exec(code, {})


class Mistakes(Case):
    """python test_smoke.py Mistakes: each of assets/mistakes is noticed, by the script's own tests."""

    @whole
    def test_mistakes_are_noticed(self):
        for patch in sorted((HERE / "assets/mistakes").glob("*.patch")):
            changed = re.search(r"^\+\+\+ b/(\w+)\.py", patch.read_text(encoding="utf-8"), re.M)[1]
            script = "gan" if changed == "common" else changed
            with self.subTest(patch.name), tempfile.TemporaryDirectory() as folder:
                for name in (script, "common", "test_smoke"):
                    shutil.copy(HERE / f"{name}.py", folder)
                subprocess.run(["git", "apply", patch], cwd=folder, check=True)
                runs = [f"{script}.py", "--dry-run", "--data=synthetic"], ["test_smoke.py"]
                good, bad = (subprocess.run([sys.executable, *run], cwd=folder, capture_output=True, text=True)
                             for run in runs)
                self.assertEqual(good.returncode, 0, good.stderr)
                said = re.findall(r"^AssertionError: (.*)", bad.stderr, re.M)
                self.assertTrue(bad.returncode and said, f"{patch.name} is not noticed")
                print(patch.name, said[0], sep=": ")


if __name__ == "__main__":
    others = [word for word in sys.argv[1:] if word.removesuffix(".py") not in ALL]
    if not any(word[0] != "-" for word in others):
        others += ["Formulas", "Training", "Pictures", "Resuming", "Maths", "DataSets", "Documents"]
    unittest.main(argv=[sys.argv[0], *others], warnings="ignore")

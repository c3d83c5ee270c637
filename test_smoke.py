"""`python test_smoke.py` tests all scripts in this folder, `python test_smoke.py gan` tests only gan.py.

Each script trains on a few tiny pictures. Its losses, weights and files are computed again from formulas,
and a failure says what differs. Layers and learning rates are tested only if all seven scripts are here."""

import argparse
import csv
import importlib
import inspect
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout
from copy import copy, deepcopy
from functools import cache, partial, wraps
from pathlib import Path
from unittest.mock import Mock, create_autospec, patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common

HERE = Path(__file__).resolve().parent
ALL = ["vae", "cvae", "gan", "cgan", "dcgan", "wgan", "vaegan"]
NAMED = [name for name in ALL if {name, f"{name}.py"} & {*sys.argv[1:]}]
SCRIPTS = NAMED or [name for name in ALL if (HERE / f"{name}.py").exists()]
FIRST = SCRIPTS[0]
DOCUMENTS = [*HERE.glob("README.md"), *HERE.glob("assets/reports.md"), *HERE.glob("assets/mistakes.md")]
TEXT = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
whole = unittest.skipUnless(SCRIPTS == ALL and TEXT, "of the whole collection")
KINDS = [*ALL, "vae --arch conv", "vae --arch pixelcnn", "cvae --arch conv", "gan --arch conv",
         "cgan --arch conv", "wgan --arch mlp"]
TINY = "--device=cpu --data-dir=none --epochs 3 --batch-size 2 --log-every 2 --width 4"
TEMP = tempfile.TemporaryDirectory()
PICTURES, COLOUR = Path(TEMP.name, "pictures"), Path(TEMP.name, "colour")
quiet = partial(redirect_stdout, io.StringIO())


def make_pictures(folder, classes, n, size=(8, 8), mode="L"):
    for i in range(n):
        path = Path(folder, classes[i % len(classes)], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.merge(mode, [Image.effect_noise(size, 50) for _ in mode]).save(path)


make_pictures(PICTURES / "train", "ab", 27)
make_pictures(PICTURES / "test", "ab", 34)
make_pictures(COLOUR, "abc", 30, mode="RGB")


def read_images(paths):
    return torch.stack([common.v2.functional.pil_to_tensor(Image.open(path)) for path in paths]) / 255


@cache
def pictures(part):
    paths = sorted(Path(PICTURES, part).glob("*/*.png"))
    y = torch.tensor([path.parent.name == "b" for path in paths]).long()
    return read_images(paths), F.one_hot(y, 2).float()


def listen(function, calls, during=lambda call: None):
    """Wraps `function`: `calls` gets arguments, "result", "opts", networks "before" and "after"."""
    def listening(*args, **kwargs):
        call = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
        networks = {name: x for name, x in call.items() if isinstance(x, nn.Module)}
        call["opts"] = {name: x for name, x in call.items() if name.startswith("opt")}
        call["before"] = deepcopy(networks)
        call["result"] = function(*args, **kwargs)
        during(call)
        calls.append({**call, "after": deepcopy(networks)})
        return call["result"]
    return listening


class Run:
    """A run of a script in this process: what it did, and what it left in `out`."""

    def __init__(self, command, out, during=lambda run, call: None):
        self.command, self.out = command, Path(out)
        self.script, *flags = command.split()
        self.module = module = importlib.import_module(self.script)
        self.labels = self.script in ("cvae", "cgan")
        self.steps, self.drawn, self.scored, self.grids = [], [], [], {}
        flags = [f"--data={PICTURES}", f"--out={out}", *TINY.split(), *flags]
        self.args = module.parse_args(flags)
        score = create_autospec(common.score, return_value={"fd": 7})
        patches = {
            "train_step": listen(module.train_step, self.steps, partial(during, self)),
            "sample": listen(module.sample, self.drawn),
            "score": listen(score, self.scored),
            "load_classifier": Mock(return_value="a classifier"),
            "save_grid": self.save_grid,
        }
        with patch.multiple(module, **patches), quiet():
            self.networks = module.main(self.args)
        self.rows = list(csv.DictReader(open(self.out / f"{self.script}.csv")))
        pngs = self.out.glob(f"{self.script}_*.png")
        self.files = {path.name: path.read_bytes() for path in pngs}
        self.files["csv"] = [{**row, "seconds": ""} for row in self.rows]

    def save_grid(self, args, what, images, *columns):
        self.grids.setdefault(what, []).append(images)
        common.save_grid(args, what, images, *columns)

    def call(self, what, epoch=-1):
        """The call of sample() whose result is the grid `what`."""
        x = self.grids[what][epoch]
        if what == "reconstructions":  # every second image
            x = x[1::2]
        return [call for call in self.drawn if call["result"].equal(x)][-1]

    def network(self, *names):
        names = [f"{name}_ema" for name in names] + [*names]
        return next(self.networks[name] for name in names if name in self.networks)

    def draw(self, call):
        """The images that the generator or decoder draws from the noise and the labels of this call."""
        inputs = [call[key] for key in "zy" if key in call]
        logits = self.network("generator", "decoder")(*inputs).detach()
        return logits.tanh() / 2 + 0.5 if self.script == "dcgan" else logits.sigmoid()


@cache
def tiny_run(command):
    return Run(command, tempfile.mkdtemp(dir=TEMP.name))


def load(command):
    script, *flags = command.split()
    module = importlib.import_module(script)
    flags = ["--device=cpu", "--data-dir=none", "--data=synthetic", "--out=.", *flags]
    return module, module.parse_args(flags)


def each(*commands):
    """Runs a test once for each of these commands whose script is to be tested."""
    def decorate(test):
        @wraps(test)
        def tests(self):
            for command in commands:
                if command.split()[0] in SCRIPTS:
                    with self.subTest(command):
                        torch.set_default_dtype(torch.float)
                        test(self, tiny_run(command))
        return tests
    return decorate


def same(got, expected, words, tolerance=1e-4):
    got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    if got.shape != expected.shape:
        raise AssertionError(f"{words}: {[*got.shape]}, not {[*expected.shape]}")
    by = (got - expected).abs() / expected.abs().clamp(min=1)
    if not (by <= tolerance).all():
        raise AssertionError(f"{words}: differs by up to {by.max():.2g}")


def find(x, part, words):
    """Find each image of x in the set `part`: indices."""
    found = [[image.equal(x_i) for image in pictures(part)[0]] for x_i in x]
    if not all(map(any, found)):
        raise AssertionError(f"{words}: an image is none of the {part} set, in [0, 1]")
    return [row.index(True) for row in found]


def descend(loss, *networks):
    weights = [weight for network in networks for weight in network.parameters()]
    gradients = torch.autograd.grad(loss.mean(), weights, retain_graph=True)
    for weight, gradient in zip(weights, gradients):
        weight.data -= 0.01 * gradient


def encode(encoder, x, *y):
    mu, logvar = encoder(x, *y).chunk(2, 1)
    kl = (mu.square() + logvar.exp() - 1 - logvar).sum(1) / 2
    return mu + (logvar / 2).exp() * torch.randn_like(mu), kl


def elbo(args, x, y, encoder, decoder):
    z, kl = encode(encoder, x, *y)
    logits = decoder(z, x) if "pixelcnn" in vars(args).values() else decoder(z, *y)
    p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    if "mse" in vars(args).values():
        p = torch.distributions.Normal(logits.sigmoid(), 0.5**0.5)
    return -p.log_prob(x).flatten(1).sum(1), kl


def vae(args, x, y, encoder, decoder):
    recon, kl = elbo(args, x, y, encoder, decoder)
    loss = recon + args.beta * kl
    descend(loss, encoder, decoder)
    return {"loss": loss, "loss_recon": recon, "loss_kl": kl}


def gan(args, x, y, generator, discriminator):
    logits = generator(torch.randn(len(x), args.latent_dim), *y)
    x_fake = logits.sigmoid()
    if args.name == "dcgan":  # both kinds of images in [-1, 1]
        x, x_fake = 2 * x - 1, logits.tanh()
    real, fake = discriminator(x, *y), discriminator(x_fake, *y)
    loss_d = -F.logsigmoid(real) - F.logsigmoid(-fake)
    descend(loss_d, discriminator)
    again = discriminator(x_fake, *y)
    loss_g = -F.logsigmoid(again)
    if "minimax" in vars(args).values():
        loss_g = F.logsigmoid(-again)
    descend(loss_g, generator)
    return {"loss_d": loss_d, "loss_g": loss_g, "d_real": real.sigmoid(), "d_fake": fake.sigmoid()}


def wgan(args, x, y, generator, critic):
    x_fake = generator(torch.randn(len(x), args.latent_dim)).sigmoid()
    wasserstein, penalty = critic(x) - critic(x_fake), torch.zeros(())
    if args.lipschitz == "gp":
        epsilon = torch.rand(len(x), 1, 1, 1)
        x_hat = (epsilon * x_fake + (1 - epsilon) * x).detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
        penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square()
    loss_d = -wasserstein + args.gp_weight * penalty
    descend(loss_d, critic)
    for weight in critic.parameters() if args.lipschitz == "clip" else ():
        weight.data.clamp_(-args.clip, args.clip)
    loss_g = -critic(x_fake)
    descend(loss_g, generator)
    return {"loss_d": loss_d, "loss_g": loss_g, "wasserstein": wasserstein, "penalty": penalty}


def vaegan(args, x, y, encoder, decoder, discriminator):
    z, kl = encode(encoder, x)
    x_recon, x_fake = decoder(torch.cat([z, torch.randn_like(z)])).sigmoid().chunk(2)
    real, recon, fake = (discriminator(images) for images in (x, x_recon, x_fake))
    features = discriminator.features(x) - discriminator.features(x_recon)
    features = features.square().flatten(1).sum(1) / 2
    loss_d = -F.logsigmoid(real) - F.logsigmoid(-recon) - F.logsigmoid(-fake)
    loss_g = args.gamma * features - F.logsigmoid(recon) - F.logsigmoid(fake)
    descend(args.beta * kl + features, encoder)
    descend(loss_g, decoder)
    descend(loss_d, discriminator)
    return {"loss_d": loss_d, "loss_g": loss_g, "loss_kl": kl, "loss_features": features,
            "d_real": real.sigmoid(), "d_recon": recon.sigmoid(), "d_fake": fake.sigmoid()}


FORMULAS = {"vae": vae, "cvae": vae, "wgan": wgan, "vaegan": vaegan}


class Case(unittest.TestCase):
    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(tempfile.mkdtemp(dir=TEMP.name))
        torch.manual_seed(0)

    def check_fails(self, command, cases, status=2, run=partial(Run, out=".")):
        for flags, message in cases.items():
            with self.subTest(flags), redirect_stderr(io.StringIO()) as error:
                with self.assertRaises(SystemExit) as end, quiet():
                    run(f"{command} {flags}")
                self.assertIn(message, error.getvalue())
                self.assertEqual(end.exception.code, status)


class Formulas(Case):
    @each(*KINDS, "vae --beta 3 --recon mse", "cvae --beta 3", "gan --loss minimax",
          "wgan --gp-weight 3", "wgan --lipschitz clip --clip 0.02", "vaegan --gamma 0.1 --beta 3")
    def test_updates(self, run):
        """Two steps of plain gradient descent, by train_step() and by the formulas."""
        given = run.steps[0]
        ours, theirs = (nn.ModuleDict(deepcopy(given["before"])).double() for _ in range(2))
        for module in (*ours.modules(), *theirs.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        args = copy(run.args)
        args.beta = given.get("beta", vars(args).get("beta"))  # which may rise
        opts = {}
        for name, opt in given["opts"].items():
            ids = {id(weight) for weight in opt.param_groups[0]["params"]}
            nets = [key for key in theirs if ids & {*map(id, given[key].parameters())}]
            weights = nn.ModuleList(theirs[key] for key in nets).parameters()
            opts[name] = torch.optim.SGD(weights, 0.01)
        batch = {}
        for key in {*given} & {"x", "y"}:
            batch[key] = torch.cat([step[key] for step in run.steps[:4]]).double()
        given = {**given, **theirs, **opts, **batch}
        names = inspect.signature(run.module.train_step).parameters
        given = {name: given[name] for name in names}
        y, formula = [given["y"]] if run.labels else [], FORMULAS.get(run.script, gan)
        torch.set_default_dtype(torch.double)
        self.addCleanup(torch.set_default_dtype, torch.float)
        for update in ("first update", "second update, unlike the first (zero_grad()?)"):
            old = deepcopy(theirs)
            torch.manual_seed(0)
            expected = formula(args, given["x"], y, *ours.values())
            torch.manual_seed(0)
            losses = run.module.train_step(**given)
            self.compare(f"{run.script}.py, {update}", losses, expected, old, theirs, ours)

    def compare(self, words, losses, expected, old, theirs, ours):
        for name in [name for name in reversed(expected) if name in losses]:  # parts before sums
            value, by_hand = losses[name], expected[name].detach()
            self.assertFalse(value.requires_grad, f"{words}: {name} is not detached")
            hint = " (a sum over the batch?)" if value.isclose(by_hand.sum()) else ""
            same(value, by_hand.mean(), f"{words}: {name} is not the formula's{hint}")
        for name in theirs:
            new, by_hand, was = (list(n[name].parameters()) for n in (theirs, ours, old))
            still = all(map(torch.equal, new, was))
            self.assertFalse(still, f"{words}: the {name} does not learn")
            for a, b in zip(new, by_hand):
                same(a, b, f"{words}: the weights of the {name} are not the formula's", 1e-9)

    @each("vae --recon mse --beta 3", "cvae", "vae --binarize --latent-dim 2", "cvae --binarize")
    def test_negative_elbo(self, run):
        for x in (run.steps[-1]["x"], run.grids["reconstructions"][-1][::2]):
            same(len(x.unique()) == 2, run.args.binarize, "binary pixels or not")
        (x, y), networks = pictures("test"), run.networks.values()
        data, parts = Mock(classes="ab"), [slice(30), slice(30, 34)]
        data.test_batches.return_value = [(x[i], y[i].argmax(1)) for i in parts]
        torch.manual_seed(run.args.seed)
        found = run.module.evaluate(data, run.args, *networks)
        torch.manual_seed(run.args.seed)
        labels = [[y[i]] if run.labels else [] for i in parts]
        terms = [elbo(run.args, x[i], y, *networks) for i, y in zip(parts, labels)]
        recon, kl = (torch.cat(term).mean().detach() for term in zip(*terms))
        expected = {"test_neg_elbo": recon + kl, "test_recon": recon, "test_kl": kl}
        for name, value in expected.items():
            same(found[name], value, f"{name}, with beta 1, of all images")


class Training(Case):
    @each(*ALL)
    def test_an_epoch_is_the_training_set(self, run):
        other = tiny_run(f"{run.script} --epochs 1 --seed 1 --score")
        steps = [run.steps[i : i + 13] for i in (0, 13, 26)] + [other.steps]
        x = [torch.cat([step["x"] for step in part]) for part in steps]
        orders = [find(images, "train", "training") for images in x]
        same([len({*order}) for order in orders], [26] * 4, "an image comes twice")
        same(len({(*order,) for order in orders}), 4, "the order is the same again")
        if run.labels:
            y = torch.cat([step["y"] for step in steps[0]])
            same(y, pictures("train")[1][orders[0]], "labels are not those of the images")
        for step in run.steps:
            training = [network.training for network in step["after"].values()]
            self.assertTrue(all(training), "a network trains in eval mode")

    @each(*KINDS, "gan --d-steps 3")
    def test_csv(self, run):
        losses, done = [step["result"] for step in run.steps], 0
        for row in run.rows:
            part, done = losses[done : int(row["step"])], int(row["step"])
            self.assertLess(len(part), 3, "CSV: steps of a row")
            same(int(row["epoch"]), math.ceil(done / 13), "CSV: epoch")
            for name in losses[0]:
                values = [step[name] for step in part if name in step]
                mean = [torch.stack(values).mean()] if values else []
                found = [float(row[name])] if row[name] else []
                same(found, mean, f"CSV: mean of {name}")

    @whole
    @each(*ALL, "wgan --lipschitz clip", "vae --lr-schedule constant", "gan --lr-d 2 --ema 0.5")
    def test_optimizers_and_schedules(self, run):
        betas = {"vae": (0.9, 0.999), "cvae": (0.9, 0.999), "vaegan": (0.5, 0.999)}
        betas["wgan"] = None if "clip" in run.command else (0.0, 0.9)
        lr, lr_d = run.args.lr, vars(run.args).get("lr_d", 1)
        rates = {"opt": lr if "constant" in run.command else lr / 39, "opt_d": lr * lr_d}
        for name, opt in run.steps[-1]["opts"].items():
            (group,) = opt.param_groups
            same(group["lr"], rates.get(name, lr), f"learning rate of {name}", 1e-9)
            self.assertEqual(group.get("betas"), betas.get(run.script, (0.0, 0.99)))
        if run.command == "vae":
            beta = [step["beta"] for step in tiny_run("vae --beta 4 --kl-warmup 2").steps]
            same(beta, [4 * min(1, i / 26) for i in range(39)], "beta")

    @each("gan --d-steps 3 --ema 0.4", "gan --ema 0", "cgan", "dcgan", "wgan", "wgan --n-critic 2", "vaegan")
    def test_turns_and_averaged_weights(self, run):
        n = vars(run.args).get("d_steps", vars(run.args).get("n_critic", 1))
        turns = [i for i, step in enumerate(run.steps) if "loss_g" in step["result"]]
        same(turns, [i for i in range(39) if i % 13 % n == 0], "generator's turns")
        for name in {"encoder", "decoder", "generator"} & {*run.networks}:
            average = deepcopy(run.steps[0]["before"][name].state_dict())
            for i, step in enumerate(run.steps):
                decay = min(run.args.ema, (1 + i // n) / (10 + i // n)) if i in turns else 1
                for key, value in step["after"][name].state_dict().items():
                    average[key] = decay * average[key] + (1 - decay) * value
                old, new = (step[when][name].parameters() for when in ("before", "after"))
                still = all(map(torch.equal, old, new))
                same(still, i not in turns, f"step {i}: wrong turn of {name}")
            for key, value in run.networks[f"{name}_ema"].state_dict().items():
                if value.is_floating_point():
                    same(value, average[key], f"{key} of {name}_ema is not the average")


class Pictures(Case):
    @each(*KINDS, "vae --latent-dim 2")
    def test_pictures_are_of_the_saved_network(self, run):
        for name, grids in run.grids.items():
            (image,) = read_images([run.out / f"{run.script}_{name}.png"])
            cells = image[:1, 2:, 2:].unfold(1, 8, 10).unfold(2, 8, 10)
            cells = cells.flatten(0, 2)[: len(grids[-1]), None]
            same(cells, grids[-1], f"grey levels of {name}.png", 1 / 255)
            columns = {"interpolation": 6, "traversal": 10, "manifold": 20, "reconstructions": 8,
                       "samples": 10 if run.labels else 8, "progress": 2 if run.labels else 10}
            if name in columns:
                same(image.shape[2], 10 * columns[name] + 2, f"width of {name}.png")
            if name in {*columns} - {"progress"} and "pixelcnn" not in run.command:
                call = run.call(name)
                same(call["result"], run.draw(call), f"{name}: not drawn by the saved network")
        row = slice(0, 20, 11) if run.labels else slice(10)  # of labels: the diagonal
        rows = torch.cat([images[row] for images in run.grids["samples"]])
        same(run.grids["progress"][-1], rows, "progress: each epoch's samples", 1 / 255)

    @each(*[f"{script} --data {COLOUR} --epochs 1" for script in ALL])
    def test_sample_is_in_eval_mode(self, run):
        call, network = run.call("samples", 0), deepcopy(run.network("generator", "decoder"))
        inputs = [call[key] for key in "zy" if key in call]
        both = run.module.sample(network.train(), *inputs)
        few = run.module.sample(network, *[part[:3] for part in inputs])
        same(few.shape, (3, 3, 8, 8), "colour")
        same(few, both[:3], "a sample depends on the others of its batch: eval mode?")
        self.assertFalse(both.requires_grad, "sample() keeps gradients")
        self.assertTrue(network.training, "sample() leaves eval mode")
        self.assertTrue(0 <= both.min() and both.max() <= 1, "samples are not in [0, 1]")

    @each(*ALL)
    def test_noise_and_walks(self, run):
        def walks(a, b):
            t = torch.arange(6)[:, None] / 5
            return torch.cat([start + (end - start) * t for start, end in zip(a, b)])
        z, walk = run.call("samples")["z"], run.call("interpolation")
        same(len(z), 20 if run.labels else 64, "samples")
        same(run.call("samples", 0)["z"], z, "each epoch draws from other noise", 0)
        same(z.std(), 1, "noise is not N(0, I)", 0.2)
        if not run.labels:
            return same(walk["z"], walks(z[:16], z[1:17]), "noise of the interpolation")
        y = torch.eye(2)
        same(run.call("samples")["y"], y.repeat_interleave(10, 0), "a row per class")
        same(z[:10], z[10:], "the same noise down a column")
        y, z = y.repeat(5, 1)[:9], z[:9]
        z = torch.cat([walks(z[:8], z[1:]), walks(z[:8], z[:8])])
        y = torch.cat([walks(y[:8], y[:8]), walks(y[:8], y[1:])])
        same(walk["z"], z, "noise of the interpolation")
        same(walk["y"], y, "labels of the interpolation")

    @each("vae", "vae --arch conv", "cvae", "vaegan")
    def test_codes(self, run):
        (x, y), recon, traversal = pictures("test"), run.call("reconstructions"), run.call("traversal")
        which = find(run.grids["reconstructions"][-1][::2], "test", "reconstructions")
        codes = run.network("encoder")(*[x, y][: 1 + run.labels]).detach().chunk(2, 1)[0]
        dims = codes[which].var(0).argsort(descending=True)[:10]  # those that vary most
        z = codes[which[:1]].repeat(len(dims), 10, 1)
        for i, dim in enumerate(dims):
            z[i, :, dim] = torch.arange(10) * 6 / 9 - 3
        same(recon["z"], codes[which], "reconstructions: z is not the mean of q(z|x)")
        same(traversal["z"], z.flatten(0, 1), "traversal: z")
        same(recon.get("y", y[which]), y[which], "reconstructions: labels")

    @each(*[f"{kind} --epochs 1 --seed 1 --score" for kind in [*ALL, "vae --arch pixelcnn"]])
    def test_scored_samples(self, run):
        (scored,), call = run.scored, run.drawn[-1]
        pixelcnn, z = "pixelcnn" in run.command, call["z"]
        self.assertIs(scored["x"], call["result"])
        self.assertEqual(scored["classifier"], "a classifier")
        same(len(z), 1_000 if pixelcnn else 10_000, "samples")
        same(z.std(), 1, "noise is not N(0, I)", 0.1)
        same(scored.get("binarize", False), pixelcnn, "binarised test set")
        same(int(run.rows[-1]["fd"]), 7, "CSV: fd")
        if not pixelcnn:
            same(call["result"], run.draw(call), "scored samples are of another network")
        if run.labels:
            same(scored["labels"], torch.arange(10_000) % 2, "labels given to score()")
            same(call["y"], F.one_hot(scored["labels"]), "labels of the scored samples")

    @each(*ALL)
    def test_generate(self, run):
        with patch("common.load_folder", side_effect=AssertionError("it reads the data")):
            (call,) = Run(f"{run.script} --generate 6", run.out).drawn
            loaded = Run(f"{run.script} --generate 0", run.out).networks
        paths = sorted(run.out.rglob("00*.png"), key=lambda path: path.name)
        if run.labels:
            self.assertEqual("".join(path.parent.name for path in paths), "ababab")
            same(call["y"], torch.eye(2).repeat(3, 1), "labels of generated samples")
        same(read_images(paths), run.draw(call), "generated PNG files", 0.51 / 255)
        self.assertLess(call["z"].min(), -0.5, "noise of generated samples")
        for a, b in zip(loaded.state_dict().values(), run.networks.state_dict().values()):
            same(a, b, "weights of the checkpoint", 0)
        self.assertFalse(loaded.training, "main() returns eval mode")


class Resuming(Case):
    @each(*KINDS)
    def test_resumed_run(self, run):
        def stop(stopped, call):
            if len(stopped.steps) == 14:  # in the second epoch
                raise KeyboardInterrupt
        out = tempfile.mkdtemp(dir=".")
        with self.assertRaises(KeyboardInterrupt):
            Run(run.command, out, stop)
        resumed = Run(f"{run.script} --resume", out)
        self.assertEqual(resumed.files, run.files, "files of a resumed run differ")
        first, last = (float(resumed.rows[i]["seconds"]) for i in (6, -1))
        self.assertGreater(last, first, "the seconds begin anew")

    def test_bad_input(self):
        Path(f"{FIRST}.pt").write_bytes(b"no checkpoint")
        cases = {"--epochs -1 --dry-run": "argument --epochs: -1 is not in [1, inf)",
                 "--translate 1": "in [0, 1)", "--image-size 30": "multiple", "--device meta": "--device",
                 "--resume": "no checkpoint of", "--resume --generate 1": "not allowed with",
                 "--data . --out run": "lies in --data", f"--out {FIRST}.pt": "--out"}
        self.check_fails(FIRST, cases)
        self.assertEqual(os.listdir(), [f"{FIRST}.pt"], "a refused run leaves files")
        Run(f"{FIRST} --epochs 1", "out")
        make_pictures("other", "ac", 40)
        cases = {"--generate 1 --latent-dim 3": "other networks", "--generate 1 --out .": "train first",
                 "--resume --image-size 12": "another shape", "--resume --data other": "other classes"}
        self.check_fails(f"{FIRST} --out out", cases)

    @each(*ALL)
    def test_what_is_not_finite_ends_a_run(self, run):
        def spoil(spoilt, call):
            if len(spoilt.steps) == 25:  # the last of epoch 2: no loss will tell
                next(call[next(iter(call["before"]))].parameters()).data.fill_(math.nan)
        spoilt = partial(Run, out="out", during=spoil)
        self.check_fails(run.script, {"": "is not finite at step 26"}, 1, spoilt)
        same(torch.load(f"out/{run.script}.pt")["epoch"], 1, "NaN saved")


class Maths(Case):
    @whole
    def test_layers(self):
        """A layer with 9 outputs is 9 here; B: batch norm, R: ReLU, l: leaky ReLU, D: dropout."""
        table = """
            vae --hidden 9 7: 9 B9 R 7 B7 R 16 7 B7 R 9 B9 R 64
            vae --arch conv: 4 B4 l0.2 16 128 B8 R 4 B4 R 1
            cvae --hidden 9 --norm none: 9 R 16 9 R 64
            cvae --arch conv: 4 B4 l0.2 16 128 B8 R 4 B4 R 1
            gan --hidden 9 7 --dropout 0.3: 9 B9 R 7 B7 R 64 7 l0.2 D0.3 9 l0.2 D0.3 1
            gan --arch conv: 128 B8 R 4 B4 R 1 4 l0.2 8 l0.2 16 l0.2 1
            cgan --hidden 9 --dropout 0.3: 9 B9 R 64 9 l0.2 D0.3 1
            cgan --arch conv: 128 B8 R 4 B4 R 1 4 l0.2 8 B8 l0.2 1
            dcgan: 128 B8 R 4 B4 R 1 4 l0.2 8 B8 l0.2 1
            wgan: 128 B8 R 4 B4 R 1 4 l0.2 8 l0.2 64 l0.2 1
            wgan --norm batch: 128 B8 R 4 B4 R 1 4 l0.2 8 B8 l0.2 64 l0.2 1
            wgan --arch mlp --hidden 9 --norm batch: 9 B9 R 64 9 B9 l0.2 1
            vaegan: 4 B4 l0.2 16 128 B8 R 4 B4 R 1 4 l0.2 8 l0.2 16 l0.2 1
        """
        kinds = {nn.BatchNorm1d: "B{num_features}", nn.BatchNorm2d: "B{num_features}", nn.ReLU: "R",
                 nn.LeakyReLU: "l{negative_slope}", nn.Dropout: "D{p}", nn.Linear: "{out_features}",
                 nn.Conv2d: "{out_channels}", nn.ConvTranspose2d: "{out_channels}"}
        for line in table.strip().splitlines():
            command, expected = line.strip().split(": ")
            module, args = load(f"{command} --latent-dim 8 --width 4")
            labels = [2] if args.name in ("cvae", "cgan") else []
            layers = nn.ModuleList(module.make_networks(args, (1, 8, 8), *labels)).modules()
            found = [kinds[type(x)].format(**vars(x)) for x in layers if type(x) in kinds]
            found = " ".join(found).replace(" D0.0", "")
            self.assertEqual(found, expected, command)

    def test_networks(self):
        weight = common.he(nn.Linear(400, 300)).weight
        same(weight.std(), (2 / 1.04 / 400) ** 0.5, "he(): weights", 1e-3)
        features = common.conv_discriminator((1, 16, 16), 4).features
        self.assertNotIsInstance(features[-1], nn.LeakyReLU, "features: before activation")
        joined = common.Conditional(nn.Identity(), True)(torch.zeros(1, 400), torch.eye(4)[:1])
        same(joined[0, -4:], [10.0, 0, 0, 0], "a flat label has the norm of a digit")

    @unittest.skipUnless("vae" in SCRIPTS, "of vae.py")
    def test_pixelcnn(self):
        decoder = load("vae")[0].PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval()
        z, x = torch.randn(2, 3), torch.rand(2, 1, 12, 12).round().requires_grad_()
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(decoder(z, x).flatten(1)[:, i].sum(), x)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertTrue((seen < i).all() and bool(len(seen)) == (i > 0), "pixels it sees")
        self.assertFalse(decoder(z, x).equal(decoder(-z, x)), "the PixelCNN ignores z")
        with patch("torch.bernoulli", torch.round):  # pixel by pixel
            drawn = common.predict(decoder, z).sigmoid()
            same(drawn, (decoder(z, drawn) > 0).float(), "pixels that it draws")

    def test_scores(self):
        """Pixels serve as features; the classes have 5, 2, 2 samples and 1, 2, 5 real images."""
        shown, truth = torch.tensor([0] * 5 + [1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
        x, real = torch.rand(9, 1, 1, 3), torch.randint(256, (8, 1, 1, 3), dtype=torch.uint8)
        x[range(9), 0, 0, shown] += 1
        data, asked = common.Data((real, truth), (real, truth), list("abc")), (shown + 1) // 2
        scores = common.score(nn.Sequential(nn.Flatten(), nn.Identity()), data, x, asked)
        f, g = x.flatten(1), real.flatten(1) / 255
        kl = 5 * math.log(5 / 9 * 8) + 2 * math.log(2 / 9 * 4) + 2 * math.log(2 / 9 * 8 / 5)

        def covered(points, centres):
            near = [sorted((c - d).norm() for d in centres)[3] for c in centres]
            inside = [any((p - c).norm() <= r for c, r in zip(centres, near)) for p in points]
            return sum(inside) / len(points)
        expected = {"classes": 3, "class_kl": kl / 9, "precision": covered(f, g), "recall": covered(g, f),
                    "fd": common.fd(f, g), "label_accuracy": (shown == asked).float().mean()}
        for name, value in expected.items():
            same(scores[name], value, f"score(): {name}")
        f, g = torch.randn(2, 100_000, 3)
        fd = common.fd(f, g * torch.tensor([2.0, 3.0, 1.0]) + 1)
        same(fd, 3 + 1 + 4, "fd: of means, of deviations", 0.03)

    def test_classifier(self):
        (x, y), (test, truth) = common.draw_digits(2000, 3), common.draw_digits(500, 4)
        x, test = x.expand(-1, 3, -1, -1), test.expand(-1, 3, -1, -1)
        data = common.Data((x, (y + 1) % 10), (test, truth), list("0123456789"))
        with quiet():
            network = common.load_classifier(Mock(device="cpu", translate=0.1), data)
        found = common.predict(network, test / 255).argmax(1)
        right = (found == (truth + 1) % 10).float().mean()
        self.assertGreater(right, 0.7, "it does not know its training set's labels")


class DataSets(Case):
    def read(self, data, flags=""):
        with redirect_stdout(io.StringIO()) as self.printed:
            return common.load_data(load(f"{FIRST} --batch-size 2 --data {data} {flags}")[1])

    def test_shifted_images(self):
        x = F.pad(torch.ones(2000, 2, 1, 3), (10, 7, 10, 9))
        moved = common.shift(x, 0.1)
        _, _, row, column = moved.nonzero().T
        same([row.min(), row.max(), column.min(), column.max()], [8, 12, 8, 14], "shift")
        same(moved.sum((1, 2, 3)), x.sum((1, 2, 3)), "images lose pixels")
        flags = ("", "--translate 0.2", "--translate 0.2 --seed 1")
        plain, once, again = (self.read(PICTURES, flag).x_test for flag in flags)
        self.assertTrue(once.equal(again) and not once.equal(plain), "the shifted test set")
        x = Run(f"{FIRST} --translate 0.2 --epochs 1", "out").steps[0]["x"]
        moved = not any(x[0].equal(image) for image in pictures("train")[0])
        self.assertTrue(moved, "--translate changes nothing")

    def test_folders(self):
        make_pictures("d", ["9", "10", "11"], 24, (20, 16))  # and smaller ones, of which one counts:
        for path in ("d/9/r.png", "d/r.png", "d/9/.r.png", "d/__MACOSX/r.png", "d/.r/r.png"):
            Path(path).parent.mkdir(exist_ok=True)
            Image.new("RGBA", (9, 9), (255, 0, 0, 128)).save(path)
        make_pictures("split/Train", "ba", 20)
        make_pictures("split/test", "ab", 4)
        Path("split/Train/a/01.png").write_bytes(b"no picture")
        cases = {"~/d": (["10", "11", "9"], 23, 2, (3, 16, 16)), "split": (["a", "b"], 19, 4, (1, 8, 8))}
        for folder, expected in cases.items():
            with patch.dict(os.environ, HOME=os.getcwd()):
                data = self.read(folder)
            self.assertEqual((data.classes, len(data.x_train), len(data.x_test), data.shape), expected)
        self.assertIn("Left out 1 unreadable pictures, the first is", self.printed.getvalue())

    @patch("urllib.request.urlopen", side_effect=OSError("no network"))
    def test_mnist(self, _):
        self.read("auto", "--dry-run")
        self.assertRegex(self.printed.getvalue(), "MNIST was not found.*synthetic digits.*none/MNIST/raw")
        x, y = torch.arange(32).view(2, 4, 4).byte(), torch.tensor([0, 1])
        digits = Mock(return_value=Mock(data=x, targets=y, classes=["0", "1"]))
        with patch.dict(common.TORCHVISION, mnist=digits):
            same(self.read("MNIST").x_train, x[:, None], "MNIST is transposed")


class Documents(Case):
    def test_every_script_runs(self):
        for script in SCRIPTS:
            run = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data=synthetic", "--out=out"]
            done = subprocess.run(run, capture_output=True, text=True)
            self.assertEqual(done.stderr, "")
            self.assertRegex(done.stdout, r"\nepoch 1/1  step 2/2  0:\d\d, 0:00 left  \w+ ")

    @whole
    def test_documented_commands(self):
        text = TEXT + "".join(importlib.import_module(script).__doc__ for script in ALL)
        start = r"(?:python |uv run |^\| `)(?!test_smoke|measure)"  # or a table's first cell
        for script, flags in re.findall(start + r"(\w+)\.py([^`\n|#]*)", text, re.M):
            load(script + re.sub(r"--resume|--generate \d+", "", flags))

    @whole
    def test_documented_python(self):
        def tiny(parser, argv):
            return parse_args(parser, [f"--data={PICTURES}", "--out=.", *TINY.split(), *argv])
        make_pictures("dcgan_generated", [""], 9)
        make_pictures(".", [""], 2)
        Run("vae", ".")
        Run("cgan", ".")
        parse_args, two = argparse.ArgumentParser.parse_args, nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with (
            patch("argparse.ArgumentParser.parse_args", tiny), quiet(),
            patch("common.load_classifier", return_value=two),
            patch("gan.load_data", common.load_data),
        ):
            for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
                scripts = ["vaegan", "cgan", "wgan"] if "measure.py: python" in code else [""]
                for script in scripts if "pandas" not in code else []:
                    out = script and str(tiny_run(script).out)
                    with patch("sys.argv", ["measure.py", script, out]):
                        exec(code, {})


if __name__ == "__main__":
    others = [word for word in sys.argv if word.removesuffix(".py") not in ALL]
    unittest.main(argv=others, warnings="ignore")

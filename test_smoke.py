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


@functools.cache
def pictures(part):
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
        self.args = self.module.parse_args([f"--data={PICTURES}", f"--out={out}", *TINY.split(), *flags])
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
        x = self.grids[what][epoch][1::2] if what == "reconstructions" else self.grids[what][epoch]
        return [call for call in self.drawn if call["result"].equal(x)][-1]

    def network(self, *names):
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
    flags = ["--device=cpu", "--data-dir=none", "--data=synthetic", "--out=.", *flags]
    return module, module.parse_args(flags)


def trained(call):
    """Of each optimiser in a call of train_step(): the networks whose weights it has."""
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


class Formulas(Case):  # two steps of plain gradient descent by train_step(), and by the formulas
    def descend(self, loss, *networks):
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
        logits = decoder(z, x) if "pixelcnn" in vars(args).values() else decoder(z, *y)
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
        logits = generator(torch.randn(len(x), args.latent_dim), *y)
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
        x_fake = generator(torch.randn(len(x), args.latent_dim)).sigmoid()
        wasserstein, penalty = critic(x) - critic(x_fake), torch.zeros(())
        if args.lipschitz == "gp":
            epsilon = torch.rand(len(x), 1, 1, 1)
            x_hat = (epsilon * x_fake + (1 - epsilon) * x).detach().requires_grad_()
            (slope,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
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
        x_recon, x_fake = decoder(torch.cat([z, torch.randn_like(z)])).sigmoid().chunk(2)
        real, recon, fake = (discriminator(images) for images in (x, x_recon, x_fake))
        features = discriminator.features(x) - discriminator.features(x_recon)
        features = features.square().flatten(1).sum(1) / 2
        loss_d = -F.logsigmoid(real) - F.logsigmoid(-recon) - F.logsigmoid(-fake)
        loss_g = args.gamma * features - F.logsigmoid(recon) - F.logsigmoid(fake)
        self.descend(args.beta * kl + features, encoder)
        self.descend(loss_g, decoder)
        self.descend(loss_d, discriminator)
        return {"loss_d": loss_d, "loss_g": loss_g, "loss_kl": kl, "loss_features": features,
                "d_real": real.sigmoid(), "d_recon": recon.sigmoid(), "d_fake": fake.sigmoid()}

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
        batch = {key: torch.cat([step[key] for step in run.steps[:4]]) for key in "xy" if key in given}
        given = {**given, **theirs, **opts, **batch, "x": batch["x"].double()}
        given = {name: given[name] for name in inspect.signature(run.module.train_step).parameters}
        y = [given["y"]] if run.labels else []
        torch.set_default_dtype(torch.double)
        self.addCleanup(torch.set_default_dtype, torch.float)
        for update in ("first update", "second update, unlike the first (zero_grad()?)"):
            old = copy.deepcopy(theirs)
            torch.manual_seed(0)
            expected = getattr(self, run.script)(args, given["x"], y, *ours.values())
            torch.manual_seed(0)
            losses = run.module.train_step(**given)
            self.compare(f"{run.script}.py, {update}", losses, expected, old, theirs, ours)

    def compare(self, words, losses, expected, old, theirs, ours):
        for name in [name for name in reversed(expected) if name in losses]:  # parts before sums
            value, by_hand = losses[name], expected[name].detach()
            self.assertFalse(value.requires_grad, f"{words}: {name} is not detached")
            hint = " (a sum over the batch?)" if value.isclose(by_hand.sum()) else ""
            self.same(value, by_hand.mean(), f"{words}: {name} is not the formula's{hint}")
        for name in theirs:
            new, by_hand, was = (list(n[name].parameters()) for n in (theirs, ours, old))
            self.assertFalse(all(map(torch.equal, new, was)), f"{words}: the {name} does not learn")
            by = max((a - b).abs().max().item() for a, b in zip(new, by_hand))
            self.assertLess(by, 1e-9, f"{words}: the weights of the {name} are not the formula's")

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
                mean = [torch.stack(values).mean()] if values else []
                self.same([float(cell) for cell in [row[name]] if cell], mean, f"CSV: mean of {name}")

    @whole
    @each(*ALL, "wgan --lipschitz clip", "vae --lr-schedule constant", "gan --lr-d 2 --ema 0.5")
    def test_optimizers_and_schedules(self, run):
        betas = {"vae": (0.9, 0.999), "cvae": (0.9, 0.999), "wgan": (0.0, 0.9), "vaegan": (0.5, 0.999)}
        betas = {**betas, "wgan --lipschitz clip": None}.get(run.command, betas.get(run.script, (0.0, 0.99)))
        lr, lr_d = run.args.lr, vars(run.args).get("lr_d", 1)
        rates = {"opt": lr if "constant" in run.command else lr / 39, "opt_d": lr * lr_d}
        for name in trained(run.steps[-1]):
            (group,) = run.steps[-1][name].param_groups
            self.same(group["lr"], rates.get(name, lr), f"learning rate of {name}", 1e-9)
            self.assertEqual(group.get("betas"), betas)
        if run.command == "vae":
            beta = [step["beta"] for step in tiny_run("vae --beta 4 --kl-warmup 2").steps]
            self.same(beta, [4 * min(1, i / 26) for i in range(39)], "beta")

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
        row = slice(0, 20, 11) if run.labels else slice(10)  # of labels: the diagonal
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
        self.same(run.call("samples", 0)["z"], z, "each epoch draws from other noise", 0)
        self.assertLess(z.mean().abs() + (z.std() - 1).abs(), 0.4, "noise is not N(0, I)")
        if not run.labels:
            return self.same(walk["z"], walks(z[:16], z[1:17]), "noise of the interpolation")
        y = torch.eye(2)
        self.same(run.call("samples")["y"], y.repeat_interleave(10, 0), "a row per class")
        self.same(z[:10], z[10:], "the same noise down a column")
        y, z = y.repeat(5, 1)[:9], z[:9]
        z = torch.cat([walks(z[:8], z[1:]), walks(z[:8], z[:8])])
        y = torch.cat([walks(y[:8], y[:8]), walks(y[:8], y[1:])])
        self.same(walk["z"], z, "noise of the interpolation")
        self.same(walk["y"], y, "labels of the interpolation")

    @each("vae", "vae --arch conv", "cvae", "vaegan")
    def test_codes(self, run):
        (x, y), recon, traversal = pictures("test"), run.call("reconstructions"), run.call("traversal")
        which = self.find(run.grids["reconstructions"][-1][::2], "test", "reconstructions")
        codes = run.network("encoder")(*[x, y][: 1 + run.labels]).detach().chunk(2, 1)[0]
        dims = codes[which].var(0).argsort(descending=True)[:10]  # those that vary most
        z = codes[which[:1]].repeat(len(dims), 10, 1)
        for i, dim in enumerate(dims):
            z[i, :, dim] = torch.arange(10) * 6 / 9 - 3
        self.same(recon["z"], codes[which], "reconstructions: z is not the mean of q(z|x)")
        self.same(traversal["z"], z.flatten(0, 1), "traversal: z")
        self.same(recon.get("y", y[which]), y[which], "reconstructions: labels")

    @each(*[f"{kind} --epochs 1 --seed 1 --score" for kind in [*ALL, "vae --arch pixelcnn"]])
    def test_scores_are_of_the_network_that_draws(self, run):
        (scored,), call = run.scored, run.drawn[-1]
        pixelcnn, z = "pixelcnn" in run.command, call["z"]
        self.assertTrue(scored["x"] is call["result"], "what is scored")
        self.assertEqual(len(z), 1_000 if pixelcnn else 10_000)
        self.assertLess(z.mean().abs() + (z.std() - 1).abs(), 0.1, "noise is not N(0, I)")
        self.assertEqual(scored.get("binarize", False), pixelcnn)
        self.assertEqual(run.rows[-1]["fd"], "7", "scores in the CSV")
        if not pixelcnn:
            self.same(call["result"], run.draw(call), "scored samples are of another network")
        if run.labels:
            self.same(scored["labels"], torch.arange(10_000) % 2, "labels given to score()")
            self.same(call["y"], F.one_hot(scored["labels"]), "labels of the scored samples")

    @each(*ALL)
    def test_generate(self, run):
        with mock.patch("common.load_folder", side_effect=AssertionError("it reads the data")):
            (call,) = Run(f"{run.script} --generate 6", run.out).drawn
            loaded = Run(f"{run.script} --generate 0", run.out).networks
        paths = sorted(run.out.rglob("00*.png"), key=lambda path: path.name)
        if run.labels:
            self.assertEqual("".join(path.parent.name for path in paths), "ababab")
            self.same(call["y"], torch.eye(2).repeat(3, 1), "labels of generated samples")
        self.same(read_images(paths), run.draw(call), "generated PNG files", 0.51 / 255)
        self.assertLess(call["z"].min(), -0.5, "noise of generated samples")
        for a, b in zip(loaded.state_dict().values(), run.networks.state_dict().values()):
            self.same(a, b, "weights of the checkpoint", 0)
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
        out = tempfile.mkdtemp(dir=".")
        with self.assertRaises(KeyboardInterrupt):
            Run(run.command, out, stop)
        resumed = Run(f"{run.script} --resume", out)
        self.assertEqual(resumed.files, run.files, "a resumed run ends otherwise")
        self.assertGreater(float(resumed.rows[-1]["seconds"]), float(resumed.rows[6]["seconds"]))

    def test_bad_input(self):
        Path(f"{FIRST}.pt").write_bytes(b"no checkpoint")
        cases = {"--epochs -1 --dry-run": "argument --epochs: -1 is not in [1, inf)", "--lr nan": "[1e-12",
                 "--translate 1": "not in [0, 1)", "--batch-size 1": "in [2", "--image-size 30": "multiple",
                 "--device meta": "--device", f"--out {FIRST}.pt": "--out", "--resume": "no checkpoint of",
                 "--resume --generate 1": "not allowed with", "--data . --out run": "lies in --data"}
        self.check_fails({f"{FIRST} {flags}": words for flags, words in cases.items()})
        self.assertEqual(os.listdir(), [f"{FIRST}.pt"], "a refused run leaves files")
        Run(f"{FIRST} --epochs 1", "out")
        shutil.copy(f"out/{FIRST}.pt", "out/vaegan.pt")
        make_pictures("other", "ac", 40)
        make_pictures("few", [""], 9)
        make_pictures("split/train", "ab", 4)
        make_pictures("split/test", "bc", 4)
        cases = {"--generate 1 --latent-dim 3": "other networks", "--generate 1 --out .": "train first",
                 "--resume --image-size 12": "another shape", "--resume --data other": "other classes",
                 "--data few": "9 pictures are too few", "--data split": "must have the classes of"}
        self.check_fails({f"{FIRST} --out out {flags}": words for flags, words in cases.items()})
        self.check_fails({"vaegan --generate 1 --out out": "it is of"})

    @each(*ALL)
    def test_what_is_not_finite_ends_a_run_and_is_not_saved(self, run):
        def spoil(spoilt, call):
            if len(spoilt.steps) == 25:  # the last of the second epoch: no loss will tell
                next(call[next(iter(call["before"]))].parameters()).data.fill_(math.nan)
        spoilt = functools.partial(Run, out="out", during=spoil)
        self.check_fails({run.script: "is not finite at step 26"}, 1, spoilt)
        self.assertEqual(torch.load(f"out/{run.script}.pt")["epoch"], 1, "it is saved")


class Maths(Case):
    @whole
    def test_layers(self):
        """B8: batch norm of 8; R: ReLU; l: leaky ReLU; D: dropout; 9: a layer with 9 outputs."""
        kinds = {nn.BatchNorm1d: "B", nn.BatchNorm2d: "B", nn.ReLU: "R", nn.LeakyReLU: "l", nn.Dropout: "D",
                 nn.Linear: "", nn.Conv2d: "", nn.ConvTranspose2d: ""}
        encoder, decoder, critic = "4 B4 l 16", "128 B8 R 4 B4 R 1", "4 l 8 l 16 l 1"
        table = {
            "vae --hidden 9 7": "9 B9 R 7 B7 R 16 7 B7 R 9 B9 R 64",
            "vae --arch conv": f"{encoder} {decoder}", "cvae --arch conv": f"{encoder} {decoder}",
            "vae --arch conv --norm none": "4 l 16 128 R 4 R 1",
            "cvae --hidden 9 --norm none": "9 R 16 9 R 64", "gan --arch conv": f"{decoder} {critic}",
            "gan --hidden 9 7 --dropout 0.3": "9 B9 R 7 B7 R 64 7 l D 9 l D 1",
            "cgan --hidden 9 --dropout 0.3": "9 B9 R 64 9 l D 1", "dcgan": f"{decoder} 4 l 8 B8 l 1",
            "cgan --arch conv": f"{decoder} 4 l 8 B8 l 1", "vaegan": f"{encoder} {decoder} {critic}",
            "wgan": f"{decoder} 4 l 8 l 64 l 1", "wgan --norm batch": f"{decoder} 4 l 8 B8 l 64 l 1",
            "wgan --arch mlp --hidden 9 --norm batch": "9 B9 R 64 9 B9 l 1",
        }
        for command, expected in table.items():
            module, args = load(f"{command} --latent-dim 8 --width 4")
            labels, said = [2] if args.name in ("cvae", "cgan") else [], []
            for layer in nn.ModuleList(module.make_networks(args, (1, 8, 8), *labels)).modules():
                rate = getattr(layer, "p", getattr(layer, "negative_slope", 0.2))
                if type(layer) in kinds and rate in (0.2, 0.3):
                    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", ""))
                    said.append(f"{kinds[type(layer)]}{getattr(layer, 'num_features', outputs)}")
            self.assertEqual(" ".join(said), expected, command)

    def test_networks(self):
        weight = common.he(nn.Linear(400, 300)).weight
        self.same(weight.std(), (2 / 1.04 / 400) ** 0.5, "he(): weights", 1e-3)
        features = common.conv_discriminator((1, 16, 16), 4).features
        self.assertNotIsInstance(features[-1], nn.LeakyReLU, "features: before activation")
        joined = common.Conditional(nn.Identity(), True)(torch.zeros(1, 400), torch.eye(4)[:1])
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
            self.same(scores[name], value, f"score(): {name}")
        f, g = torch.randn(2, 100_000, 3)
        fd = common.fd(f, g * torch.tensor([2.0, 3.0, 1.0]) + 1)
        self.assertAlmostEqual(fd, 3 + 1 + 4, delta=0.2)  # of means, of deviations

    def test_classifier_learns_from_the_training_set(self):
        (x, y), (test, truth) = common.draw_digits(2000, 3), common.draw_digits(500, 4)
        for channels in (1, 3):
            x, test = x[:, :1].expand(-1, channels, -1, -1), test[:, :1].expand(-1, channels, -1, -1)
            data = common.Data((x, (y + 1) % 10), (test, truth), list("0123456789"))
            with redirect_stdout(io.StringIO()):
                network = common.load_classifier(mock.Mock(device="cpu", translate=0.1), data)
            right = (truth + 1) % 10 == common.predict(network, test / 255).argmax(1)
            self.assertGreater(right.float().mean(), 0.7, "it does not know its training set's labels")


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
        x = Run(f"{FIRST} --translate 0.2 --epochs 1", "out").steps[0]["x"]
        moved = not any(x[0].equal(image) for image in pictures("train")[0])
        self.assertTrue(moved, "--translate has no say")

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
            with mock.patch.dict(os.environ, HOME=os.getcwd()):
                data = self.read(folder)
            self.assertEqual((data.classes, len(data.x_train), len(data.x_test), data.shape), expected)
        self.assertIn("Left out 1 unreadable pictures, the first is", self.printed.getvalue())

    @mock.patch("urllib.request.urlopen", side_effect=OSError("no network"))
    def test_mnist(self, _):
        self.read("auto", "--dry-run")
        self.assertRegex(self.printed.getvalue(), "MNIST was not found.*synthetic digits.*none/MNIST/raw")
        x, y = torch.arange(32).view(2, 4, 4).byte(), torch.tensor([0, 1])
        digits = mock.Mock(return_value=mock.Mock(data=x, targets=y, classes=["0", "1"]))
        with mock.patch.dict(common.TORCHVISION, mnist=digits):
            self.same(self.read("MNIST").x_train, x[:, None], "MNIST is transposed")


class Documents(Case):
    def test_every_script_runs(self):
        for script in SCRIPTS:
            run = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data=synthetic", "--out=out"]
            done = subprocess.run(run, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout + done.stderr)
            self.assertRegex(done.stdout, r"\nepoch 1/1  step 2/2  0:\d\d, 0:00 left  loss")

    @whole
    def test_documented_commands_are_understood(self):
        text = TEXT + "".join(importlib.import_module(script).__doc__ for script in ALL)
        start = r"(?:python |uv run |^\| `)(?!test_smoke|measure)"  # or a table's first cell
        for script, flags in re.findall(start + r"(\w+)\.py([^`\n|#]*)", text, re.M):
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
    @whole
    def test_mistakes_are_noticed(self):
        """python test_smoke.py Mistakes: the tests of the script alone notice each, in words."""
        for patch in sorted((HERE / "assets/mistakes").glob("*.patch")):
            changed = re.search(r"^\+\+\+ b/(\w+)\.py", patch.read_text(encoding="utf-8"), re.M)[1]
            script = "gan" if changed == "common" else changed
            with self.subTest(patch.name), tempfile.TemporaryDirectory() as folder:
                for name in (script, "common", "test_smoke"):
                    shutil.copy(HERE / f"{name}.py", folder)
                subprocess.run(["git", "apply", patch], cwd=folder, check=True)
                for flags in ([f"{script}.py", "--dry-run", "--data=synthetic"], ["test_smoke.py"]):
                    run = [sys.executable, *flags]
                    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
                    self.assertEqual(done.returncode, flags[0] == "test_smoke.py", done.stderr)
                print(patch.name, *re.findall(r"^AssertionError: (.*)", done.stderr, re.M), sep="\n  ")


if __name__ == "__main__":
    words = [word for word in sys.argv if word.removesuffix(".py") not in ALL]
    if not any(word[0] != "-" for word in words[1:]):
        words += ["Formulas", "Training", "Pictures", "Resuming", "Maths", "DataSets", "Documents"]
    unittest.main(argv=words, warnings="ignore")

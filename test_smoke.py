# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""Tests of the collection: python test_smoke.py, or pytest; no network and no data needed. Most look at a
tiny run, three epochs of 13 steps on small pictures: what it did and left is computed anew."""

import copy
import csv
import functools
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
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE / "README.md").read_text() + (HERE / "assets/reports.md").read_text()
SCRIPTS = ("vae", "cvae", "gan", "cgan", "dcgan", "wgan", "vaegan")
KINDS = [*SCRIPTS, "vae --arch conv", "vae --arch pixelcnn", "cvae --arch conv", "gan --arch conv",
         "cgan --arch conv", "wgan --arch mlp"]
TINY = "--device=cpu --data-dir=none --epochs 3 --batch-size 2 --log-every 2 --width 4".split()
OTHERS = [f"{script} --epochs 1 --seed 1 --score" for script in SCRIPTS]
TEMP = tempfile.TemporaryDirectory()
PICTURES = Path(TEMP.name, "pictures")


def make_pictures(folder, classes, n, size=(8, 8)):
    for i in range(n):
        path = Path(folder, classes[i % len(classes)], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 50).save(path)


make_pictures(PICTURES / "train", "ab", 27)
make_pictures(PICTURES / "test", "ab", 34)


def read_images(paths):
    return torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255


@functools.cache
def pictures(part):
    """Images (N, 1, 8, 8) and labels (N, 2) of the "train" or "test" folder."""
    paths = sorted(Path(PICTURES, part).glob("*/*.png"))
    y = torch.tensor(["ab".index(path.parent.name) for path in paths])
    return read_images(paths), F.one_hot(y, 2).float()


def find(x, part):
    return [[image.equal(x_i) for image in pictures(part)[0]].index(True) for x_i in x]


def listen(function, heard, check=lambda call: None):
    """`function`; of each call it puts down arguments by name, "result", networks "before" and "after"."""
    def listening(*args, **kwargs):
        call = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
        networks = {name: value for name, value in call.items() if isinstance(value, nn.Module)}
        assert all(module.training for network in networks.values() for module in network.modules())
        call["before"] = nn.ModuleDict(copy.deepcopy(networks))
        call["result"] = function(*args, **kwargs)
        check(call)
        heard.append({**call, "after": copy.deepcopy(networks)})
        return call["result"]
    return listening


class Run:
    """A run in this process: what it did, and what it left in the folder `out`."""

    def __init__(self, command, out, check=lambda run, call: None):
        self.script, *flags = command.split()
        self.module, self.out = importlib.import_module(self.script), Path(out)
        self.told = self.script in ("cvae", "cgan")  # are its networks told the labels?
        self.steps, self.sampled, self.scored = [], [], []
        flags = [f"--data={PICTURES}", f"--out={out}", *TINY, *flags]
        self.args = self.module.parse_args(flags)
        score = mock.create_autospec(common.score, return_value={"fd": 7})
        heard = {
            "train_step": listen(self.module.train_step, self.steps, lambda call: check(self, call)),
            "sample": listen(self.module.sample, self.sampled),
            "score": listen(score, self.scored),
            "load_classifier": mock.Mock(),
        }
        with mock.patch.multiple(self.module, **heard), redirect_stdout(io.StringIO()):
            self.networks = self.module.main(self.args)
        lines = (self.out / f"{self.script}.csv").read_text().splitlines()
        self.rows = [{**row, "seconds": ""} for row in csv.DictReader(lines)]
        pngs = self.out.glob(f"{self.script}_*.png")
        self.files = self.rows, {path.name: path.read_bytes() for path in pngs}
        self.saved = torch.load(self.out / f"{self.script}.pt")["parts"]

    def grid(self, what, columns):
        """The images (N, 1, 8, 8) of NAME_what.png, row by row."""
        (image,) = read_images([self.out / f"{self.script}_{what}.png"])
        cells = image[:1, 2:, 2:].unfold(1, 8, 10).unfold(2, 8, 10)
        assert cells.shape[2] == columns
        return cells.flatten(0, 2)[:, None]

    def draw(self, call):
        """What the network that draws, the last one, makes of the noise and labels of a call of sample()."""
        network = [*self.networks.values()][-1]
        logits = network(*[call[key] for key in "zy" if key in call]).detach()
        return (logits.tanh() + 1) / 2 if self.script == "dcgan" else logits.sigmoid()


def trained(call):
    """The names of a step's optimisers, and what each trains: all networks, or one each, in this order."""
    networks = nn.ModuleList(call[name] for name in call["before"])
    names = [name for name in call if name.startswith("opt")]
    return list(zip(names, networks if len(names) > 1 else [networks]))


@functools.cache
def tiny_run(command):
    return Run(command, tempfile.mkdtemp(dir=TEMP.name))


def load(command):
    script, *flags = command.split()
    module = importlib.import_module(script)
    return module, module.parse_args(["--device=cpu", "--data-dir=none", "--data=synthetic", *flags])


def close(a, b, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


class Case(unittest.TestCase):
    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(tempfile.mkdtemp(dir=TEMP.name))
        torch.manual_seed(0)

    def runs(self, commands):
        for self.command in commands:
            self._testMethodDoc = self.command  # shown if the test fails
            yield tiny_run(self.command)

    def check_fails(self, cases, status=2, run=functools.partial(Run, out=".")):
        for self.command, message in cases.items():
            with redirect_stderr(io.StringIO()) as error, redirect_stdout(io.StringIO()):
                with self.assertRaises(SystemExit) as end:
                    run(self.command)
            self.assertIn(message, error.getvalue())
            self.assertTrue(end.exception.code == status and error.getvalue().count("\n") < 3, error.getvalue())


class CommandLine(Case):
    def test_every_script_runs(self):
        for script in SCRIPTS:
            command = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data=synthetic", "--out=out"]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout + done.stderr)
            self.assertRegex(done.stdout, r"\nepoch 1/1  step 2/2  0:\d\d, 0:00 left  loss")
            self.assertEqual(os.listdir("out"), ["dry-run"])

    def test_documented_commands_are_understood(self):
        text = DOCUMENTS + "".join(importlib.import_module(script).__doc__ for script in SCRIPTS)
        start = r"(?:python |uv run |^\| `)(?!test_smoke|measure)"  # or a table's first cell
        commands = re.findall(start + r"(\w+)\.py([^`\n|#]*)", text, re.M)
        self.assertGreater(len(commands), 100)
        for script, flags in commands:
            load(script + re.sub(r"--resume|--generate \d+", "", flags))

    def test_documented_python_works(self):
        def tiny(script):
            parse_args = importlib.import_module(script).parse_args
            return lambda argv: parse_args([f"--data={PICTURES}", "--out=.", *TINY, *argv])
        Run("vae", ".")
        with (
            mock.patch("gan.parse_args", tiny("gan")), mock.patch("vae.parse_args", tiny("vae")),
            mock.patch("torchvision.datasets.MNIST", return_value=[(Image.new("L", (28, 28)), 7)]),
        ):
            for code in re.findall(r"```python\n(.*?)```", DOCUMENTS, re.S):
                if not re.search("pandas|measure.py", code):
                    self.execute(code)

    def test_measures_of_the_reports(self):
        code = re.search(r"```python\n([^`]*measure\.py: python.*?)```", DOCUMENTS, re.S)[1]
        for run in self.runs(["vaegan", "cgan", "wgan"]):
            with mock.patch("sys.argv", ["measure.py", run.script, str(run.out)]):
                found, printed = self.execute(code)
            if run.script == "vaegan":
                shown = run.grid("reconstructions", 8)[1::2]
                close(found["images"]["reconstructions"][:32], shown, 1 / 255)
            self.assertEqual("gradient of 0.weight" in printed, run.script == "wgan")

    def execute(self, code):
        two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with mock.patch("common.load_classifier", lambda *_: two), redirect_stdout(io.StringIO()) as output:
            exec(code, found := {})
        return found, output.getvalue()


class TinyRuns(Case):
    def test_csv_has_the_means_of_the_losses(self):
        for run in self.runs(KINDS):
            losses, done = [step["result"] for step in run.steps], 0
            for row in run.rows:
                part, done = losses[done : int(row["step"])], int(row["step"])
                for name in losses[0]:
                    values = [step[name] for step in part if name in step]
                    self.assertEqual(row[name] > "", len(values) > 0)
                    if values:
                        close(float(row[name]), torch.stack(values).mean().item())
                for name in {*row} - {*losses[0], "epoch", "step", "seconds"}:  # tests: at an epoch's end
                    self.assertEqual(row[name] > "", done % 13 == 0)
                self.assertTrue(int(row["epoch"]) == math.ceil(done / 13) and len(part) < 3)
            for name in row:
                self.assertRegex(run.module.__doc__, rf"\b{name}\b")

    def test_pictures_are_what_the_saved_network_draws(self):
        for run in self.runs([*KINDS, "vae --latent-dim 2"]):
            columns = {"samples": 10 if run.told else 8, "interpolation": 6}
            if "encoder" in run.networks:
                columns |= {"reconstructions": 8, "manifold": 20, "traversal": 10}
            if run.args.latent_dim > 2:
                columns.pop("manifold", None)
            for name, call in zip(columns, run.sampled[-len(columns) :]):
                shown = run.grid(name, columns[name])
                if name == "reconstructions":
                    shown = shown[1::2]
                close(shown, call["result"], 1 / 255)
                if "pixelcnn" not in self.command:  # it draws anew each time
                    close(call["result"], run.draw(call))
            row = slice(0, 20, 11) if run.told else slice(10)
            rows = [call["result"][row] for call in run.sampled[:: len(columns)]]
            close(run.grid("progress", len(rows[0])), torch.cat(rows), 1 / 255)
        log = mock.Mock(args=mock.Mock(epochs=250), samples={})
        for log.epoch in range(1, 251):
            common.Log.progress(log, torch.zeros(10, 1, 1, 1))
        self.assertEqual([*log.samples], [*range(3, 250, 3), 250])

    def test_noise_and_walks(self):
        def even(a, b):
            return torch.stack([a + (b - a) * i / 5 for i in range(6)])
        for run in self.runs(SCRIPTS):
            z, walk = run.sampled[0]["z"], run.sampled[1]
            self.assertEqual(sum(call["z"].equal(z) for call in run.sampled), 3)  # in each epoch
            self.assertLess(z.mean().abs() + (z.std() - 1).abs(), 0.4)  # it is normal
            ends = [(z[i], z[i + 1]) for i in range(16)]
            if run.told:  # a row per class, the same noise down a column
                y = torch.eye(2)
                close((run.sampled[0]["y"], z[:10]), (y.repeat_interleave(10, 0), z[10:]))
                ends = ends[:8] + [(z[i], z[i]) for i in range(8)]
                labels = [(y[i % 2], y[i % 2]) for i in range(8)]
                labels += [(y[i % 2], y[1 - i % 2]) for i in range(8)]
                close(walk["y"], torch.cat([even(*pair) for pair in labels]))
            close(walk["z"], torch.cat([even(*pair) for pair in ends]))

    def test_codes(self):
        for run in self.runs(["vae", "vae --latent-dim 2", "vae --arch conv", "cvae", "vaegan"]):
            recon, *_, traversal = run.sampled[-len(run.sampled) // 3 + 2 :]
            (x, y), which = pictures("test"), find(run.grid("reconstructions", 8)[::2], "test")
            encoder = run.networks["encoder_ema" if run.script == "vaegan" else "encoder"]
            codes = (encoder(x, y) if run.told else encoder(x)).detach().chunk(2, 1)[0]
            dims = codes[which].var(0).argsort(descending=True)[:10]  # those that vary most
            z = codes[which[:1]].repeat(len(dims), 10, 1)
            for i, dim in enumerate(dims):
                z[i, :, dim] = torch.arange(10) * 6 / 9 - 3
            close((recon["z"], traversal["z"]), (codes[which], z.flatten(0, 1)))
            if run.told:
                close((recon["y"], traversal["y"]), (y[which], y[which[:1]].repeat(10 * len(dims), 1)))
            if len(dims) == 2:
                ticks = 2**0.5 * torch.erfinv((torch.arange(20) + 0.5) / 10 - 1)
                plane = torch.stack([ticks.repeat(20), ticks.flip(0).repeat_interleave(20)], 1)  # z_2 rises
                close(run.sampled[-2]["z"], plane)
                nearest = (plane[:, None] - codes).norm(dim=2).argmin(1)
                close(run.grid("latent", 20), x[nearest], 1 / 255)

    def test_an_epoch_is_the_training_set(self):
        for run, other in zip(self.runs(SCRIPTS), map(tiny_run, OTHERS)):
            steps = [run.steps[i : i + 13] for i in (0, 13, 26)] + [other.steps]
            orders = [find(torch.cat([step["x"] for step in part]), "train") for part in steps]
            self.assertEqual([len({*order}) for order in orders], [26] * 4)
            self.assertEqual(len({order[0] * 100 + order[1] for order in orders}), 4)  # each another
            self.assertFalse(run.sampled[0]["z"].equal(other.sampled[0]["z"]))
            if run.told:
                y = torch.cat([step["y"] for step in steps[0]])
                close(y, pictures("train")[1][orders[0]])

    def test_optimizers_and_schedules(self):
        betas = {"vae": (0.9, 0.999), "cvae": (0.9, 0.999), "wgan": (0.0, 0.9), "vaegan": (0.5, 0.999)}
        betas["wgan --lipschitz clip"] = None  # RMSprop
        for run in self.runs([*SCRIPTS, "wgan --lipschitz clip"]):
            rates = {"opt": run.args.lr / 39, "opt_d": run.args.lr * vars(run.args).get("lr_d", 1)}
            for name, networks in trained(run.steps[-1]):
                (group,) = run.steps[-1][name].param_groups
                self.assertEqual([*map(id, group["params"])], [*map(id, networks.parameters())])
                close(group["lr"], rates.get(name, run.args.lr), 1e-9)  # a VAE falls to 0
                self.assertEqual(group.get("betas"), betas.get(self.command, (0.0, 0.99)))
        rising = [step["beta"] for step in tiny_run("vae --beta 4 --kl-warmup 2").steps]
        close(rising, [4 * i / 26 for i in range(26)] + [4.0] * 13)

    def test_turns_and_average_of_the_weights(self):
        for run in self.runs(["gan --d-steps 3", "cgan", "dcgan", "wgan", "vaegan", "gan --ema 0"]):
            n = {"gan --d-steps 3": 3, "wgan": 5}.get(self.command, 1)  # steps for one of the generator
            turns = [i for i, step in enumerate(run.steps) if "loss_g" in step["result"]]
            self.assertEqual(turns, [i for i in range(39) if i % 13 % n == 0])
            for name in {"encoder", "decoder", "generator"} & {*run.networks}:
                average = run.steps[0]["before"][name].state_dict()
                for i in turns:
                    step = run.steps[i]
                    decay = min(run.args.ema, (1 + i // n) / (10 + i // n))
                    for key, value in step["after"][name].state_dict().items():
                        if value.is_floating_point():
                            average[key] = decay * average[key] + (1 - decay) * value
                close(dict(run.saved[f"{name}_ema"]), dict(average))

    def test_scores_are_of_the_network_that_draws(self):
        for run in self.runs([*OTHERS, "vae --arch pixelcnn --epochs 1 --score"]):
            (scored,), call = run.scored, run.sampled[-1]
            n = 1_000 if "pixelcnn" in self.command else 10_000
            self.assertTrue(scored["x"] is call["result"] and len(call["z"]) == n)
            self.assertLess(call["z"].mean().abs() + (call["z"].std() - 1).abs(), 0.1)
            self.assertEqual(scored.get("binarize", False), n == 1_000)
            self.assertEqual([row["fd"] for row in run.rows], [""] * 6 + ["7"])
            if n > 1_000:
                close(call["result"], run.draw(call))
            if run.told:
                y = torch.eye(2).repeat(n // 2, 1)
                close((call["y"], scored["labels"]), (y, y.argmax(1)))

    def test_generate(self):
        for run in self.runs(SCRIPTS):
            (call,) = Run(f"{run.script} --generate 6", run.out).sampled
            folders = ["a", "b"] * 3 if run.told else [f"{run.script}_generated"] * 6
            paths = sorted(run.out.rglob("00*.png"), key=lambda path: path.name)
            self.assertEqual([path.parent.name for path in paths], folders)
            close(read_images(paths), run.draw(call), 0.51 / 255)
            self.assertLess(call["z"].min(), -0.5)
            close(call.get("y", torch.eye(2).repeat(3, 1)), torch.eye(2).repeat(3, 1))
            loaded = Run(f"{run.script} --generate 0", run.out).networks
            close(dict(loaded.state_dict()), dict(run.networks.state_dict()))
            self.assertFalse(any(module.training for module in loaded.modules()))


class Resuming(Case):
    def test_resumed_run_ends_like_one_that_was_not_stopped(self):
        def stop(run, call):
            if len(run.steps) == 14:  # in the second epoch
                raise KeyboardInterrupt
        for through in self.runs(KINDS):
            with self.assertRaises(KeyboardInterrupt):
                Run(self.command, "out", stop)
            self.assertEqual(Run(f"{through.script} --resume", "out").files, through.files)

    def test_moments_from_another_kind_of_device(self):
        with mock.patch("dcgan.to_device", lambda network, device: network):  # not channels_last
            Run("dcgan --epochs 1", "out")
        for row, expected in zip(Run("dcgan --resume --epochs 2", "out").rows, tiny_run("dcgan").rows):
            self.assertAlmostEqual(float(row["loss_g"]), float(expected["loss_g"]), delta=1e-4)

    def test_bad_input(self):
        Path("vaegan.pt").write_bytes(b"no checkpoint")
        cases = {
            "--epochs -1 --dry-run": "argument --epochs: -1 is not in [1, inf)", "--lr nan": "nan is not in [1e-12",
            "--ema 1": "1 is not in [0, 1)", "--batch-size 1": "not in [2", "--image-size 30": "multiple of 4",
            "--device meta": "--device meta", "--out vaegan.pt": "--out", "--resume": "no checkpoint of vaegan.py",
            "--resume --generate 1": "not allowed with",
            "--data . --out run": "--out run lies in --data",
        }
        self.check_fails({f"vaegan {flags}": message for flags, message in cases.items()})
        self.assertEqual(os.listdir(), ["vaegan.pt"])
        Run("vae", "out")
        Path("out/gan.pt").write_bytes(Path("out/vae.pt").read_bytes())
        self.check_fails({
            "vae --generate 1 --out out --width 8 --arch conv": "other networks",
            "vae --resume --out out --hidden 9": "other networks",
            "gan --generate 1 --out out": "of vae.py", "vae --generate 1": "train first",
            f"vae --resume --out out --epochs 4 --image-size 12": "another shape, (1, 8, 8)",
        })

    def test_what_is_not_finite_ends_a_run_and_is_not_saved(self):
        def spoil(run, call):
            if len(run.steps) == 25:  # of 26 in two epochs: no loss will tell
                call["encoder"][1][0].weight.data.fill_(math.nan)
        run = functools.partial(Run, out="out", check=spoil)
        self.check_fails({"vae": "encoder.1.0.weight is not finite at step 26"}, 1, run)
        self.assertEqual(torch.load("out/vae.pt")["epoch"], 1)
        self.check_fails({"vae --lr 1e30 --opt sgd": "loss is not finite at step 2:"}, 1, run)
        self.assertIn("\n2,24,", Path("out/vae.csv").read_text())  # still


class Maths(Case):
    def test_layers(self):
        """C8x4: a convolution from 4 to 8 channels; l: leaky ReLU of slope 0.2; D: dropout of 0.2 ..."""
        kinds = {nn.Linear: "L", nn.Conv2d: "C", nn.ConvTranspose2d: "T", nn.BatchNorm1d: "B", nn.ReLU: "R",
                 nn.BatchNorm2d: "B", nn.LeakyReLU: "l", nn.Dropout: "D", nn.Flatten: "F", nn.Unflatten: "U"}
        encoder, decoder = "C4x1 B4 l F L16x64", "L128x8 U B8 R T8x4 B4 R T4x1"
        discriminator, dcgan = "C4x1 l C8x4 l F L16x32 l L1x16 F", "C4x1 l C8x4 B8 l F L1x32 F"
        table = {
            "vae --hidden 9 7": "F L9x64 B9 R L7x9 B7 R L16x7 L7x8 B7 R L9x7 B9 R L64x9 U",
            "vae --hidden 9 --norm none": "F L9x64 R L16x9 L9x8 R L64x9 U",
            "vae --arch conv": f"{encoder} {decoder}",
            "cvae --arch conv": "C4x3 B4 l F L16x64 L128x10 U B8 R T8x4 B4 R T4x1",
            "gan --hidden 9 7": "L9x8 B9 R L7x9 B7 R L64x7 U F L7x64 l D L9x7 l D L1x9 F",
            "gan --arch conv": f"{decoder} {discriminator}",
            "cgan --hidden 9": "L9x10 B9 R L64x9 U L9x66 l D L1x9 F",
            "cgan --arch conv": f"L128x10 U B8 R T8x4 B4 R T4x1 C4x3{dcgan[4:]}",
            "dcgan": f"{decoder} {dcgan}",
            "wgan": f"{decoder} C4x1 l C8x4 l F L64x32 l L1x64 F",
            "wgan --arch mlp --hidden 9 --norm batch": "L9x8 B9 R L64x9 U F L9x64 B9 l L1x9 F",
            "vaegan": f"{encoder} {decoder} {discriminator}",
        }
        for command, expected in table.items():
            said = []
            for name, layer in tiny_run(f"{command} --latent-dim 8 --epochs 1").networks.named_modules():
                rate = getattr(layer, "p", getattr(layer, "negative_slope", 0.2))
                if type(layer) in kinds and rate == 0.2 and "_ema" not in name:
                    shape = getattr(layer, "weight", torch.ones(())).shape[:2]
                    said.append(kinds[type(layer)] + "x".join(map(str, shape)))
            self.assertEqual(said, expected.split())
        for name, weight in tiny_run("dcgan").steps[0]["before"].named_parameters():
            if name.endswith("weight"):  # as in the paper's code
                close((weight.mean().item(), weight.std().item()), (float(weight.dim() == 1), 0.02), 0.015)

    def check(self, command, by_hand):
        """Two steps of plain gradient descent, by the script and by the formulas of its docstring."""
        run = tiny_run(command)
        torch.set_default_dtype(torch.float64)
        given = run.steps[0]
        ours, theirs = (copy.deepcopy(given["before"]).double() for _ in range(2))
        given = {**given, **theirs, "x": given["x"].double()}
        for name, networks in trained(given):
            given[name] = torch.optim.SGD(networks.parameters(), 0.01)
        given = {name: given[name] for name in inspect.signature(run.module.train_step).parameters}
        y = [given["y"]] if "y" in given else []
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = by_hand(run.args, given["x"], y, *ours.values())
            torch.manual_seed(seed)
            losses = run.module.train_step(**given)
            close(losses, {name: expected[name].mean().detach() for name in losses})
        torch.set_default_dtype(torch.float32)
        close([*theirs.parameters()], [*ours.parameters()], 1e-9, 0)

    def descend(self, loss, *networks):
        parameters = [parameter for network in networks for parameter in network.parameters()]
        gradients = torch.autograd.grad(loss.mean(), parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.data -= 0.01 * gradient

    def encode(self, encoder, x, *y):
        mu, logvar = encoder(x, *y).chunk(2, 1)
        kl = (mu.square() + logvar.exp() - 1 - logvar).sum(1) / 2
        return mu + (logvar / 2).exp() * torch.randn_like(mu), kl

    def elbo(self, args, x, y, encoder, decoder):
        z, kl = self.encode(encoder, x, *y)
        logits = decoder(z, *y)
        p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
        if "mse" in vars(args).values():
            p = torch.distributions.Normal(logits.sigmoid(), 0.5**0.5)
        return -p.log_prob(x).flatten(1).sum(1), kl

    def test_updates_of_vae(self):
        def by_hand(args, x, y, encoder, decoder):
            recon, kl = self.elbo(args, x, y, encoder, decoder)
            self.descend(recon + 3 * kl, encoder, decoder)
            return {"loss": recon + 3 * kl, "loss_recon": recon, "loss_kl": kl}
        for command in ("vae --arch conv", "vae --arch conv --recon mse", "cvae --arch conv"):
            self.check(f"{command} --beta 3", by_hand)

    def test_negative_elbo_of_the_test_set(self):
        for run in self.runs(["vae --recon mse", "cvae", "vae --binarize --latent-dim 2", "cvae --binarize"]):
            latent = run.grid("latent", 20) if run.args.latent_dim == 2 else run.steps[0]["x"]
            for seen in (run.steps[-1]["x"], run.grid("reconstructions", 8)[::2], latent):
                self.assertEqual(len(seen.unique()) == 2, run.args.binarize)
            with redirect_stdout(io.StringIO()):
                x, labels = next(common.load_data(run.args).test_batches(run.args.binarize))
            y = [F.one_hot(labels)] if run.told else []
            torch.manual_seed(run.args.seed)
            recon, kl = self.elbo(run.args, x, y, *run.networks.values())
            for name, value in {"neg_elbo": recon + kl, "recon": recon, "kl": kl}.items():
                close(float(run.rows[-1][f"test_{name}"]), value.mean().item(), 1e-3)

    def test_updates_of_vaegan(self):
        def by_hand(args, x, y, e, g, d):
            z, kl = self.encode(e, x)
            x_recon, x_fake = g(torch.cat([z, torch.randn_like(z)])).sigmoid().chunk(2)
            real, recon, fake = d(x), d(x_recon), d(x_fake)
            features = (d.features(x) - d.features(x_recon)).square().flatten(1).sum(1) / 2
            loss_d = -F.logsigmoid(real) - F.logsigmoid(-recon) - F.logsigmoid(-fake)
            loss_g = 0.1 * features - F.logsigmoid(recon) - F.logsigmoid(fake)
            self.descend(8 * kl + features, e)
            self.descend(loss_g, g)
            self.descend(loss_d, d)
            return {"loss_d": loss_d, "loss_g": loss_g, "loss_kl": kl, "loss_features": features,
                    "d_real": real.sigmoid(), "d_recon": recon.sigmoid(), "d_fake": fake.sigmoid()}
        self.check("vaegan --gamma 0.1", by_hand)

    def test_updates_of_gans(self):
        def by_hand(args, x, y, g, d):
            x_fake = g(torch.randn(2, args.latent_dim), *y)
            if args.name == "dcgan":
                x_fake, x = x_fake.tanh(), 2 * x - 1
            else:
                x_fake = x_fake.sigmoid()
            real, fake = d(x, *y), d(x_fake, *y)
            loss_d, penalty = -F.logsigmoid(real) - F.logsigmoid(-fake), torch.zeros(())
            if args.name == "wgan":
                if args.lipschitz == "gp":
                    penalty = load("wgan")[0].gradient_penalty(d, x, x_fake.detach())
                loss_d = fake - real + 10 * penalty
            self.descend(loss_d, d)
            for weight in d.parameters():
                weight.data.clamp_(-vars(args).get("clip", 99), vars(args).get("clip", 99))
            again = d(x_fake, *y)
            loss_g = -again if args.name == "wgan" else -F.logsigmoid(again)
            if "minimax" in vars(args).values():
                loss_g = F.logsigmoid(-again)
            self.descend(loss_g, g)
            return {"loss_d": loss_d, "loss_g": loss_g, "d_real": real.sigmoid(), "d_fake": fake.sigmoid(),
                    "wasserstein": real - fake, "penalty": penalty}
        for command in ("gan --arch conv", "gan --arch conv --loss minimax", "cgan --arch conv", "dcgan",
                        "wgan --clip 99", "wgan --lipschitz clip"):
            self.check(command, by_hand)

    def test_gradient_penalty(self):
        def critic(x_hat):  # of gradient weight * x_hat
            heard.append(x_hat)
            return weight * x_hat.square().flatten(1).sum(1) / 2
        heard, weight, fake = [], torch.tensor(3.0, requires_grad=True), torch.ones(500, 1, 2, 2)
        penalty = load("wgan")[0].gradient_penalty(critic, torch.zeros_like(fake), fake)
        epsilon = heard[0][:, :, :1, :1]  # one for each image, between 0 and 1
        close(heard[0], epsilon * fake)
        self.assertLess((epsilon.mean() - 0.5).abs() + (epsilon.std() - 12**-0.5).abs(), 0.1)
        close(penalty, (3 * epsilon * 2 - 1).square().mean())
        self.assertTrue(torch.autograd.grad(penalty, weight)[0].any())

    def test_pixelcnn(self):
        decoder = load("vae")[0].PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval()
        z, x = torch.randn(2, 3), torch.rand(2, 1, 12, 12).round().requires_grad_()
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(decoder(z, x).flatten(1)[:, i].sum(), x)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertTrue((seen < i).all() and bool(len(seen)) == (i > 0))
        with mock.patch("torch.bernoulli", torch.round):  # each pixel from z and those before it
            drawn = common.predict(decoder, z).sigmoid()
            close(drawn, (decoder(z, drawn) > 0).float())

    def test_scores(self):
        real, fake, labels = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
        data = common.Data((labels, labels), (labels[:, None], labels), ["a", "b"])
        predict = mock.Mock(side_effect=[real, fake, torch.eye(2)[[0, 1, 1, 1]]])
        measures = dict.fromkeys(["fd", "covered"], lambda *pair: pair)
        with mock.patch.multiple(common, predict=predict, **measures):
            score = common.score(nn.Sequential(nn.Identity(), nn.Identity()), data, None, labels)
        pairs = [score.pop(name) for name in ("fd", "precision", "recall")]
        close(pairs, [(fake, real), (fake, real), (real, fake)])
        kl = math.log(0.25 / 0.75) / 4 + math.log(0.75 / 0.25) * 3 / 4
        close(score, {"classes": 2, "class_kl": kl, "label_accuracy": 0.5})
        centres = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [100.0]])  # radii 3 2 2 2 3 98
        points = torch.tensor([[-2.9], [-3.1], [6.9], [197.0], [199.0]])
        for point, inside in zip(points, [1, 0, 1, 1, 0]):
            self.assertEqual(common.covered(point[None], centres), inside)
        f = torch.randn(100_000, 3)
        g = torch.randn(100_000, 3) * torch.tensor([2.0, 3.0, 1.0]) + 1
        self.assertAlmostEqual(common.fd(f, g), 3 + 1 + 4, delta=0.2)  # of means, of deviations


class DataSets(Case):
    def read(self, data, flags=""):
        with redirect_stdout(io.StringIO()) as output:
            return common.load_data(load(f"vae --batch-size 2 --data {data} {flags}")[1]), output.getvalue()

    def test_shifted_images(self):
        x = F.pad(torch.ones(2000, 2, 1, 3), (10, 7, 10, 9)) * (1 + torch.arange(2000))[:, None, None, None]
        moved = common.shift(x, 0.1)
        _, _, row, column = moved.nonzero().T
        self.assertEqual(row.unique().tolist() + column.unique().tolist(), [*range(8, 13), *range(8, 15)])
        close(moved.sum((1, 2, 3)), x.sum((1, 2, 3)))
        plain, once, again = (self.read(PICTURES, f"--translate {t}")[0].x_test for t in (0, 0.2, 0.2))
        self.assertTrue(once.equal(again) and not once.equal(plain))

    def test_folders(self):
        make_pictures("d", "9 10 11".split(), 24, (20, 16))
        for red in ("d/9/red.png", "d/cover.png"):
            Image.new("RGB", (9, 9), "red").save(red)
        make_pictures("split/Train", "ba", 20)
        make_pictures("split/test", "ab", 4)
        make_pictures("split/val", "b", 4)
        cases = {"d": (["10", "11", "9"], 23, 2, (3, 16, 16)), "split": (["a", "b"], 20, 4, (1, 8, 8))}
        for folder, expected in cases.items():
            with mock.patch.dict(os.environ, HOME=os.getcwd()):
                data, printed = self.read(f"~/{folder}")
            self.assertEqual((data.classes, len(data.x_train), len(data.x_test), data.shape), expected)
        self.assertRegex(printed, "training set is .*/split/Train, the test set .*/split/test")
        self.assertEqual(sorted(data.y_test.tolist()), [0, 0, 1, 1])

    def test_what_is_refused_and_why(self):
        folders = {"deep/pictures/train": ("ab", 30), "other/train": ("ab", 30), "other/test": ("bc", 30),
                   "poor": ("ab", 30), "flat": ([""], 99), "few": ([""], 9), "broken": ([""], 30)}
        for folder, (classes, n) in folders.items():
            make_pictures(folder, classes, n)
        make_pictures("poor", "c", 1)
        Path("broken/09.png").write_bytes(b"no picture")
        self.check_fails({
            "vae --data deep": "point --data at one of the folders in", "vae --data missing": "No such file",
            "vae --data other": "must have the classes of the training set",
            "vae --data few": "9 pictures are too few, it takes ten", "cgan --data flat": "one class",
            "vae --data flat --batch-size 99": "90 training images do not fill", "cvae --data poor": "class c needs ten",
        })
        self.assertEqual(len(self.read("poor")[0].x_train), 28)  # a VAE does not look at labels
        data, printed = self.read("broken")
        self.assertEqual(len(data.x_train) + len(data.x_test), 29)
        self.assertRegex(printed, "Left out 1 unreadable pictures, the first is .*09.png")

    @mock.patch("urllib.request.urlopen", side_effect=OSError("no network"))
    def test_mnist_from_files(self, _):
        _, printed = self.read("auto", "--dry-run")
        self.assertRegex(printed, "MNIST was not found.*training on synthetic digits.*none/MNIST/raw")
        for part, n in (("train", 300), ("t10k", 20)):
            path = Path(f"none/MNIST/raw/{part}-labels-idx1-ubyte")
            path.write_bytes(bytes([0, 0, 8, 1, 0, 0, n // 256, n % 256]) + bytes(n))
            path = path.with_name(f"{part}-images-idx3-ubyte")
            sizes = [0, 0, n // 256, n % 256, 0, 0, 0, 28, 0, 0, 0, 28]
            path.write_bytes(bytes([0, 0, 8, 3, *sizes]) + bytes(n * 784))
        self.assertEqual(self.read("MNIST")[0].x_train.shape, (300, 1, 28, 28))
        path.write_bytes(b"truncated")
        self.check_fails({"vae --data auto": "four files belong into none/MNIST/raw"})


if __name__ == "__main__":
    unittest.main(warnings="ignore")

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision"]
# ///
"""Tests of the collection: python test_smoke.py, or pytest; no network and no data needed.

Most look at a tiny run, three epochs of 13 steps on small pictures: what it did and left is computed anew.
"""

import atexit
import contextlib
import copy
import csv
import functools
import importlib
import inspect
import io
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common

HERE = Path(__file__).resolve().parent
SCRIPTS = ("vae", "cvae", "gan", "cgan", "dcgan", "wgan", "vaegan")
KINDS = [*SCRIPTS, "vae --arch conv", "vae --arch pixelcnn", "cvae --arch conv", "gan --arch conv",
         "cgan --arch conv", "wgan --arch mlp"]
OTHERS = [f"{script} --epochs 1 --seed 1 --width 16 --score" for script in SCRIPTS]
TEMP = tempfile.TemporaryDirectory()
atexit.register(TEMP.cleanup)
PICTURES = Path(TEMP.name, "pictures")


# ----- Tiny runs -------------------------------------------------------------------------------
def make_pictures(folder, classes, n, size=(8, 8)):
    """n grey pictures, each class in turn; [""]: a flat folder."""
    for i in range(n):
        path = Path(folder, classes[i % len(classes)], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 50).save(path)


def read_images(paths):
    return torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@functools.cache
def pictures(part):
    """Images (N, 1, 8, 8) and labels (N, 2) of the "train" or "test" folder."""
    paths = sorted(Path(PICTURES, part).glob("*/*.png"))
    y = torch.tensor(["ab".index(path.parent.name) for path in paths])
    return read_images(paths), F.one_hot(y, 2).float()


def find(x, part):
    """Where the images x are among the pictures()."""
    return [[image.equal(x_i) for image in pictures(part)[0]].index(True) for x_i in x]


def weights_of(call):
    modules = {name: value for name, value in call.items() if isinstance(value, nn.Module)}
    assert all(module.training for module in modules.values())
    return {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}


def listen(function, heard, check=lambda call: None):
    """`function`; of each call it puts down arguments by name, "result", and the weights before and after."""
    def listening(*args, **kwargs):
        call = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
        call |= {"before": weights_of(call), "result": function(*args, **kwargs)}
        check(call)
        heard.append({**call, "after": weights_of(call)})
        return call["result"]
    return listening


class Run:
    """A run in this process: what it did, and what it left in the folder `out`."""

    def __init__(self, command, out, check=lambda run, call: None):
        self.script, *flags = command.split()
        self.module, self.out = importlib.import_module(self.script), Path(out)
        self.told = self.script in ("cvae", "cgan")  # are its networks told the labels?
        self.steps, self.sampled, self.scored = [], [], []
        if not {"--resume", "--generate"} & {*flags}:
            flags = "--epochs 3 --batch-size 2 --log-every 2 --width 4".split() + flags
        self.args = self.module.parse_args(["--device=cpu", f"--data={PICTURES}", f"--out={out}", *flags])
        score = mock.create_autospec(common.score, return_value={"fd": 7})
        heard = {
            "train_step": listen(self.module.train_step, self.steps, lambda call: check(self, call)),
            "sample": listen(self.module.sample, self.sampled),
            "score": listen(score, self.scored),
            "load_classifier": mock.Mock(),
        }
        with mock.patch.multiple(self.module, **heard), contextlib.redirect_stdout(io.StringIO()) as output:
            self.networks = self.module.main(self.args)
        self.printed = output.getvalue()

        self.rows = [{**row, "seconds": ""} for row in read_csv(self.out / f"{self.script}.csv")]
        self.files = self.rows, {path.name: path.read_bytes() for path in self.out.glob("*.png")}
        self.saved = torch.load(self.out / f"{self.script}.pt")["parts"]

    def grid(self, what, columns):
        """The images (N, 1, 8, 8) of NAME_what.png, row by row."""
        (image,) = read_images([self.out / f"{self.script}_{what}.png"])
        cells = image[:1, 2:, 2:].unfold(1, 8, 10).unfold(2, 8, 10)
        assert cells.shape[2] == columns
        return cells.flatten(0, 2)[:, None]

    def draw(self, call):
        """What the saved network that draws makes of the noise and labels of a call of sample()."""
        names = {"vae": "decoder", "cvae": "decoder", "vaegan": "decoder_ema"}
        name = names.get(self.script, "generator_ema")
        self.networks[name].load_state_dict(self.saved[name])
        logits = self.networks[name](*[call[key] for key in "zy" if key in call]).detach()
        return (logits.tanh() + 1) / 2 if self.script == "dcgan" else logits.sigmoid()


def trained(call):
    """The optimisers of a step by name, and the networks that each trains: all, or one each."""
    modules = [value for value in call.values() if isinstance(value, nn.Module)]
    optimizers = [item for item in call.items() if item[0].startswith("opt")]
    groups = [modules] if len(optimizers) == 1 else [[module] for module in modules]
    return list(zip(optimizers, map(nn.ModuleList, groups)))


@functools.cache
def tiny_run(command):
    return Run(command, tempfile.mkdtemp(dir=TEMP.name))


def load(command):
    """The script of a command as a module, and what its flags parse to."""
    script, *flags = command.split()
    module = importlib.import_module(script)
    return module, module.parse_args(["--device=cpu", "--data-dir=none", "--data=synthetic", *flags])


def call(command):
    module, args = load(command)
    return module.main(args)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        torch.manual_seed(0)
        if not PICTURES.exists():
            make_pictures(PICTURES / "train", "ab", 27)
            make_pictures(PICTURES / "test", "ab", 34)

    def runs(self, commands):
        for self.command in commands:
            yield tiny_run(self.command)

    def shortDescription(self):  # of a test that failed: at which command
        return vars(self).get("command")

    def check_fails(self, cases, status=2, run=call):
        """Each command ends with this status and a line on stderr, argparse's with two, that says this."""
        for self.command, message in cases.items():
            with contextlib.redirect_stderr(io.StringIO()) as error, self.assertRaises(SystemExit) as end:
                with contextlib.redirect_stdout(io.StringIO()):
                    run(self.command)
            self.assertIn(message, error.getvalue())
            self.assertTrue(end.exception.code == status and error.getvalue().count("\n") < 3)


class CommandLine(Case):
    def test_every_script_runs(self):
        for script in SCRIPTS:
            command = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data=synthetic", "--out=out"]
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout + done.stderr)
            self.assertTrue(Path(f"out/dry-run/{script}.pt").exists())

    def test_documented_commands_and_flags_exist(self):
        readme = (HERE / "README.md").read_text()
        reports = (HERE / "assets/reports.md").read_text().replace("\n", " ")
        text = readme + reports + "".join(importlib.import_module(script).__doc__ for script in SCRIPTS)
        commands = re.findall(r"(?:python|uv run) (?!test_smoke|measure)(\w+)\.py([^`\n|#]*)", text)
        self.assertGreater(len(commands), 2 * len(SCRIPTS))
        for script, flags in commands:
            load(script + re.sub(r"--resume|--generate \d+", "", flags))
        section = readme.split("## Flags")[1].split("##")[0]
        named = {*re.findall(r"--[a-z][a-z-]*", section)} - {"--help"}
        code = "".join((HERE / f"{name}.py").read_text() for name in [*SCRIPTS, "common"])
        self.assertLessEqual(named, {*re.findall(r'add\("(--[a-z-]+)"', code)})
        args = load("vae --arch conv --batch-size 5")[1]
        self.assertEqual((args.batch_size, args.latent_dim), (5, 8))  # what is given goes before

    def test_measures_of_the_reports_work_on_what_a_run_leaves(self):
        reports = (HERE / "assets/reports.md").read_text()
        measure = re.search(r"import [^`]*measure\.py: python[^`]*", reports)[0]
        two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        for script, word in {"vaegan": "label kept", "cgan": "sure", "wgan": "gradient of 0.weight"}.items():
            argv = mock.patch.object(sys, "argv", ["measure.py", script, str(tiny_run(script).out)])
            with argv, mock.patch("common.load_classifier", lambda args, data: two):
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(measure, {})
            self.assertIn(word, output.getvalue())

    def test_bad_input(self):
        Path("vaegan.pt").write_bytes(b"no checkpoint")
        cases = {
            "--epochs -1": "--epochs -1: must be at least 1", "--lr nan": "--lr nan: must be",
            "--lr 0": "--lr 0.0: must be", "--ema 1": "below 1", "--batch-size 1": "at least 2",
            "--image-size 30": "multiple of 4", "--device meta": "--device meta",
            "--out vaegan.pt": "--out vaegan.pt", "--resume --out .": "no whole checkpoint",
        }
        self.check_fails({f"vaegan {flags}": message for flags, message in cases.items()})
        self.assertEqual(os.listdir(), ["vaegan.pt"])


class TinyRuns(Case):
    def test_csv_has_the_means_of_the_losses_by_their_documented_names(self):
        for run in self.runs(KINDS):
            block = run.module.__doc__.split("Columns of")[1]
            names = ", ".join(re.findall(r"^    (\w+(?:, \w+)*)(?:  |$)", block, re.M)).split(", ")
            losses, kept = [], {}
            for step in run.steps:  # a generator that rests keeps its loss
                kept = {**kept, **step["result"]}
                losses.append(kept)
            for row in run.rows:
                done = int(row["step"])
                part, losses = losses[: len(losses) - 39 + done], losses[len(losses) - 39 + done :]
                means = {name: torch.stack([step[name] for step in part]).mean().item() for name in kept}
                close({name: float(row[name]) for name in kept}, means)
                tests = [row[name] > "" for name in names if name not in kept]
                self.assertEqual(tests, [done % 13 == 0] * len(tests))
                self.assertTrue(len(part) < 3 and int(row["epoch"]) == math.ceil(done / 13))
            self.assertEqual((done, {*row}), (39, {"epoch", "step", "seconds", *names}))

    def test_pictures_are_what_the_saved_network_draws(self):
        for run in self.runs([*KINDS, "vae --latent-dim 2"]):
            names = {"samples": 10 if run.told else 8, "interpolation": 6}  # and columns
            if "encoder" in run.networks:
                names |= {"reconstructions": 8, "manifold": 20, "traversal": 10}
            if vars(run.args)["latent_dim"] > 2:
                names.pop("manifold", None)
            for name, call in zip(names, run.sampled[-len(names) :]):
                shown = run.grid(name, names[name])
                close(shown[1::2] if name == "reconstructions" else shown, call["result"], 1 / 255)
                if "pixelcnn" not in self.command:  # it draws anew each time
                    close(call["result"], run.draw(call))
            rows = [call["result"][:: 11 if run.told else 1][:10] for call in run.sampled[:: len(names)]]
            close(run.grid("progress", 2 if run.told else 10), torch.cat(rows), 1 / 255)

    def test_noise_and_walks(self):
        for run in self.runs(SCRIPTS):
            z, walk, even = run.sampled[0]["z"], run.sampled[1], torch.arange(6)[:, None] / 5
            self.assertEqual(sum(call["z"].equal(z) for call in run.sampled), 3)  # in each epoch
            self.assertLess(z.mean().abs() + (z.std() - 1).abs(), 0.4)  # it is normal
            first, second = [*range(16)], [*range(1, 17)]
            if run.told:  # a row per class, the same noise down a column
                close((run.sampled[0]["y"], z[:10]), (torch.eye(2).repeat_interleave(10, 0), z[10:]))
                first, second = [*range(8), *range(8)], [*range(1, 9), *range(8)]
                ends = torch.eye(2).repeat(8, 1)[first], torch.eye(2).repeat(8, 1)[[*range(8), *range(1, 9)]]
                close(walk["y"].view(16, 6, 2), torch.lerp(ends[0][:, None], ends[1][:, None], even))
            close(walk["z"].view(16, 6, -1), torch.lerp(z[first][:, None], z[second][:, None], even))

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
            self.assertEqual(len({*which}), 32)
            close((recon["z"], traversal["z"]), (codes[which], z.flatten(0, 1)))
            if run.told:
                close((recon["y"], traversal["y"]), (y[which], y[which[:1]].repeat(10 * len(dims), 1)))
            if len(dims) == 2:
                ticks = 2**0.5 * torch.erfinv((torch.arange(20) + 0.5) / 10 - 1)
                plane = torch.stack([ticks.repeat(20), ticks.flip(0).repeat_interleave(20)], 1)  # z_2 rises
                close(run.sampled[-2]["z"], plane)
                nearest = (plane[:, None] - codes).norm(dim=2).argmin(1)
                close(run.grid("latent", 20), x[nearest], 1 / 255)

    def test_an_epoch_is_the_training_set_and_labels_belong_to_images(self):
        for run, other in zip(self.runs(SCRIPTS), map(tiny_run, OTHERS)):
            steps = [run.steps[i : i + 13] for i in (0, 13, 26)] + [other.steps]
            orders = [find(torch.cat([step["x"] for step in part]), "train") for part in steps]
            self.assertEqual([len({*order}) for order in orders], [26] * 4)
            self.assertEqual(len({order[0] * 100 + order[1] for order in orders}), 4)  # each another
            self.assertFalse(run.sampled[0]["z"].equal(other.sampled[0]["z"]))
            if run.told:
                y = torch.cat([step["y"] for step in steps[0]])
                close(y, pictures("train")[1][orders[0]])

    def test_optimizers(self):
        betas = {"vae": (0.9, 0.999), "cvae": (0.9, 0.999), "wgan": (0.0, 0.9), "vaegan": (0.5, 0.999)}
        for run in self.runs(SCRIPTS):
            rates = {"opt": run.args.lr / 39, "opt_d": run.args.lr * vars(run.args).get("lr_d", 1)}
            for step in run.steps:
                self.assertTrue(all(step[name] is run.networks[name] for name in step["before"]))
            for (name, optimizer), networks in trained(step):
                (group,) = optimizer.param_groups
                self.assertEqual([*map(id, group["params"])], [*map(id, networks.parameters())])
                close(group["lr"], rates.get(name, run.args.lr), 1e-9)  # a VAE's falls to 0
                self.assertEqual(group["betas"], betas.get(run.script, (0.0, 0.99)))
        optimizer = tiny_run("vae --lr-schedule constant --opt rmsprop").steps[0]["opt"]
        self.assertEqual((optimizer.param_groups[0]["lr"], type(optimizer)), (3e-3, torch.optim.RMSprop))

    def test_average_of_the_weights(self):
        for run in self.runs(["gan", "cgan", "dcgan", "wgan", "vaegan", "gan --ema 0"]):
            turns = [step for step in run.steps if "loss_g" in step["result"]]
            for name in {"encoder", "decoder", "generator"} & {*run.networks}:
                average = run.steps[0]["before"][name]
                for i, step in enumerate(turns):
                    k = [0, 1, 2, 2, 3, 4, 5, 6, 7][i] if run.script == "wgan" else i  # 0, 5, 10, 13 ... // 5
                    decay = min(run.args.ema, (1 + k) / (10 + k))
                    for key, value in step["after"][name].items():
                        kept = decay if value.is_floating_point() else 0
                        average[key] = kept * average[key] + (1 - kept) * value
                close(dict(run.saved[f"{name}_ema"]), dict(average))

    def test_scores_are_of_samples_of_the_network_that_draws(self):
        for run in self.runs([*OTHERS, "vae --arch pixelcnn --epochs 1 --score"]):
            (scored,), call, n = run.scored, run.sampled[-1], 1_000 if "pixel" in self.command else 10_000
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
            self.assertFalse(any(module.training for module in [*loaded.modules(), *run.networks.modules()]))

    def test_turns_weights_and_bounds(self):
        for command, n in {"gan --d-steps 3": 3, "wgan": 5}.items():
            turns = ["loss_g" in step["result"] for step in tiny_run(command).steps]
            self.assertEqual(turns, [i % n == 0 for i in range(13)] * 3)
        run = tiny_run("vae --beta 4 --kl-warmup 2 --binarize")
        close([step["beta"] for step in run.steps], [4 * i / 26 for i in range(26)] + [4.0] * 13)
        for run in (run, tiny_run("cvae --binarize")):
            x, shown = torch.cat([step["x"] for step in run.steps]), run.grid("reconstructions", 8)[::2]
            self.assertEqual((x.unique().tolist(), shown.unique().tolist()), ([0, 1], [0, 1]))
            self.assertLess((x.mean() - pictures("train")[0].mean()).abs(), 0.05)


class Resuming(Case):
    def test_stopped_and_resumed_run_leaves_the_files_of_one_that_was_not(self):
        def stop(run, call):
            if len(run.steps) == 14:  # in the second epoch
                raise KeyboardInterrupt

        for through in self.runs(KINDS):
            with tempfile.TemporaryDirectory() as out:
                with self.assertRaises(KeyboardInterrupt):
                    Run(self.command, out, stop)
                self.assertEqual(Run(f"{through.script} --resume", out).files, through.files)

    def test_moments_from_another_kind_of_device(self):
        def elsewhere(network, device):  # where convolutions are stored in another order than on a CPU
            return network.to(device, memory_format=torch.contiguous_format)

        with mock.patch("dcgan.to_device", elsewhere):
            moments = Run("dcgan --epochs 1", "out").steps[-1]["opt_g"].state_dict()["state"]
        with mock.patch("torch.optim.Adam.step"):
            step = Run("dcgan --resume --epochs 2", "out").steps[0]
        for i, weight in enumerate(step["generator"].parameters()):
            moment = step["opt_g"].state[weight]["exp_avg"]
            self.assertEqual(moment.stride(), weight.stride())
            close(moment, moments[i]["exp_avg"])

    def test_what_cannot_be_resumed_or_generated(self):
        through = tiny_run("vae --lr-schedule constant")
        before = Run("vae --lr-schedule constant --epochs 2", "out").files
        again = Run("vae --resume", "out")
        self.assertIn("is at epoch 2 of 2: raise --epochs", again.printed)
        self.assertEqual((again.files, again.steps), (before, []))
        self.assertEqual(Run("vae --resume --epochs 3", "out").files, through.files)
        Path("out/gan.pt").write_bytes(Path("out/vae.pt").read_bytes())
        self.check_fails({
            "vae --resume --out out --seed 1": "run with --seed 0", "gan --generate 1 --out out": "of vae.py",
            "vae --generate 1 --out out --width 8": "run with --width 4", "vae --generate 1": "train first",
            f"vae --resume --out out --epochs 4 --data {PICTURES / 'test'}": "other data",
        })

    def test_what_is_not_finite_ends_a_run_and_is_not_saved(self):
        def spoil(run, call):
            if len(run.steps) == 19:
                spoilt = call["result"] if name == "loss_kl" else {name: call["encoder"][1][0].weight.data}
                spoilt[name].fill_(math.nan)

        def run(vae):
            Run(vae, "out", spoil)

        for name in ("loss_kl", "encoder.1.0.weight"):
            self.check_fails({"vae": f"{name} is not finite at step 20"}, 1, run)
            self.assertEqual([row["step"] for row in read_csv("out/vae.csv")][-3:], ["14", "16", "18"])
            self.assertEqual(torch.load("out/vae.pt")["epoch"], 1)
        self.check_fails({"vae --lr 1e30 --opt sgd": "diverged"}, 1, run)
        self.assertEqual(len(read_csv("out/vae.csv")), 10)  # the good CSV is still there


class Maths(Case):
    def test_layers(self):
        """Of kinds, as letters, and sizes: C16x8 is a convolution from 8 to 16 channels."""
        kinds = {nn.Linear: "L", nn.Conv2d: "C", nn.BatchNorm1d: "B", nn.BatchNorm2d: "B", nn.ReLU: "R",
                 nn.LeakyReLU: "l", nn.Flatten: "F", nn.Unflatten: "U", nn.ConvTranspose2d: "T"}
        encoder, decoder = "C4x1 B4 l F L16x64 ", "L128x10 U B8 R T8x4 B4 R T4x1 "
        discriminator, dcgan = "C4x1 l C8x4 l F L16x32 l L1x16 F", "C4x1 l C8x4 B8 l F L1x32 F"
        table = {
            "vae --hidden 9 7": "F L9x64 B9 R L7x9 B7 R L40x7 L7x20 B7 R L9x7 B9 R L64x9 U",
            "vae --arch conv": encoder + decoder.replace("128x10", "128x8").strip(),
            "vae --norm none --hidden 9": "F L9x64 R L40x9 L9x20 R L64x9 U",
            "cvae --hidden 9": "L9x66 B9 R L16x9 L9x10 B9 R L64x9 U",
            "cvae --arch conv": encoder.replace("4x1", "4x3") + decoder.strip(),
            "gan --hidden 9 7": "L9x100 B9 R L7x9 B7 R L64x7 U F L7x64 l L9x7 l L1x9 F",
            "gan --arch conv": decoder.replace("128x10", "128x8") + discriminator,
            "cgan --hidden 9": "L9x102 B9 R L64x9 U L9x66 l L1x9 F",
            "cgan --arch conv": decoder.replace("128x10", "128x102") + dcgan.replace("4x1", "4x3"),
            "dcgan": decoder + dcgan,
            "wgan": decoder + discriminator.replace("L16", "L64").replace("1x16", "1x64"),
            "wgan --arch mlp --hidden 9 --norm batch": "L9x10 B9 R L64x9 U F L9x64 B9 l L1x9 F",
            "vaegan": encoder + decoder.replace("128x10", "128x8") + discriminator,
        }
        for run, expected in zip(self.runs(table), table.values()):
            own = nn.ModuleList(run.networks[name] for name in run.networks if "_ema" not in name)
            found = [layer for layer in own.modules() if type(layer) in kinds]
            shapes = [getattr(layer, "weight", torch.ones(())).shape[:2] for layer in found]
            said = [kinds[type(layer)] + "x".join(map(str, shape)) for layer, shape in zip(found, shapes)]
            self.assertEqual(" ".join(said), expected)

    def check(self, command, by_hand):
        """Two steps of plain gradient descent, by the script and by the formulas of its docstring."""
        run = tiny_run(command)
        given = {name: run.steps[0][name] for name in inspect.signature(run.module.train_step).parameters}
        modules = nn.ModuleDict({name: given[name] for name in run.steps[0]["before"]})
        start, ours, theirs = (copy.deepcopy(modules).train() for _ in range(3))
        given |= theirs
        for (name, _), networks in trained(given):
            given[name] = torch.optim.SGD(networks.parameters(), 0.01)
        y = [given["y"]] if "y" in given else []
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = by_hand(run.args, given["x"], y, *ours.values())
            torch.manual_seed(seed)
            losses = run.module.train_step(**given)
            close(losses, {name: expected[name].mean().detach() for name in losses}, 1e-3)
        for networks in zip(start.values(), ours.values(), theirs.values()):
            flat = [torch.cat([weight.flatten() for weight in network.parameters()]) for network in networks]
            moved = (flat[1] - flat[0]).abs().max().item()
            self.assertGreater(moved, 1e-5)
            close((flat[2] - flat[0]) / moved, (flat[1] - flat[0]) / moved, 0.01)

    def descend(self, loss, *networks):
        parameters = [parameter for network in networks for parameter in network.parameters()]
        gradients = torch.autograd.grad(loss.mean(), parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.data -= 0.01 * gradient

    def encode(self, encoder, x, *y):
        """z of q(z|x), and KL(q(z|x) || N(0, I))."""
        mu, logvar = encoder(x, *y).chunk(2, 1)
        kl = (mu.square() + logvar.exp() - 1 - logvar).sum(1) / 2
        return mu + (logvar / 2).exp() * torch.randn_like(mu), kl

    def test_updates_of_vae(self):
        def by_hand(args, x, y, encoder, decoder):
            z, kl = self.encode(encoder, x, *y)
            logits = decoder(z, *y)
            p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
            if "mse" in vars(args).values():
                p = torch.distributions.Normal(logits.sigmoid(), 0.5**0.5)
            recon = -p.log_prob(x).flatten(1).sum(1)
            self.descend(recon + 3 * kl, encoder, decoder)
            return {"loss": recon + 3 * kl, "loss_recon": recon, "loss_kl": kl}

        for command in ("vae --arch conv", "vae --arch conv --recon mse", "cvae --arch conv"):
            self.check(f"{command} --beta 3", by_hand)

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
            x_fake, penalty = g(torch.randn(2, args.latent_dim), *y), torch.zeros(())
            x_fake, x = (x_fake.tanh(), 2 * x - 1) if args.name == "dcgan" else (x_fake.sigmoid(), x)
            real, fake = d(x, *y), d(x_fake, *y)
            loss_d = -F.logsigmoid(real) - F.logsigmoid(-fake)  # -log D(x) - log(1 - D(x_fake))
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

    def test_negative_elbo_in_closed_form(self):
        class Constant(nn.Module):
            def forward(self, x, y=None):
                heard.append((self.training, x, y))
                return self.output.expand(len(x), *self.output.shape)

        (x, y), heard = pictures("test"), []
        data = common.Data("", (x, y), (x * 255, y.argmax(1)), ["a", "b"])
        encoder, decoder = Constant(), Constant()
        encoder.output, decoder.output = torch.tensor([1.0, -2.0, 0.0, -1.0]), torch.zeros(1, 8, 8)
        kl = (1 + 4 + 1 + math.exp(-1) - 2 + 1) / 2  # sum of (mu^2 + var - 1 - log var) / 2
        bce, mse = 64 * math.log(2), (x - 0.5).square().sum().item() / 34 + 32 * math.log(math.pi)
        cases = {"vae": bce, "vae --recon mse": mse, "vae --binarize": bce, "cvae": bce}
        for command, recon in cases.items():
            module, args = load(command)
            expected = {"test_neg_elbo": recon + kl, "test_recon": recon, "test_kl": kl}
            close(module.evaluate(data, args, encoder, decoder), expected, 1e-3)
            (encoding, images, label), (decoding, _, label_again) = heard[-2:]
            self.assertFalse(encoding or decoding)
            self.assertTrue(encoder.training and decoder.training)  # again
            self.assertEqual(len(images.unique()) == 2, "binarize" in command)
            close((label, label_again), (y, y) if command == "cvae" else (None, None))

    def test_pixelcnn(self):
        run, vae = tiny_run("vae --arch pixelcnn"), load("vae")[0]
        decoder = vae.PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval()
        z, x = torch.randn(2, 3), torch.rand(2, 1, 12, 12).round().requires_grad_()
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(decoder(z, x).flatten(1)[:, i].sum(), x)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertTrue((seen < i).all() and bool(len(seen)) == (i > 0))
        with mock.patch("torch.bernoulli", torch.round):  # each pixel from z and those before it
            drawn = common.predict(decoder, z).sigmoid()
            close(drawn, (decoder(z, drawn) > 0).float())
        self.assertGreater((decoder(z + 1, drawn) - decoder(z, drawn)).abs().max(), 1e-3)
        self.assertEqual({*run.grid("samples", 8).unique().tolist()}, {0, 1})

    def test_scores(self):
        real, fake, labels = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
        data = common.Data("", (labels, labels), (labels[:, None], labels), ["a", "b"])
        predict = mock.Mock(side_effect=[real, fake, torch.eye(2)[[0, 1, 1, 1]]])
        with mock.patch.multiple(common, predict=predict, fd=lambda *pair: pair, covered=lambda *pair: pair):
            score = common.score(nn.Sequential(nn.Identity(), nn.Identity()), data, None, labels)
        pairs = [score.pop(name) for name in ("fd", "precision", "recall")]
        close(pairs, [(fake, real), (fake, real), (real, fake)])
        kl = math.log(0.25 / 0.75) / 4 + math.log(0.75 / 0.25) * 3 / 4
        close(score, {"classes": 2, "class_kl": kl, "label_accuracy": 0.5})
        centres = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 100.0])[:, None]  # to the third: 3 2 2 2 3 98
        points = torch.tensor([-2.9, -3.1, 6.9, 197.0, 199.0])[:, None]
        self.assertEqual([common.covered(point[None], centres) for point in points], [1, 0, 1, 1, 0])
        f, g = torch.randn(100_000, 3), torch.tensor([2.0, 3.0, 1.0]) * torch.randn(100_000, 3) + 1
        self.assertAlmostEqual(common.fd(f, g), 3 + 1 + 4, delta=0.2)  # |m_f - m_g|^2 + sum (s_f - s_g)^2


class DataSets(Case):
    def read(self, data, flags=""):
        """The data set of this --data, and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
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
        make_pictures("d/__MACOSX", [""], 1)
        make_pictures("flat", [""], 25)
        make_pictures("split/Train", "ba", 20)
        make_pictures("split/test", "b", 4)
        make_pictures("split/val", "b", 4)
        cases = {"d": (["9", "10", "11"], 23, 2, (3, 16, 16)), "flat": (["flat"], 23, 2, (1, 8, 8)),
                 "split": (["a", "b"], 20, 4, (1, 8, 8))}
        for folder, expected in cases.items():
            data, printed = self.read(folder)
            self.assertEqual((data.classes, len(data.x_train), len(data.x_test), data.shape), expected)
        self.assertIn("Left out: val", printed)
        self.assertEqual(data.y_test.tolist(), [1] * 4)  # by the training set's numbers
        self.assertNotEqual(data.y_train.tolist(), sorted(data.y_train.tolist()))  # mixed

    def test_what_is_refused_and_why(self):
        for folder in ("deep/pictures/train", "other/train", "poor"):
            make_pictures(folder, "ab", 30)
        make_pictures("other/test", "bc", 30)
        make_pictures("poor", "c", 1)
        make_pictures("flat", [""], 99)
        make_pictures("few", [""], 9)
        make_pictures("broken", [""], 30)
        Path("broken/09.png").write_bytes(b"no picture")
        self.check_fails({
            "vae --data deep": "point --data at one of the folders in", "vae --data missing": "No such file",
            "vae --data other": "has other classes", "vae --data broken": "09.png cannot be read",
            "vae --data few": "9 pictures are too few, it takes ten", "cgan --data flat": "one class",
            "vae --data flat": "90 images are fewer than --batch", "cvae --data poor": "class c has none",
        })
        self.assertEqual(len(self.read("poor")[0].x_train), 28)  # a VAE does not look at labels

    def test_mnist_from_files_that_are_sound_or_not(self):
        _, printed = self.read("auto", "--dry-run")
        self.assertRegex(printed, "Looking for mnist in none.*\nNo MNIST here.*synthetic digits instead")
        for part, n in (("train", 300), ("t10k", 20)):
            path = Path(f"none/MNIST/raw/{part}-labels-idx1-ubyte")
            path.write_bytes(struct.pack(">HBBI", 0, 8, 1, n) + bytes(n))
            path = path.with_name(f"{part}-images-idx3-ubyte")
            path.write_bytes(struct.pack(">HBBIII", 0, 8, 3, n, 28, 28) + bytes(n * 784))
        self.assertEqual(self.read("MNIST")[0].x_train.shape, (300, 1, 28, 28))
        path.write_bytes(b"truncated")
        refused = {"vae --data auto": "its four files belong, unpacked, into none/MNIST/raw"}
        self.check_fails(refused)
        Path("none/MNIST").rename("none/elsewhere")
        Path("none/train-images-idx3-ubyte.gz").write_bytes(b"in the wrong place")
        self.check_fails(refused)


if __name__ == "__main__":
    unittest.main()

"""Tests of the collection: python test_smoke.py, or pytest; no network and no data needed."""

import contextlib
import copy
import csv
import importlib
import io
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import parameters_to_vector

import common

HERE = Path(__file__).resolve().parent
SCRIPTS, CONDITIONAL = ("vae", "cvae", "gan", "cgan", "dcgan", "wgan", "vaegan"), ("cvae", "cgan")
VAE, GAN = "loss loss_recon loss_kl test_neg_elbo test_recon test_kl", "loss_d d_real d_fake loss_g"
COLUMNS = dict(zip(SCRIPTS, [VAE, VAE, GAN, GAN, GAN, "loss_d wasserstein penalty loss_g",
                             "loss_d d_real d_recon d_fake loss_kl loss_features loss_g"]))
ARCHES = [f"{s} --arch {a}" for s in ("vae", "cvae", "gan", "cgan", "wgan") for a in ("mlp", "conv")]
ARCHES += ["vae --arch pixelcnn"]
X, LABELS = common.draw_digits(8, seed=1)
X, Y = X.float() / 255, F.one_hot(LABELS, 10).float()
LR = 1e-2  # of the updates that are checked to the letter


def load(command):
    """The script of a command as a module, and what its flags parse to."""
    script, *flags = command.split()
    module = importlib.import_module(script)
    return module, module.parse_args(["--device", "cpu", "--data-dir", "data", "--data", "synthetic", *flags])


def call(command):
    """Run a command in this process; its networks, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        module, args = load(command)
        return module.main(args), output.getvalue()


def help_of(script):
    wide, output = mock.patch.dict(os.environ, COLUMNS="9999"), io.StringIO()
    with wide, contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        load(f"{script} --help")
    return " ".join(output.getvalue().split())


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def small_networks(script, latent_dim):
    """An encoder, a decoder and a discriminator of digits; told the label if the script is conditional."""
    more = 10 if script in CONDITIONAL else 0
    encoder = common.conv_encoder((1 + more, 28, 28), 4, 2 * latent_dim)
    decoder = common.conv_decoder((1, 28, 28), 4, latent_dim + more)
    discriminator = common.conv_discriminator((1 + more, 28, 28), 4, [8], norm=script == "dcgan")
    return [common.Conditional(n) if more else n for n in (encoder, decoder, discriminator)]


def descend(loss, network):
    """A step of plain gradient descent, by this network alone."""
    gradients = torch.autograd.grad(loss.mean(), list(network.parameters()), retain_graph=True)
    for parameter, gradient in zip(network.parameters(), gradients):
        parameter.data -= LR * gradient


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.pictures("pictures")
        torch.manual_seed(0)

    def check_fails(self, cases, status=2, run=call):
        """Each command ends with this status and one line on stderr, argparse's with two, that says this."""
        for command, message in cases.items():
            with self.subTest(command), contextlib.redirect_stderr(io.StringIO()) as error:
                with contextlib.redirect_stdout(io.StringIO()), self.assertRaises(SystemExit) as end:
                    run(command)
                self.assertEqual(end.exception.code, status)
                self.assertIn(error.getvalue().count("\n"), (1, 2))
                self.assertIn(message, error.getvalue())

    def pictures(self, folder, classes="ab", n=30, size=(8, 8)):
        """A folder of n small pictures in these classes; [""]: a flat one."""
        for i in range(n):
            path = Path(folder, classes[i % len(classes)], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 50).save(path)

    def read(self, data):
        """The data set of this --data, with any further flags."""
        with contextlib.redirect_stdout(io.StringIO()):
            return common.load_data(load(f"vae --batch-size 2 --data {data}")[1])

    def tiny_run(self, command, out="out", hook=lambda *_: None):
        """Three epochs of 13 steps; the pictures and the CSV, less the seconds. `hook` follows each step."""
        script, _, flags = command.partition(" ")
        step = importlib.import_module(script).train_step

        def train_step(*args):
            losses = step(*args)
            hook(losses, *args)
            return losses

        tiny = "" if "--resume" in flags else "--epochs 3 --batch-size 2 --log-every 2"
        with mock.patch(f"{script}.train_step", train_step):
            call(f"{script} --data pictures --out {out} {tiny} {flags}")
        rows = [{**row, "seconds": ""} for row in read_csv(f"{out}/{script}.csv")]
        return rows, {path.name: path.read_bytes() for path in Path(out).glob("*.png")}

    def steps(self, command):
        """The arguments of each train_step() of a tiny run of two epochs."""
        hook = mock.Mock()
        self.tiny_run(f"{command} --epochs 2", hook=hook)
        return [call.args[1:] for call in hook.call_args_list]


class CommandLine(Case):
    def check_files(self, script, out):
        """The expected files and no others, all of them sound; returns the CSV's losses."""
        saved = torch.load(out / f"{script}.pt", weights_only=True)
        side, cell = 10 if script in CONDITIONAL else 8, (saved["flags"]["image_size"] or 28) + 2
        grids = {"samples": (side, side), "progress": (10, 1), "interpolation": (6, 16)}  # columns, rows
        if "encoder" in saved["parts"]:
            z, plane = saved["flags"]["latent_dim"], {"manifold": (20, 20), "latent": (24, 20)}
            grids |= {"reconstructions": (8, 8), "traversal": (10, min(10, z)), **(plane if z == 2 else {})}
        files = [f"{script}.csv", f"{script}.pt", *(f"{script}_{name}.png" for name in grids)]
        self.assertEqual(sorted(os.listdir(out)), sorted(files))
        for name, grid in grids.items():
            with Image.open(out / f"{script}_{name}.png") as image:
                self.assertEqual((image.width // cell, image.height // cell), grid, name)
                column = {image.crop((2, i + 2, cell, i + cell)).tobytes() for i in range(0, 10 * cell, cell)}
            if name == "samples" and script in CONDITIONAL:  # labels matter
                self.assertEqual(len(column), 10)
        (row,) = read_csv(out / f"{script}.csv")
        epoch, step, _, *losses = row.values()
        self.assertEqual(list(row), ["epoch", "step", "seconds", *COLUMNS[script].split()])
        self.assertTrue((epoch, step) == ("1", "2") and all(math.isfinite(float(x)) for x in losses), row)
        return losses

    def test_every_script_by_its_command_line_and_in_process(self):
        for script in SCRIPTS:
            with self.subTest(script):
                here, there = Path("here", script), Path("there", script)
                command = [sys.executable, HERE / f"{script}.py", "--dry-run", "--data", "synthetic"]
                command += ["--out", there, "--device", "auto" if script == "vae" else "cpu"]
                done = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                call(f"{script} --dry-run --out {here} --log-every 7")
                losses = [self.check_files(script, out) for out in (here, there)]
                if script != "vae" or not torch.accelerator.is_available():
                    self.assertEqual(*losses)
                call(f"{script} --generate 20 --out {here}")
                folders = [path.parent.name for path in here.rglob("0*.png")]
                expected = sorted(2 * "0123456789") if script in CONDITIONAL else 20 * [f"{script}_generated"]
                self.assertEqual(sorted(folders), expected)

    def test_other_ways_to_train(self):
        for command in (
            "vae --latent-dim 2 --binarize --norm none", "cvae --arch conv --binarize --norm none",
            "vae --arch conv --recon mse --opt rmsprop --translate 0.1", "vae --arch pixelcnn --image-size 8",
            "gan --arch conv --loss minimax --d-steps 2", "gan --hidden 32 64 --dropout 0.3 --opt sgd",
            "wgan --arch mlp --norm batch --n-critic 2", "wgan --lipschitz clip --norm batch --width 8",
            "wgan --arch mlp --lipschitz clip", "cgan --arch conv --ema 0",
        ):
            with self.subTest(command), tempfile.TemporaryDirectory() as out:
                call(f"{command} --dry-run --out {out}")
                self.check_files(command.split()[0], Path(out))

    def test_scoring_changes_neither_training_nor_pictures(self):
        results = []
        for flags in ("", "--score"):
            call(f"vae --dry-run --out out {flags}")
            (row,), pictures = read_csv("out/vae.csv"), sorted(Path("out").glob("*.png"))
            results.append([row[name] for name in VAE.split()] + [path.read_bytes() for path in pictures])
        self.assertEqual(*results)
        self.assertEqual(list(row)[-5:], ["fd", "classes", "class_kl", "precision", "recall"])
        self.assertFalse(Path("data").exists())  # a dry run leaves no classifier behind

    def test_guest_in_a_thread_of_another_program(self):
        argv = mock.patch.object(sys, "argv", ["kernel", "-f", "kernel.json"])
        beside = mock.patch.object(common.Path, "resolve", lambda path: Path.cwd() / path.name)
        with argv, beside, ThreadPoolExecutor() as pool:
            networks, printed = pool.submit(call, "vaegan --dry-run").result()
            pool.submit(call, "vaegan --dry-run --generate 1").result()
        self.assertTrue({"encoder", "decoder_ema"} < set(networks))
        self.assertEqual(sorted(os.listdir()), ["dry-run", "pictures"])
        self.assertIn(str(Path.cwd() / "dry-run"), printed)

    def test_prints_at_once_and_with_escapes_but_nothing_on_import(self):
        code = f"import torch, os\nbefore = torch.get_rng_state()\nimport {', '.join(SCRIPTS)}\n"
        code += "assert torch.equal(before, torch.get_rng_state())\n"
        code += "from common import say\nsay('\\u00e9 \\udcff')\nos._exit(0)"
        env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-B", "-c", code, "--nonsense"], env=env, capture_output=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"\\xe9 \\udcff\n", b""))

    def test_help_is_the_same_for_shared_flags_and_says_what_choices_bring(self):
        texts = [help_of(script).split("options:")[1] for script in SCRIPTS]
        self.assertNotIn("None", "".join(texts))
        shared = {re.sub(r"\(default[^)]*\)", "", text.split(" --dry-run two steps")[0]) for text in texts}
        self.assertEqual(len(shared), 1, shared)
        for command in [*ARCHES, "wgan --lipschitz clip"]:
            script, flag, choice = command.split()
            said = re.search(rf"{flag} [^(]*?\b{choice}[^;(]* brings? ([^;(]*)", help_of(script))
            _, args = load(f"{script} {said[1] if said else ''}")
            setattr(args, flag[2:], choice)
            self.assertEqual(args, load(command)[1])

    def test_documented_commands_and_flags_exist(self):
        readme = (HERE / "README.md").read_text()
        text = readme + "".join(importlib.import_module(script).__doc__ for script in SCRIPTS)
        commands = re.findall(r"(?:python|uv run) (?!test_smoke|measure)(\w+)\.py([^`\n|#]*)", text)
        self.assertGreater(len(commands), 2 * len(SCRIPTS))
        for script, flags in commands:
            load(script + re.sub(r"--resume|--generate \d+", "", flags))
        table = re.search(r"## Flags(.*?)\n## ", readme, re.DOTALL)[1]
        named, known = (re.findall(r"--[a-z][a-z-]*", t) for t in (table, "".join(map(help_of, SCRIPTS))))
        self.assertLessEqual(set(named), set(known))

    def test_measures_of_the_readme_work_on_what_a_run_leaves(self):
        measure = re.search(r"import [^`]*measure\.py: python[^`]*", (HERE / "README.md").read_text())[0]
        two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        classifier = mock.patch.object(common, "load_classifier", lambda args, data: two)
        for script, word in {"vaegan": "label kept", "cgan": "sure", "wgan": "gradient of 0.weight"}.items():
            call(f"{script} --data pictures --batch-size 2 --epochs 1 --out {script}")
            with mock.patch.object(sys, "argv", ["measure.py", script, script]), classifier:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(measure, {})
            self.assertIn(word, output.getvalue())

    def test_bad_input(self):
        Path("vaegan.pt").write_bytes(b"no checkpoint")
        Path("empty").mkdir()
        cases = {
            "--epochs -1": "--epochs -1: must be at least 1",
            "--lr nan": "--lr nan: must be", "--lr 0": "--lr 0.0: must be",
            "--ema 1": "below 1", "--gamma -1": "--gamma -1.0: must be",
            "--batch-size 1": "at least 2", "--batch-size 70000": "60000 images",
            "--image-size 30": "multiple of 4", "--generate 0": "--generate 0: must be",
            "--device nonsense": "--device nonsense", "--device meta": "--device meta",
            "--data mnst": "known are mnist, fashion-mnist, cifar10", "--data empty": "no pictures",
            "--out vaegan.pt/x": "--out", "--generate 5 --out empty": "train first",
            "--resume --out empty": "train first", "--resume --out .": "no whole checkpoint",
        }
        self.check_fails({f"vaegan {flags}": message for flags, message in cases.items()})


class Training(Case):
    def test_stopped_and_resumed_run_leaves_the_files_of_one_that_was_not(self):
        for command in [*ARCHES, "dcgan", "vaegan"]:
            script, stop = command.split()[0], mock.Mock(side_effect=[None] * 14 + [KeyboardInterrupt])
            with self.subTest(command), tempfile.TemporaryDirectory() as out:
                through = self.tiny_run(command, f"{out}/1")
                with self.assertRaises(KeyboardInterrupt):  # in step 15 of 3 x 13
                    self.tiny_run(command, f"{out}/2", stop)
                last, first = (torch.load(f"{out}/{i}/{script}.pt", weights_only=True)["parts"] for i in "12")
                for part, end in zip(first.values(), last.values()):  # all weights move, the averages' too
                    self.assertFalse([k for k in part if "weight" in k and torch.equal(part[k], end[k])])
                self.assertEqual(self.tiny_run(f"{script} --resume", f"{out}/2"), through)

    def test_resume_says_what_it_cannot_do(self):
        through = self.tiny_run("vae --lr-schedule constant", "through")
        before = self.tiny_run("vae --lr-schedule constant --epochs 2")
        _, printed = call("vae --resume --out out --data pictures")
        self.assertTrue("is at epoch 2 of 2: raise --epochs" in printed and "Wrote" not in printed, printed)
        self.assertEqual(self.tiny_run("vae --resume"), before)
        self.assertEqual(self.tiny_run("vae --resume --epochs 3"), through)
        Path("out/gan.pt").write_bytes(Path("out/vae.pt").read_bytes())
        Path("pictures/a").rename("pictures/c")  # then b is the first
        self.check_fails({
            "vae --resume --out out --arch conv": "has --arch mlp",
            "vae --resume --out out --width 8": "has --width 16", "gan --generate 1 --out out": "of vae.py",
            "vae --resume --out out --epochs 4 --data pictures": "other data",
            "vae --generate 1 --out out --hidden 8": "other networks",
        })

    def test_losses_or_weights_that_are_not_finite_end_a_run_and_are_not_saved(self):
        def spoil(losses, x, beta, args, encoder, *_):
            if hook.call_count == 20:
                (losses["loss_kl"] if what == "loss_kl" else encoder[1][0].weight.data).fill_(math.nan)

        for what in ("loss_kl", "a weight of the encoder"):
            hook = mock.Mock(side_effect=spoil)
            message = f"{what} at step 20 is not finite"
            self.check_fails({"vae": message}, status=1, run=lambda vae: self.tiny_run(vae, hook=hook))
            steps = [int(row["step"]) for row in read_csv("out/vae.csv")]
            self.assertEqual(steps, [2, 4, 6, 8, 10, 12, 13, 14, 16, 18])
            self.assertEqual(torch.load("out/vae.pt", weights_only=True)["epoch"], 1)

    def test_flags_that_change_batches_and_beta(self):
        one = self.steps("vae --beta 4 --kl-warmup 1 --nll 5")
        self.assertEqual([args[1] for args in one], [4 * i / 13 for i in range(13)] + [4] * 13)
        self.assertEqual([row["test_nll"] > "" for row in read_csv("out/vae.csv")], [False] * 13 + [True])
        other, shifted = self.steps("vae --seed 1"), self.steps("vae --translate 0.3")
        for x in (one[13][0], other[0][0], shifted[0][0]):
            self.assertFalse(torch.equal(one[0][0], x))
        x = self.steps("vae --image-size 12 --binarize")[0][0]
        self.assertEqual((x.shape, set(x.unique().tolist())), ((2, 1, 12, 12), {0, 1}))

    def test_flags_that_change_learning_rates_and_turns(self):
        values = {"--lr-d": 0.5, "--lr-schedule": "linear", "--d-steps": 3, "--n-critic": 3}
        turns = [i % 3 == 0 for i in range(13)]
        for script in SCRIPTS:
            known = {flag: value for flag, value in values.items() if f"{flag} " in help_of(script)}
            flags = " ".join(f"{flag} {value}" for flag, value in known.items())
            calls = self.steps(f"{script} --opt rmsprop --lr 1e-3 --log-every 1 {flags}")
            rates = [arg.param_groups[0]["lr"] for arg in calls[-1] if isinstance(arg, torch.optim.RMSprop)]
            rate = 1e-3 / 26 if "--lr-schedule" in known else 1e-3  # in the last of 26 steps
            torch.testing.assert_close(rates, [rate] * (len(rates) - 1) + [rate * known.get("--lr-d", 1)])
            if script in ("gan", "wgan"):  # loss_g keeps its value between the generator's steps
                losses = [row["loss_g"] for row in read_csv(f"out/{script}.csv")][:13]
                self.assertEqual([args[1] for args in calls], 2 * turns)
                self.assertEqual([a != b for a, b in zip(losses, losses[1:])], turns[1:])


class Data(Case):
    def test_synthetic_digits(self):
        x, y = common.draw_digits(500, seed=1)
        self.assertEqual((x.shape, x.dtype, len(y.unique())), ((500, 1, 28, 28), torch.uint8, 10))
        self.assertTrue(torch.equal(x, common.draw_digits(500, seed=1)[0]))
        self.assertEqual(self.read("synthetic --dry-run --image-size 12").shape, (1, 12, 12))

    def test_all_kinds_of_pictures(self):
        turned = Image.linear_gradient("L")  # from black to white, 256 pixels
        turned.getexif()[0x0112] = 3  # by 180 degrees
        kinds = {
            "palette.png": (Image.new("RGB", (16, 16), (200, 100, 50)).quantize(4), (200, 100, 50)),
            "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 0, 0, 0)), (255, 255, 255)),
            "deep.png": (Image.new("I;16", (16, 16), 200 * 257), (200, 200, 200)),
            "clear.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 0)), (255, 255, 255)),
            "turned.png": (turned, (251, 251, 251)),
        }
        for name, (picture, colour) in kinds.items():
            picture.save(name, exif=picture.getexif())
            self.assertEqual(common.load_picture(name).getpixel((4, 4)), colour, name)

    def test_folders_in_natural_order_without_hidden_things_flat_or_split(self):
        numbers = [str(i) for i in range(12)]
        self.pictures("d", numbers, 24, (20, 16))
        Image.new("RGB", (9, 9), "red").save("d/0/red.png")
        for junk in ("d/.ipynb_checkpoints", "d/__MACOSX/0", "d/3/.thumbs"):
            self.pictures(junk, [""], 1)
        Path("d/3/._3.png").write_bytes(b"resource fork")
        self.pictures("flat", [""], 25)
        self.pictures("split/train", n=20)
        self.pictures("split/Val", n=4)
        cases = {
            "d": (numbers, 23, 2, (3, 16, 16)), "d --image-size 8": (numbers, 23, 2, (3, 8, 8)),
            "flat": (["flat"], 23, 2, (1, 8, 8)), "flat --dry-run": (["flat"], 4, 2, (1, 8, 8)),
            "split": (["a", "b"], 20, 4, (1, 8, 8)),
        }
        for folder, expected in cases.items():
            data = self.read(folder)
            self.assertEqual((data.classes, len(data.x_train), len(data.x_test), data.shape), expected)
        self.assertNotEqual(data.y_train.tolist(), sorted(data.y_train.tolist()))  # mixed

    def test_folders_that_are_refused(self):
        for folder in ("half/Train", "half/training", "alone/train", "other/train", "broken"):
            self.pictures(folder)
        self.pictures("other/test", "bc")
        self.pictures("flat", [""], 99)
        self.pictures("single", [""], 1)
        Path("broken/a/0.png").write_bytes(Path("broken/a/2.png").read_bytes()[:20])
        self.check_fails({
            "vae --data half": "and test set", "vae --data alone": "and test set",
            "vae --data other": "missing", "vae --data broken": "broken/a/0.png",
            "vae --data single": "too few", "cgan --data flat": "1 classes", "cvae --data flat": "1 classes",
        })

    def test_translate_shifts_by_whole_pixels_and_test_images_once(self):
        x = F.pad(torch.ones(200, 1, 1, 1), (10, 9, 10, 9))
        _, _, *places = common.shift(x, 0.1).nonzero().T
        self.assertEqual([where.unique().tolist() for where in places], 2 * [[8, 9, 10, 11, 12]])
        plain, once, again = (self.read(f"synthetic --dry-run --translate {t}") for t in (0, 0.1, 0.1))
        self.assertTrue(torch.equal(once.x_test, again.x_test) and torch.equal(once.x_train, plain.x_train))
        self.assertFalse(torch.equal(once.x_test, plain.x_test))

    def test_mnist_from_files_that_are_sound_or_damaged(self):
        raw = Path("data/MNIST/raw")
        raw.mkdir(parents=True)
        for part, n in (("train", 300), ("t10k", 20)):
            header = struct.pack(">HBBIII", 0, 8, 3, n, 28, 28)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(n * 784))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, n) + bytes(n))
        data = self.read("MNIST")
        self.assertEqual((data.x_train.shape, data.y_test.shape), ((300, 1, 28, 28), (20,)))
        (raw / "t10k-images-idx3-ubyte").write_bytes(header + bytes(5))
        self.check_fails({"vae --data mnist": f"belong into {raw}"})
        _, printed = call("gan --data auto --dry-run --out out")
        self.assertEqual(printed.count(f"No MNIST in {raw}: synthetic digits instead"), 1)


class Maths(Case):
    @contextlib.contextmanager
    def same_step(self, module, inputs, networks):
        """What is inside moves each network as a train_step() of plain gradient descent, to the letter."""
        starts, theirs = [parameters_to_vector(n.parameters()) for n in networks], copy.deepcopy(networks)
        torch.manual_seed(1)
        yield
        separate = theirs if module.__name__ not in ("vae", "cvae") else [nn.ModuleList(theirs)]
        torch.manual_seed(1)
        module.train_step(*inputs, *theirs, *(torch.optim.SGD(n.parameters(), LR) for n in separate))
        for start, *pair in zip(starts, networks, theirs):
            our, their = (parameters_to_vector(network.parameters()) - start for network in pair)
            self.assertGreater(our.abs().max(), 1e-3 * LR)
            torch.testing.assert_close(their, our, rtol=1e-2, atol=1e-4 * our.abs().max().item())

    def test_vae_updates_to_the_letter(self):
        for command in ("vae --beta 3", "vae --beta 3 --recon mse", "cvae --beta 3"):
            (module, args), y = load(command), [Y] * command.startswith("c")
            encoder, decoder, _ = small_networks(args.name, 5)
            networks, inputs = [encoder, decoder], [X, *(y or [3]), args]
            with self.subTest(command), self.same_step(module, inputs, networks):
                mu, logvar = encoder(X, *y).chunk(2, 1)
                logits = decoder(mu + (logvar / 2).exp() * torch.randn_like(mu), *y)
                p = torch.distributions.Bernoulli(logits=logits, validate_args=False)
                if "mse" in command:
                    p = torch.distributions.Normal(logits.sigmoid(), 0.5**0.5)
                kl = (mu.square() + logvar.exp() - 1 - logvar).sum() / 2
                descend((3 * kl - p.log_prob(X).sum()) / 8, nn.ModuleList(networks))

    def test_vaegan_updates_to_the_letter(self):
        vaegan, args = load("vaegan --gamma 0.1")
        e, g, d = networks = small_networks("vaegan", args.latent_dim)
        with self.same_step(vaegan, [X, args], networks):
            mu, logvar = e(X).chunk(2, 1)
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
            x_recon, x_fake = g(torch.cat([z, torch.randn_like(mu)])).sigmoid().chunk(2)
            d_real, d_recon, d_fake = d(X), d(x_recon), d(x_fake)
            loss_kl = (mu.square() + logvar.exp() - 1 - logvar).sum() / 2 / 8
            loss_features = (d.features(X) - d.features(x_recon)).square().sum() / 2 / 8
            descend(args.beta * loss_kl + loss_features, e)
            descend(0.1 * loss_features - F.logsigmoid(d_recon) - F.logsigmoid(d_fake), g)
            descend(-F.logsigmoid(d_real) - F.logsigmoid(-d_recon) - F.logsigmoid(-d_fake), d)

    def test_gan_updates_to_the_letter(self):
        for case in ("gan", "gan --loss minimax", "cgan", "dcgan", "wgan", "wgan --lipschitz clip --clip 9"):
            (module, args), script = load(case), case.split()[0]
            y, turn = [Y] * (script == "cgan"), [True] * (script in ("gan", "wgan"))
            x, squash = (2 * X - 1, torch.tanh) if script == "dcgan" else (X, torch.sigmoid)
            _, g, d = small_networks(script, args.latent_dim)
            with self.subTest(case), self.same_step(module, [X, *y, *turn, args], [g, d]):
                x_fake = squash(g(torch.randn(8, args.latent_dim), *y))
                real, fake = d(x, *y), d(x_fake, *y)
                if script == "wgan":
                    penalty = 0 if "clip" in case else module.gradient_penalty(d, x, x_fake.detach())
                    descend(fake - real + 10 * penalty, d)
                    descend(-d(x_fake), g)
                else:
                    descend(-F.logsigmoid(real) - F.logsigmoid(-fake), d)  # -log D(x) - log(1 - D(x_fake))
                    fake = d(x_fake, *y)
                    descend(F.logsigmoid(-fake) if "minimax" in case else -F.logsigmoid(fake), g)

    def test_wgan_penalty_clipping_and_norm(self):
        wgan, args = load("wgan --lipschitz clip --clip 0.02")
        linear = common.mlp_discriminator((1, 28, 28), [])
        weight, _ = linear.parameters()
        penalty = wgan.gradient_penalty(linear, X, torch.rand_like(X))
        torch.testing.assert_close(penalty, (weight.norm() - 1) ** 2)
        self.assertTrue(torch.autograd.grad(penalty, weight)[0].any())
        _, generator, critic = small_networks("wgan", args.latent_dim)
        optimizers = [common.make_optimizer(args, network, 0.1) for network in (generator, critic)]
        wgan.train_step(X, True, args, generator, critic, *optimizers)
        self.assertLessEqual(parameters_to_vector(critic.parameters()).abs().max(), args.clip)
        for norm, found in (("none", 0), ("batch", 2)):
            networks, _ = call(f"wgan --dry-run --norm {norm} --out out")
            self.assertEqual(sum(isinstance(m, nn.BatchNorm2d) for m in networks["critic"].modules()), found)

    def test_pixelcnn_sees_only_pixels_before(self):
        decoder = load("vae")[0].PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval()
        z, x = torch.randn(2, 3), torch.rand(2, 1, 12, 12).round().requires_grad_()
        logits = decoder(z, x).flatten(1)
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(logits[:, i].sum(), x, retain_graph=True)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertTrue((seen < i).all() and bool(len(seen)) == (i > 0))
            self.assertTrue((i // 12 - seen // 12 <= decoder.reach).all())
        with torch.random.fork_rng():
            in_windows = common.predict(decoder, z)
        decoder.reach = 100
        self.assertTrue(torch.equal(common.predict(decoder, z), in_windows))

    def test_evaluation_bounds_nll_and_leaves_batch_statistics_alone_as_sampling_does(self):
        data = self.read("synthetic --dry-run")
        for script, samples, y in (("vae", ([2], [50]), []), ("cvae", ([],), [Y])):
            module, args = load(f"{script} --binarize")
            encoder, decoder, _ = small_networks(script, 5)
            before = copy.deepcopy([encoder.state_dict(), decoder.state_dict()])
            tests = [module.evaluate(data, args, encoder, decoder, *k) for k in samples]
            x = module.sample(decoder, torch.randn(8, 5), *y)
            self.assertTrue(x.shape == (8, 1, 28, 28) and 0 <= x.min() and x.max() <= 1 and decoder.training)
            torch.testing.assert_close([encoder.state_dict(), decoder.state_dict()], before)
            if script == "vae":
                two, fifty = tests
                self.assertTrue(fifty["test_nll"] < two["test_nll"] < two["test_neg_elbo"] + 1)

    def test_average_forgets_the_first_weights(self):
        for decay, step, share in ((0.99, 0, 0.9), (0.99, 10**6, 0.01), (0.0, 10**6, 1.0)):
            averaged, network = nn.Linear(3, 2), nn.Linear(3, 2)
            expected = averaged.weight.lerp(network.weight, share)
            common.update_average(averaged, network, decay, step)
            torch.testing.assert_close(averaged.weight, expected)

    def test_networks_at_every_size(self):
        for size in (8, 12, 20, 28, 32, 36, 64):
            x = common.conv_decoder((3, size, size), 2, 5)(torch.randn(2, 5))
            self.assertEqual(x.shape, (2, 3, size, size))
            self.assertEqual(common.conv_encoder(x.shape[1:], 2, 6)(x).shape, (2, 6))
            for norm in (False, True):
                self.assertEqual(common.conv_discriminator(x.shape[1:], 2, [8], norm)(x).shape, (2,))

    def test_scores_tell_real_images_from_collapsed_ones(self):
        (x, y), test = common.draw_digits(6000, 1), common.draw_digits(500, 2)
        data = common.Data("synthetic", (x, test[0]), (y, test[1]), list("0123456789"))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            classifier, again = (common.load_classifier(load("vaegan")[1], data) for _ in range(2))
        self.assertEqual(output.getvalue().count("Training the classifier"), 1)
        x, test = x[:500].float() / 255, test[0].float() / 255
        real, same = common.score(classifier, data, x, y[:500]), common.score(again, data, test)
        collapsed = common.score(classifier, data, x[:5].repeat(100, 1, 1, 1))
        self.assertTrue(abs(same["fd"]) < 1e-3 and real["fd"] < 0.05 * collapsed["fd"])
        self.assertTrue(real["classes"] == 10 and collapsed["classes"] <= 5 and collapsed["recall"] < 0.5)
        self.assertTrue(same["class_kl"] < 0.01 and collapsed["class_kl"] > 0.5)
        self.assertGreater(min(real["precision"], real["recall"], real["label_accuracy"]), 0.8)
        # |m_f - m_g|^2 + sum (s_f - s_g)^2 for independent normal features
        f, g = torch.randn(100_000, 3), 2 * torch.randn(100_000, 3) + 1
        self.assertAlmostEqual(common.fd(f, g), 6, delta=0.2)


if __name__ == "__main__":
    unittest.main()

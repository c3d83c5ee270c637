"""Tests of the collection: python test_smoke.py (pytest collects it too). No network, no data needed.

Every script runs through its real command line on the built-in synthetic digits; the maths that must
hold is checked in process.
"""

import ast
import contextlib
import copy
import csv
import gzip
import importlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import common  # noqa: E402

SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("common", "test_smoke"))
GRIDS = {
    "samples": (8, 8), "progress": (10, 1), "reconstructions": (8, 8), "interpolation": (6, 16),
    "traversal": (10, 10),
}  # fmt: skip
PICTURES = {script: ["samples", "progress", "interpolation"] for script in SCRIPTS}
for script in ("vae", "cvae", "vaegan"):
    PICTURES[script] += ["reconstructions", "traversal"]
GAN = "loss_d loss_g d_real d_fake"
COLUMNS = {
    "vae": "loss loss_recon loss_kl test_neg_elbo test_recon test_kl",
    "cvae": "loss loss_recon loss_kl test_neg_elbo test_recon test_kl",
    "gan": GAN, "cgan": GAN, "dcgan": GAN,
    "wgan": "loss_d wasserstein c_real c_fake penalty loss_g grad_norm",
    "vaegan": "loss_d loss_g loss_kl loss_features d_real d_recon d_fake",
}  # fmt: skip
CONDITIONAL = ("cgan", "cvae")
TINY = ["--epochs", 3, "--batch-size", 2, "--log-every", 2]


def load(script, *flags):
    """The script as a module, and what its command line with these flags parses to."""
    module = importlib.import_module(script)
    away = ["--device", "cpu", "--out", tempfile.gettempdir(), "--data-dir", tempfile.gettempdir()]
    with mock.patch.object(sys, "argv", [f"{script}.py", *away, *map(str, flags)]):
        return module, module.parse_args()


def help_of(script):
    """What the script's --help prints, without line breaks; its status must be 0."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            load(script, "--help")
        except SystemExit as end:
            assert end.code == 0
    return " ".join(output.getvalue().split())


def call(script, *flags):
    """Run a script in this process, as its command line would; what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        module, args = load(script, "--data", "synthetic", *flags)
        module.main(args)
    return output.getvalue()


def python(code, cwd, *flags):
    """Run a few lines of code in a process of its own, from another folder."""
    env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def values(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def bce(logits, target):
    """-log D(x) at target 1, -log(1 - D(x)) at target 0, averaged."""
    return torch.nn.BCEWithLogitsLoss()(logits, torch.full_like(logits, target))


def flat_gradient(loss, network):
    gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


class TemporaryFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.tmp = Path(folder.name)

    @contextlib.contextmanager
    def fails(self, message, status=2):
        """What is inside ends with one line on stderr, which has the message, and with the status."""
        out, error = contextlib.redirect_stdout(io.StringIO()), io.StringIO()
        with out, contextlib.redirect_stderr(error), self.assertRaises(SystemExit) as end:
            yield
        text = error.getvalue()
        self.assertEqual((end.exception.code, text.count("\n")), (status, 1), text)
        self.assertIn(message, text)


class CommandLine(TemporaryFolder):
    def check_files(self, script, out, pictures=None):
        """The expected files and no others, all of them sound; returns the CSV's losses."""
        pictures = pictures or PICTURES[script]
        expected = {f"{script}.csv", f"{script}.pt", *(f"{script}_{name}.png" for name in pictures)}
        self.assertEqual({path.name for path in out.iterdir()}, expected)
        for name in pictures:
            with Image.open(out / f"{script}_{name}.png") as image:
                if script != "dcgan":  # its images have a single grey level after two steps
                    within = image.crop((2, 2, 30, 30)) if name in GRIDS else image
                    self.assertGreater(len(within.convert("L").getcolors()), 1, name)
                if name in GRIDS:
                    grid = (10, 10) if name == "samples" and script in CONDITIONAL else GRIDS[name]
                    if name == "traversal":  # a row per latent dimension, at most ten
                        flags = torch.load(out / f"{script}.pt", weights_only=True)["flags"]
                        grid = (10, min(10, flags["latent_dim"]))
                    self.assertEqual(image.size, tuple(30 * side + 2 for side in grid), name)
        (row,) = read_csv(out / f"{script}.csv")
        self.assertEqual(list(row), ["epoch", "step", "seconds", *COLUMNS[script].split()])
        self.assertEqual((row["epoch"], row["step"]), ("1", "2"))
        self.assertTrue(all(math.isfinite(float(cell)) for cell in row.values()), row)
        return list(row.values())[3:]

    def test_every_script(self):
        """By the real command line, from another folder; then again in this process: the same losses."""
        cwd = self.tmp / "cwd"
        cwd.mkdir()

        def run(script):
            command = [sys.executable, HERE / f"{script}.py", "--dry-run", "--device", "cpu"]
            command += ["--data", "synthetic", "--out", self.tmp / script]
            return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:  # their time is that of importing torch, on one core
            for script, done in zip(SCRIPTS, pool.map(run, SCRIPTS)):
                with self.subTest(script):
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    self.assertEqual(list(cwd.iterdir()), [])
                    again = self.tmp / "again" / script
                    losses = self.check_files(script, self.tmp / script)
                    call(script, "--dry-run", "--out", again, "--log-every", 7)
                    self.assertEqual(self.check_files(script, again), losses)
                    call(script, "--generate", 3, "--out", again)
                    pictures = sorted((again / f"{script}_generated").rglob("*.png"))
                    self.assertEqual(len(pictures), 3)
                    if script != "dcgan":  # its images differ by less than a grey level after two steps
                        self.assertEqual(len({path.read_bytes() for path in pictures}), 3)

    def test_other_ways_to_train(self):
        def check(script, *flags, pictures=None):
            with tempfile.TemporaryDirectory() as out:
                call(script, "--dry-run", "--out", out, *flags)
                self.check_files(script, Path(out), pictures)

        plane = ["samples", "progress", "interpolation", "reconstructions", "manifold", "latent"]
        check("vae", "--latent-dim", 2, "--binarize", "--norm", "none", pictures=plane)
        check("vae", "--arch", "conv", "--recon", "mse", "--opt", "rmsprop", "--translate", 0.1)
        check("vaegan", "--opt", "rmsprop", "--lr-schedule", "linear")
        check("cvae", "--arch", "conv", "--binarize")
        check("vae", "--arch", "pixelcnn", "--width", 2)
        check("gan", "--arch", "conv", "--loss", "minimax", "--d-steps", 2)
        check("gan", "--hidden", 32, 64, "--dropout", 0.3, "--opt", "sgd")
        check("cgan", "--arch", "conv", "--ema", 0)
        for arch in ("mlp", "conv"):
            check("wgan", "--arch", arch, "--lipschitz", "clip")
            check("wgan", "--arch", arch, "--lipschitz", "gp", "--n-critic", 2)

    def test_scoring_changes_neither_training_nor_pictures(self):
        results = []
        for flags in ([], ["--score", "--data-dir", self.tmp / "data"]):
            call("vae", "--dry-run", "--out", self.tmp / "out", *flags)
            (row,) = read_csv(self.tmp / "out" / "vae.csv")
            results.append([row[name] for name in COLUMNS["vae"].split()])
            results[-1] += [path.read_bytes() for path in sorted((self.tmp / "out").glob("*.png"))]
        self.assertEqual(*results)
        self.assertLessEqual({"fd", "classes", "class_kl", "precision", "recall"}, set(row))
        flags = ["--generate", 2, "--score", "--dry-run", "--data-dir", self.tmp / "data"]
        self.assertIn("fd ", call("vae", "--out", self.tmp / "out", *flags))

    def test_colour_pictures(self):
        for i in range(40):
            path = self.tmp / "pictures" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.merge("RGB", [Image.effect_noise((20, 16), 50) for _ in "rgb"]).save(path)
        out = self.tmp / "out"
        call("vaegan", "--data", self.tmp / "pictures", "--dry-run", "--batch-size", 4, "--out", out)
        with Image.open(out / "vaegan_samples.png") as image:
            self.assertEqual((image.mode, image.size), ("RGB", (8 * 18 + 2, 8 * 18 + 2)))

    def test_help(self):
        shared = set()
        for script in SCRIPTS:
            text = help_of(script).split("options:")[1]
            flags = [flag.split("(default")[0] for flag in text.split(" --")]
            shared.add(tuple(flags[: [flag[:7] for flag in flags].index("dry-run") + 1]))
        self.assertEqual(len(shared), 1, "the shared flags read differently")

    def test_documented_commands(self):
        """The commands of README and docstrings are parsed, and README's flags are those of --help."""
        text = (HERE / "README.md").read_text() + "".join(
            importlib.import_module(s).__doc__ for s in SCRIPTS
        )
        commands = re.findall(r"(?:python|uv run) (\w+)\.py([^`\n]*)", text)
        self.assertGreater(len(commands), 2 * len(SCRIPTS))
        for script, flags in commands:
            self.assertIn(script, [*SCRIPTS, "test_smoke"])
            if script in SCRIPTS and "--generate" not in flags:
                with self.subTest(f"{script} {flags}"):
                    load(script, *flags.replace("FOLDER", str(self.tmp)).split())
        table = re.search(r"## Flags(.*?)\n## ", text, re.DOTALL)[1]
        for script in SCRIPTS:
            text = help_of(script)
            for flag in re.findall(r"--[a-z][a-z-]*", table):
                self.assertIn(flag, text, script)

    def test_brought_defaults(self):
        """What a choice brings is what --help says of it."""
        cases = {
            ("vae", "--arch", "conv"): "--lr 2e-3 --batch-size 64 --latent-dim 8",
            ("vae", "--arch", "pixelcnn"):
                "--lr 2e-3 --batch-size 64 --latent-dim 16 --kl-warmup 2 --binarize",
            ("cvae", "--arch", "conv"): "--lr 2e-3 --batch-size 64",
            ("gan", "--arch", "conv"): "--lr 2e-3 --latent-dim 10",
            ("cgan", "--arch", "conv"): "--lr 2e-3 --lr-d 0.15",
            ("wgan", "--arch", "mlp"): "--clip 0.02",
            ("wgan", "--lipschitz", "clip"): "--opt rmsprop --lr 1e-3 --lr-d 0.05",
        }  # fmt: skip
        for choice, brought in cases.items():
            with self.subTest(choice):
                self.assertIn(brought, help_of(choice[0]))
                self.assertEqual(load(*choice)[1], load(*choice, *brought.split())[1])

    def test_checkpoint_brings_its_own_flags(self):
        """--generate needs no flags again; those that contradict the checkpoint get one line."""
        out = self.tmp / "out"
        call("vae", "--dry-run", "--arch", "conv", "--width", 4, "--latent-dim", 3, "--out", out)
        self.assertIn("Wrote 2 samples", call("vae", "--generate", 2, "--out", out))
        for flags in (["--width", 8], ["--arch", "mlp"]):
            with self.fails("other networks"):
                call("vae", "--generate", 2, "--out", out, *flags)
        whole = (out / "vae.pt").read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 255
        for content in (whole[:5000], flipped):
            (out / "vae.pt").write_bytes(content)
            with self.fails("not a whole checkpoint"):
                call("vae", "--generate", 2, "--out", out)

    def test_bad_input(self):
        """One line and status 2, before any training."""
        empty, broken, mixed, short = (self.tmp / s for s in ("empty", "broken", "mixed", "short"))
        raw = short / "MNIST" / "raw"
        for folder in (empty, broken, mixed / "class", raw):
            folder.mkdir(parents=True)
        for path in (mixed / "a.png", mixed / "class" / "b.png"):
            Image.new("L", (8, 8)).save(path)
        for name in common.IDX_FILES:
            (raw / name).write_bytes(b"\0" * 100)
        altered = self.tmp / "altered" / "MNIST" / "raw"
        altered.mkdir(parents=True)
        for name, (size, _) in common.IDX_FILES.items():
            (altered / name).write_bytes(b"\0" * size)
        (self.tmp / "vae.pt").write_bytes(b"no checkpoint")
        (self.tmp / "file").write_text("")
        (broken / "a.png").write_text("no picture")
        cases = {
            ("--epochs", -1): "--epochs: must be a whole number",
            ("--epochs", 1.5): "--epochs: must be a whole number",
            ("--lr", "nan"): "--lr: must be a number",
            ("--batch-size", 0): "--batch-size: must be",
            ("--batch-size", 70_000, "--data", "synthetic"): "there are 60000 to train with",
            ("--latent-dim", 0): "--latent-dim: must be",
            ("--gamma", -1): "--gamma: must be",
            ("--image-size", 30): "a multiple of 4",
            ("--device", "nonsense"): "--device nonsense cannot be used",
            ("--device", "meta"): "--device meta cannot be used",
            ("--data", "nowhere"): "neither a known data set nor a folder",
            ("--data", empty): "no pictures",
            ("--data", mixed): "beside and inside",
            ("--data", broken): "none of the 1 pictures can be read",
            ("--data", "synthetic", "--out", self.tmp / "file" / "x"): "cannot be written",
            ("--data-dir", short): "is damaged",
            ("--data-dir", self.tmp / "altered"): "not the file of MNIST",
            ("--resume", "--out", empty): "train first",
            ("--resume", "--generate", 1): "exclude each other",
            ("--generate", 5, "--out", empty): "train first",
            ("--nonsense",): "unrecognized arguments",
        }
        if not torch.cuda.is_available():
            cases["--device", "cuda"] = "--device cuda cannot be used"
        for flags, message in cases.items():
            with self.subTest(flags=flags), self.fails(message):
                _, args = load("vaegan", "--out", self.tmp, *flags)
                common.load_data(args)

    def tiny_run(self, script, out, *flags):
        """Three epochs on 30 small pictures of two classes; the files' contents, without the seconds."""
        pictures = self.tmp / "pictures"
        for i in range(0 if pictures.exists() else 30):
            path = pictures / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((8, 8), 50).save(path)
        call(script, "--data", pictures, "--out", out, *flags)
        contents = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".pt"}
        rows = contents[f"{script}.csv"].decode().splitlines()
        contents[f"{script}.csv"] = [row.split(",")[:2] + row.split(",")[3:] for row in rows]
        return contents

    def test_resume(self):
        """A run that was stopped in mid-epoch and resumed leaves the files of one that was not."""
        arches = {"vae": ["mlp", "conv", "pixelcnn"], "cvae": ["mlp", "conv"], "gan": ["mlp", "conv"],
                  "cgan": ["mlp", "conv"], "wgan": ["mlp", "conv"]}  # fmt: skip
        for script in SCRIPTS:
            for arch in arches.get(script, [None]):
                with self.subTest(script=script, arch=arch):
                    flags = ["--arch", arch] if arch else []
                    name = f"{script}{arch}"
                    through = self.tiny_run(script, self.tmp / f"through{name}", *TINY, *flags)
                    log, out = common.Run.log, self.tmp / f"stopped{name}"

                    def stopped(run, losses):
                        log(run, losses)
                        if run.step == run.steps_per_epoch + 1:
                            raise KeyboardInterrupt

                    with mock.patch.object(common.Run, "log", stopped):
                        self.assertRaises(KeyboardInterrupt, self.tiny_run, script, out, *TINY, *flags)
                    first = torch.load(out / f"{script}.pt", weights_only=True)["networks"]
                    self.assertEqual(self.tiny_run(script, out, "--resume"), through)
                    last = torch.load(out / f"{script}.pt", weights_only=True)["networks"]
                    for network, weights in first.items():  # all of them learn, the averages too
                        for key in (key for key in weights if key.endswith("weight")):
                            self.assertFalse(torch.equal(weights[key], last[network][key]), key)

    def test_killed_run_resumes(self):
        """SIGKILL in mid-epoch; more epochs afterwards; a flag that contradicts the checkpoint."""
        through = self.tiny_run("vae", self.tmp / "through", *TINY, "--lr-schedule", "constant")
        code = (
            "import os, signal, sys, common, vae\n"
            "log = common.Run.log\n"
            "def kill(run, losses):\n"
            "    log(run, losses)\n"
            "    if run.epoch == 2 and run.step - run.steps_per_epoch == 3:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "common.Run.log = kill\n"
            "vae.main(vae.parse_args())"
        )
        flags = ["--data", self.tmp / "pictures", "--out", self.tmp / "out", *TINY]
        flags += ["--epochs", 2, "--lr-schedule", "constant", "--device", "cpu"]
        done = python(code, self.tmp, *flags)
        self.assertEqual(done.returncode, -9, done.stderr)
        self.assertEqual(self.tiny_run("vae", self.tmp / "out", "--resume", "--epochs", 3), through)
        for flags, message in (
            (["--arch", "conv"], "contradicts"),
            (["--data", "synthetic"], "other data"),
        ):
            with self.fails(message):
                self.tiny_run("vae", self.tmp / "out", "--resume", *flags)

    def test_signals(self):
        """Both runs at once, a core for each; batches of two make an epoch longer than the test."""
        runs, env = {}, {**os.environ, "OMP_NUM_THREADS": "1"}
        for number in (signal.SIGINT, signal.SIGTERM):
            command = [sys.executable, HERE / "vae.py", "--data", "synthetic", "--batch-size", "2"]
            command += ["--out", self.tmp / number.name]
            runs[number] = subprocess.Popen(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            self.addCleanup(runs[number].kill)  # where the test fails before its signal
        for number, run in runs.items():
            out = self.tmp / number.name
            while not (out / "vae.csv").exists() and run.poll() is None:
                time.sleep(0.05)
            run.send_signal(number)
            _, error = run.communicate(timeout=60)
            self.assertEqual(run.returncode, 128 + number)
            self.assertEqual(error.count("\n"), 1, error)
            self.assertEqual([path.name for path in out.iterdir()], ["vae.csv"])

    def test_divergence_and_lost_folders(self):
        """Non-finite losses and an output folder that vanishes end a run with one line and status 1."""
        step, out = importlib.import_module("vae").train_step, self.tmp / "out"

        def at_step_20(spoil):
            steps = itertools.count(1)

            def train_step(*rest):
                losses = step(*rest)
                return spoil(losses) if next(steps) == 20 else losses

            return mock.patch("vae.train_step", train_step)

        diverged = "loss_kl is nan at step 20: training diverged, a smaller --lr may help; "
        with self.fails(f"{diverged}{out / 'vae.pt'} holds epoch 1", status=1):
            with at_step_20(lambda losses: {**losses, "loss_kl": losses["loss_kl"] * math.nan}):
                self.tiny_run("vae", out, *TINY)
        steps = [int(row["step"]) for row in read_csv(out / "vae.csv")]  # all rows before
        self.assertEqual(steps, [2, 4, 6, 8, 10, 12, 13, 14, 16, 18])
        with self.fails("cannot be written", status=1):
            with at_step_20(lambda losses: shutil.rmtree(out) or losses):
                self.tiny_run("vae", out, *TINY)

    def steps(self, script, *flags):
        """A tiny run of two epochs; the arguments of train_step(), epoch by epoch."""
        step = load(script)[0].train_step
        with mock.patch(f"{script}.train_step", side_effect=step) as recorded:
            self.tiny_run(script, self.tmp / "out", *TINY, "--epochs", 2, *flags)
        calls = [call.args for call in recorded.call_args_list]
        return calls[: len(calls) // 2], calls[len(calls) // 2 :]

    def test_batches(self):
        """Seed and epoch give the order; --translate, --image-size and --binarize change the images."""
        one, two = self.steps("vae")
        other, _ = self.steps("vae", "--seed", 1)
        shifted, _ = self.steps("vae", "--translate", 0.3)
        for epoch in (two, other, shifted):
            self.assertFalse(torch.equal(one[0][0], epoch[0][0]))
        x = self.steps("vae", "--image-size", 12, "--binarize")[0][0][0]
        self.assertEqual((x.shape, set(x.unique().tolist())), ((2, 1, 12, 12), {0, 1}))

    def test_kl_warmup(self):
        first, second = self.steps("vae", "--beta", 4, "--kl-warmup", 1)
        rising = [4 * i / len(first) for i in range(len(first))]
        self.assertEqual([args[1] for args in first + second], rising + [4] * len(second))

    def test_vaegan_penalty(self):
        """From the second epoch on, at every eighth step with eight times its weight."""
        first, second = self.steps("vaegan", "--r1", 0.5)
        self.assertGreater(len(first), 8)
        due = [0 if step % 8 else 4 for step in range(len(first), 2 * len(first))]
        self.assertEqual([args[1] for args in first + second], [0] * len(first) + due)

    def test_several_discriminator_steps(self):
        """Each on a batch of its own; the Wasserstein critic has a head start."""
        first, _ = self.steps("gan", "--d-steps", 3)
        self.assertEqual([len(args[0]) for args in first], [3 * 2] * len(first))
        step = load("wgan")[0].critic_step
        with mock.patch("wgan.critic_step", side_effect=step) as critic_step:
            first, second = self.steps("wgan", "--n-critic", 3, "--critic-warmup", 4)
        self.assertEqual(critic_step.call_count, 4 + 3 * len(first + second))

    def test_learning_rates(self):
        """--opt, --lr, --lr-d and --lr-schedule hold for every step of every script."""
        log = common.Run.log

        def checked(run, losses):
            for name, optimizer in run.optimizers.items():
                self.assertIsInstance(optimizer, torch.optim.RMSprop)
                lr = 0.5e-3 if name in ("discriminator", "critic") else 1e-3
                lr *= 1 - run.step / run.steps_per_epoch
                lr *= min((run.step + 1) / 100, 1) if run.args.name == "vaegan" else 1
                self.assertAlmostEqual(optimizer.param_groups[0]["lr"], lr)
            log(run, losses)

        for script in SCRIPTS:
            flags = ["--opt", "rmsprop", "--lr", 1e-3, "--lr-schedule", "linear"]
            flags += ["--lr-d", 0.5] if "--lr-d" in help_of(script) else []
            with self.subTest(script), mock.patch.object(common.Run, "log", checked):
                self.tiny_run(script, self.tmp / script, *TINY, "--epochs", 1, *flags)

    def test_losses_add_up(self):
        """In the CSV, as the scripts' docstrings have it."""
        for script, flags in (("vae", ["--beta", 4]), ("cvae", ["--beta", 4]), ("wgan", [])):
            call(script, "--dry-run", "--out", self.tmp, *flags)
            (row,) = read_csv(self.tmp / f"{script}.csv")
            row = {name: float(cell) for name, cell in row.items()}
            if script == "wgan":
                total, expected = row["loss_d"], 10 * row["penalty"] - row["wasserstein"]
            else:
                total, expected = row["loss"], row["loss_recon"] + 4 * row["loss_kl"]
            self.assertAlmostEqual(total / expected, 1, places=4)

    def test_source(self):
        """Only torch, torchvision, the standard library and common; no side effects of an import."""
        allowed = {*sys.stdlib_module_names, "torch", "torchvision", "common", "PIL", "matplotlib"}
        for path in [HERE / "common.py", *(HERE / f"{script}.py" for script in SCRIPTS)]:
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    self.assertIn(name.split(".")[0], allowed, path.name)
        code = "import torch; before = torch.get_rng_state()\n"
        code += "".join(f"import {script}\n" for script in SCRIPTS)
        code += "assert torch.equal(before, torch.get_rng_state())"
        done = python(code, self.tmp, "--nonsense")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(list(self.tmp.iterdir()), [])


class Data(TemporaryFolder):
    def test_synthetic_digits(self):
        x, y = common.draw_digits(500, seed=1)
        self.assertEqual((x.shape, x.dtype, y.dtype), ((500, 1, 28, 28), torch.uint8, torch.int64))
        self.assertEqual(set(y.tolist()), set(range(10)))
        self.assertTrue(torch.equal(x, common.draw_digits(500, seed=1)[0]))
        _, args = load("vae", "--data", "synthetic", "--dry-run", "--image-size", 12)
        self.assertEqual(common.load_data(args).shape, (1, 12, 12))

    def test_folder_of_all_kinds_of_pictures(self):
        square = (16, 16)
        pictures = {
            "palette.png": Image.new("RGB", square, (200, 100, 50)).quantize(4),
            "cmyk.jpg": Image.new("CMYK", square, (0, 0, 0, 0)),
            "deep.png": Image.new("I;16", square, 51400),  # 200 * 257
            "clear.png": Image.new("RGBA", square, (0, 0, 0, 0)),
            "grey.png": Image.new("L", square, 200),
        }
        paths = [self.tmp / name for name in pictures]
        for path, picture in zip(paths, pictures.values()):
            picture.save(path)
        x, _ = common.decode([(path, 0) for path in paths], 8)
        seen = [tuple(image[:, 4, 4].tolist()) for image in x]
        self.assertEqual(seen, [(200, 100, 50), (255,) * 3, (200,) * 3, (255,) * 3, (200,) * 3])

    def test_shift_moves_by_whole_pixels_both_ways(self):
        x = torch.zeros(200, 1, 20, 20)
        x[:, :, 10, 10] = 1
        where = common.shift(x, 0.1).flatten(1).nonzero()[:, 1]
        self.assertEqual((where // 20).unique().tolist(), [8, 9, 10, 11, 12])
        self.assertEqual((where % 20).unique().tolist(), [8, 9, 10, 11, 12])
        self.assertEqual(len(where), 200)

    def test_mnist_that_cannot_be_had(self):
        """auto trains on the synthetic digits and says why; an explicit mnist ends with advice."""
        for data in ("auto", "mnist"):
            _, args = load("vaegan", "--data", data, "--dry-run", "--data-dir", self.tmp / data)
            output = io.StringIO()
            with mock.patch.object(common, "fetch", side_effect=OSError("no network")):
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    if data == "auto":
                        self.assertEqual(common.load_data(args).name, "synthetic")
                    else:
                        self.assertRaises(SystemExit, common.load_data, args)
            self.assertEqual(output.getvalue().count("\n"), 1)
            raw = str(self.tmp / data / "MNIST" / "raw")
            for part in ("no network", "t10k-labels-idx1-ubyte.gz", raw):
                self.assertIn(part, output.getvalue())

    def test_packed_mnist_is_enough(self):
        """The .gz files alone, unpacked without a network; a truncated one is named."""
        raw = self.tmp / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, (size, _) in common.IDX_FILES.items():
            sides = [28, 28] if "images" in name else []
            n = (size - 8 - 4 * len(sides)) // math.prod(sides)
            header = struct.pack(f">HBB{1 + len(sides)}I", 0, 8, 1 + len(sides), n, *sides)
            (raw / f"{name}.gz").write_bytes(gzip.compress(header.ljust(size, b"\0"), 1))
        with contextlib.redirect_stdout(io.StringIO()):
            (x, y), _, _ = common.load_torchvision("fashion-mnist", self.tmp)
        self.assertEqual((x.shape, y.shape), ((60_000, 1, 28, 28), (60_000,)))
        self.assertEqual([path.name for path in self.tmp.iterdir()], ["FashionMNIST"])
        for path in raw.glob("*ubyte"):
            path.unlink()
        last = raw / "t10k-labels-idx1-ubyte.gz"
        last.write_bytes(last.read_bytes()[:-20])
        with self.fails("t10k-labels-idx1-ubyte.gz is damaged"):
            common.load_torchvision("fashion-mnist", self.tmp)

    def test_silent_server_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def silent(root, download):
                urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}")

            silent.__name__ = "Silent"
            with contextlib.redirect_stdout(io.StringIO()), self.assertRaises(OSError):
                common.fetch(silent, self.tmp, timeout=0.5)


class Maths(unittest.TestCase):
    def test_kl_is_that_of_torch(self):
        mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
        torch.testing.assert_close(common.kl_divergence(mu, logvar), kl)

    def test_reconstruction_loss_is_a_log_likelihood(self):
        import cvae
        import vae

        x, logits = torch.rand(3, 1, 4, 4).round(), torch.randn(3, 1, 4, 4)
        bernoulli = torch.distributions.Bernoulli(logits=logits)
        normal = torch.distributions.Normal(logits.sigmoid(), math.sqrt(0.5))
        for kind, p in (("bce", bernoulli), ("mse", normal)):
            loss = -p.log_prob(x).flatten(1).sum(1)
            for script in (vae, cvae):
                torch.testing.assert_close(script.reconstruction_loss(logits, x, kind), loss)

    def test_nll_is_at_most_the_elbo(self):
        """With one sample they agree on average, with more the estimate falls."""
        for script in ("vae", "cvae"):
            with tempfile.TemporaryDirectory() as out:
                numbers = []
                for k in (1, 50):
                    call(script, "--dry-run", "--binarize", "--nll", k, "--out", out)
                    row = read_csv(Path(out) / f"{script}.csv")[-1]
                    numbers.append((float(row["test_neg_elbo"]), float(row["test_nll"])))
                (elbo, one), (_, fifty) = numbers
                self.assertAlmostEqual(one / elbo, 1, delta=0.02)
                self.assertLess(fifty, one)
                call(script, "--resume", "--nll", 0, "--out", out)  # rewrites the CSV
                self.assertEqual(read_csv(Path(out) / f"{script}.csv")[-1], row)

    def test_pixelcnn_sees_only_pixels_before(self):
        """Gradients reach no later pixel; drawing in small windows gives what whole images give."""
        import vae

        torch.manual_seed(0)
        decoder, z = vae.PixelCNN((1, 12, 12), 4, 3, norm=True, layers=2).eval(), torch.randn(2, 3)
        x = torch.rand(2, 1, 12, 12).round().requires_grad_()
        logits = decoder(z, x)
        for i in (0, 17, 77, 143):
            (gradient,) = torch.autograd.grad(logits.flatten(1)[:, i].sum(), x, retain_graph=True)
            seen = gradient.abs().sum(0).flatten().nonzero()
            self.assertEqual(bool(len(seen)), i > 0)
            self.assertTrue((seen < i).all())
        with torch.no_grad():
            torch.manual_seed(1)
            windows = decoder.sample(z)
            decoder.reach = 100
            torch.manual_seed(1)
            self.assertTrue(torch.equal(decoder.sample(z), windows))

    def check_updates(self, networks, gradients, step):
        """`step` with plain gradient descent moves each network by its gradient, to the letter."""
        before, lr = [values(n) for n in networks], 1e-2
        step([torch.optim.SGD(n.parameters(), lr) for n in networks])
        for network, start, gradient in zip(networks, before, gradients):
            self.assertGreater(gradient.abs().max(), 1e-3)
            change = (start - values(network)) / lr
            torch.testing.assert_close(change, gradient, rtol=1e-2, atol=1e-4 * gradient.abs().max())

    def test_vaegan_updates(self):
        """Each network follows the gradient of its own loss, written out here, and no other's."""
        vaegan, args = load("vaegan", "--gamma", 0.1)
        shape, x = (1, 28, 28), common.draw_digits(8, 1)[0].float() / 255
        e = common.conv_encoder(shape, 4, 2 * args.latent_dim)
        g, d = common.conv_decoder(shape, 4, args.latent_dim), common.conv_discriminator(shape, 4, 8)
        networks = copy.deepcopy((e, g, d))
        mu, logvar = e(x[::2]).chunk(2, 1)
        q = torch.distributions.Normal(mu, (logvar / 2).exp())
        torch.manual_seed(1)
        z = q.loc + q.scale * torch.randn_like(mu)
        prior = vaegan.Mixture(2, args.latent_dim)
        prior.weights[0], prior.weights[1], prior.means[1], prior.stds[1] = 0, 1, 2, 0.5
        _, normal = prior.noise(4)
        x_recon, x_fake = g(torch.cat([z, 2 + 0.5 * normal])).sigmoid().chunk(2)
        x_real = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(d(x_real).sum(), x_real, create_graph=True)
        r1 = 0.3 / 2 * slope.square().sum() / 8
        gradient_d = flat_gradient(bce(d(x), 1) + bce(d(x_recon), 0) + bce(d(x_fake), 0) + r1, d)
        loss_kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() / 4
        loss_features = (d.features(x[::2]).detach() - d.features(x_recon)).square().sum() / 2 / 4
        gradient_e = flat_gradient(args.beta * loss_kl + loss_features, e)
        gradient_g = flat_gradient(0.1 * loss_features + bce(d(x_recon), 1) + bce(d(x_fake), 1), g)

        def step(optimizers):
            torch.manual_seed(1)
            vaegan.train_step(x, 0.3, args, prior, *networks, *optimizers)

        self.check_updates(networks, [gradient_e, gradient_g, gradient_d], step)

    def test_mixture(self):
        """Fitted to codes in two clusters, p(z) has their weights, means and deviations."""
        vaegan, _ = load("vaegan")
        torch.manual_seed(1)
        codes, first = torch.randn(6000, 2), torch.arange(6000) < 2000
        codes = torch.where(first[:, None], codes * torch.tensor([0.1, 0.5]) - 2, codes * 0.2 + 2)
        prior = vaegan.Mixture(5, 2)
        noise = prior.noise(6000)
        self.assertTrue(prior.sample(*noise).equal(noise[1]))  # N(0, I)
        for _ in range(4):  # each fit goes on from the last
            prior.fit(codes)
        for given in (noise, prior.noise(6000)):
            z = prior.sample(*given)
            self.assertAlmostEqual((z[:, 0] < 0).float().mean().item(), 1 / 3, delta=0.02)
            for side, codes_there in ((z[:, 0] < 0, codes[first]), (z[:, 0] > 0, codes[~first])):
                torch.testing.assert_close(z[side].mean(0), codes_there.mean(0), rtol=0, atol=0.03)
                torch.testing.assert_close(z[side].std(0), codes_there.std(0), rtol=0.1, atol=0)

    def test_mixture_of_few_codes(self):
        """One component for 32 codes, but at least one; the others are never drawn."""
        vaegan, _ = load("vaegan")
        for n, used in ((9, 1), (100, 3)):
            prior = vaegan.Mixture(5, 2)
            for _ in range(2):
                prior.fit(torch.randn(n, 2))
            self.assertEqual(prior.weights.count_nonzero(), used)
            self.assertAlmostEqual(prior.weights.sum().item(), 1, places=5)
            prior.means[used:] = torch.nan
            self.assertTrue(prior.sample(*prior.noise(1000)).isfinite().all())

    def test_gan_updates(self):
        """As for vaegan.py, by the losses of each of the GANs."""

        def usual_d(real, fake):
            return bce(real, 1) + bce(fake, 0)

        def usual_g(fake):
            return bce(fake, 1)

        cases = [
            ("gan", ["--loss", "nonsaturating"], usual_d, usual_g),
            ("gan", ["--loss", "minimax"], usual_d, lambda fake: -bce(fake, 0)),
            ("cgan", [], usual_d, usual_g),
            ("dcgan", [], usual_d, usual_g),
            ("wgan", ["--lipschitz", "clip", "--clip", 9, "--n-critic", 1],
             lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
        ]  # fmt: skip
        x, labels = common.draw_digits(8, 1)
        x, y = x.float() / 255, torch.nn.functional.one_hot(labels, 10).float()
        for script, flags, loss_d, loss_g in cases:
            with self.subTest(script, flags=flags):
                module, args = load(script, *flags, "--batch-size", 8)
                given, more = ([y], 10) if script == "cgan" else ([], 0)
                g = common.conv_decoder((1, 28, 28), 4, args.latent_dim + more)
                d = common.conv_discriminator((1 + more, 28, 28), 4, 8)
                if given:
                    g, d = common.Conditional(g), common.Conditional(d)
                networks = copy.deepcopy((g, d))
                torch.manual_seed(1)
                x_fake = g(torch.randn(8, args.latent_dim), *given).sigmoid()
                gradient_d = flat_gradient(loss_d(d(x, *given), d(x_fake, *given)), d)
                after = values(d) - 1e-2 * gradient_d  # the discriminator steps first
                torch.nn.utils.vector_to_parameters(after, d.parameters())
                gradient_g = flat_gradient(loss_g(d(x_fake, *given)), g)

                def step(optimizers):
                    torch.manual_seed(1)
                    module.train_step(x, *given, args, *networks, *optimizers)

                self.check_updates(networks, [gradient_g, gradient_d], step)

    def test_wgan(self):
        """Signs, the clipping box, the penalty of a linear critic, no batch norm, defaults."""
        wgan, args = load("wgan", "--lipschitz", "clip", "--clip", 0.02)
        high, low = torch.ones(4), torch.zeros(4)
        self.assertEqual(wgan.critic_loss(high, low).item(), -1)  # it rates real images higher
        self.assertEqual(wgan.generator_loss(high).item(), -1)
        x, critic = torch.rand(8, 1, 28, 28), common.mlp_discriminator((1, 28, 28), [])
        slope = 2 * critic.top[0].weight.norm()  # the critic's input is 2 x - 1
        penalty = wgan.gradient_penalty(critic, x, torch.rand_like(x))
        self.assertAlmostEqual(penalty.item(), ((slope - 1) ** 2).item(), places=4)
        penalty.backward()
        self.assertTrue(critic.top[0].weight.grad.any())
        for network in (critic, common.conv_discriminator((1, 28, 28), 4, 8)):
            self.assertFalse([m for m in network.modules() if "BatchNorm" in type(m).__name__])
            generator = common.mlp_decoder((1, 28, 28), [8], args.latent_dim)
            for _ in range(3):
                optimizer = common.make_optimizer(args, network, 0.1)
                wgan.critic_step(x, args, generator, network, optimizer)
                self.assertLessEqual(values(network).abs().max().item(), args.clip)
        n_critic = [
            load("wgan", "--arch", arch, "--lipschitz", kind)[1].n_critic
            for arch in ("conv", "mlp") for kind in ("gp", "clip")
        ]  # fmt: skip
        self.assertEqual(n_critic, [1, 3, 2, 1])

    def test_labels_matter(self):
        """They change what a conditional model draws, and the last of them is drawn too."""
        for script in CONDITIONAL:
            with tempfile.TemporaryDirectory() as out:
                call(script, "--dry-run", "--out", out)
                with Image.open(Path(out) / f"{script}_samples.png") as image:
                    column = [image.crop((2, 30 * i + 2, 30, 30 * i + 30)).tobytes() for i in range(10)]
                self.assertEqual(len(set(column)), 10)
                call(script, "--generate", 1001, "--out", out)
                paths = list((Path(out) / f"{script}_generated").rglob("*.png"))
                self.assertEqual(len(paths), 1001)
                self.assertEqual({path.parent.name for path in paths}, set("0123456789"))

    def test_label_planes(self):
        """They reach the discriminator's first layer as 0 and 1: -1 and 1 would outweigh the image."""
        network, seen, y = common.conv_discriminator((11, 28, 28), 4, 8), [], torch.eye(10)[:3]
        network.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1:]))
        common.Conditional(network)(torch.rand(3, 1, 28, 28), y)
        self.assertTrue(torch.equal(seen[0], y[:, :, None, None].expand(-1, -1, 28, 28)))

    def test_sampling_leaves_batch_statistics_alone(self):
        for script in SCRIPTS:
            module = importlib.import_module(script)
            decoder = common.conv_decoder((1, 28, 28), 4, 8)
            before = {k: v.clone() for k, v in decoder.state_dict().items()}
            z, y = torch.randn(6, 5), torch.eye(10)[:6, :3]
            if script in CONDITIONAL:
                decoder.forward = lambda z, y, forward=decoder.forward: forward(torch.cat([z, y], 1))
                x = module.sample(decoder, z, y)
            else:
                x = module.sample(decoder, torch.cat([z, y], 1))
            self.assertEqual(x.shape, (6, 1, 28, 28))
            self.assertTrue(0 <= x.min() and x.max() <= 1 and decoder.training)
            for key, value in decoder.state_dict().items():
                self.assertTrue(torch.equal(value, before[key]), key)

    def test_evaluation_leaves_batch_statistics_alone(self):
        digits = common.draw_digits(20, 1)
        data = common.Data("digits", digits, digits, list("0123456789"))
        for script, more in (("vae", 0), ("cvae", 10)):
            module, args = load(script)
            encoder = common.conv_encoder((1 + more, 28, 28), 2, 8)
            networks = encoder, common.conv_decoder((1, 28, 28), 2, 4 + more)
            networks = [common.Conditional(network) if more else network for network in networks]
            before = copy.deepcopy([network.state_dict() for network in networks])
            module.evaluate(module.elbo_terms, data, args, *networks)
            torch.testing.assert_close([network.state_dict() for network in networks], before)

    def test_average_forgets_the_first_weights(self):
        network = torch.nn.Linear(3, 2)
        for decay, step, share in ((0.99, 0, 0.9), (0.99, 10**6, 0.01), (0.0, 10**6, 1.0)):
            averaged = common.average(torch.nn.Linear(3, 2))
            expected = averaged.weight.lerp(network.weight, share)
            common.update_average(averaged, network, decay, step)
            torch.testing.assert_close(averaged.weight, expected)

    def test_networks_at_every_size(self):
        import dcgan

        for size in (8, 12, 20, 28, 32, 36, 64):
            shape = (3, size, size)
            for deep in (False, True):
                x = common.conv_decoder(shape, 2, 5, deep=deep)(torch.randn(2, 5))
                self.assertEqual(x.shape, (2, *shape))
            self.assertEqual(common.conv_encoder(shape, 2, 6)(x).shape, (2, 6))
            self.assertEqual(common.conv_discriminator(shape, 2, 8)(x).shape, (2,))
            x = dcgan.Generator(shape, 2, 5)(torch.randn(2, 5))
            self.assertEqual(x.shape, (2, *shape))
            self.assertEqual(dcgan.Discriminator(shape, 2)(x).shape, (2,))

    def test_scores(self):
        """Real images score well, collapsed ones do not, and the classifier is trained once."""
        train, test = common.draw_digits(6000, 1), common.draw_digits(500, 2)
        data = common.Data("synthetic", train, test, list("0123456789"))
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            _, args = load("vaegan", "--data-dir", folder)
            score = common.Score(data, args)
            self.assertEqual(common.Score(data, args)(test[0]), score(test[0]))
        self.assertEqual(output.getvalue().count("Training the classifier"), 1)
        x = train[0][:500].float() / 255
        real, same = score(x, train[1][:500]), score(test[0])
        collapsed = score(x[:5].repeat(100, 1, 1, 1))
        self.assertLess(abs(same["fd"]), 1e-3)
        self.assertLess(real["fd"], 0.05 * collapsed["fd"])
        self.assertEqual(real["classes"], 10)
        self.assertLess(same["class_kl"], 0.01)
        self.assertLessEqual(collapsed["classes"], 5)
        self.assertGreater(collapsed["class_kl"], 0.5)
        self.assertGreater(min(real["precision"], real["recall"], real["label_accuracy"]), 0.8)
        self.assertLess(collapsed["recall"], 0.5)

    def test_frechet_distance_of_gaussians(self):
        """|m_f - m_g|^2 + sum (s_f - s_g)^2 for independent normal features."""
        f, g = torch.randn(100_000, 3), 2 * torch.randn(100_000, 3) + 1
        self.assertAlmostEqual(common.frechet_distance(f, g), 6, delta=0.2)

    def test_vae_learns(self):
        vae, args = load("vae")
        torch.manual_seed(0)
        x = common.draw_digits(1024, 1)[0].float() / 255
        encoder = common.mlp_encoder((1, 28, 28), [64], 2 * args.latent_dim)
        decoder = common.mlp_decoder((1, 28, 28), [64], args.latent_dim)
        opt = common.make_optimizer(args, torch.nn.ModuleList([encoder, decoder]), 3e-3)
        losses = [
            vae.train_step(b, 1.0, args, encoder, decoder, opt)["loss"].item()
            for _ in range(8)
            for b in x.split(64)
        ]
        self.assertLess(losses[-1], 0.5 * losses[0])


if __name__ == "__main__":
    unittest.main()

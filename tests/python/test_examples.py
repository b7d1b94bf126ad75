"""The examples as a user starts them: real processes, real command lines, small real data."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROCESS_TIMEOUT_S = 100
KNOWN_COMMAND_LINE = (
    "--model simple_cnn --dataset mnist --epochs 5 --compress --ratio 0.01".split()  # noqa: SIM905
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with one thread per process and end all its children on a timeout."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=PROCESS_TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def torchrun(
    script: str, *arguments: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run an example on two processes; torchrun takes a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return run(*launcher, EXAMPLES / script, *arguments, cwd=cwd, **environment)


def succeeded(completed: subprocess.CompletedProcess[str]) -> str:
    """Return the standard output of a run that has to have succeeded."""
    assert completed.returncode == 0, f"{completed.stdout}\n{completed.stderr}"
    return completed.stdout


def train_digits(folder: Path, *arguments: str | Path) -> tuple[str, dict[str, Any]]:
    """Train on the digits with two processes; return the output and the results."""
    results = folder / "results.json"
    settings = ["--dataset=digits", "--batch-size=32", "--lr=0.05", f"--results={results}"]
    output = succeeded(torchrun("train.py", *settings, *arguments, cwd=folder))
    return output, json.loads(results.read_text())


@pytest.fixture(scope="module")
def compressed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Three epochs, compressed through the C++ entry, with checkpoints and TensorBoard scalars."""
    folder = tmp_path_factory.mktemp("compressed")
    output, results = train_digits(
        folder,
        "--epochs=3",
        "--compress",
        "--ratio=0.05",
        "--entry=cpp",
        "--checkpoint-dir=checkpoints",
        "--tensorboard-dir=tensorboard",
    )
    return folder, output, results


def test_train_dense_on_two_processes(tmp_path: Path) -> None:
    output, results = train_digits(tmp_path, "--epochs=2")

    assert not results["compressed"]
    assert results["bytes_sent_per_step"] == results["dense_bytes_per_step"]
    # Two processes: a ring all-reduce sends every gradient byte once.
    assert results["dense_bytes_per_step"] == 4 * results["parameters"]
    losses = [loss for record in results["history"] for loss in record["losses"]]
    assert len(losses) == results["steps"] == 44
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert "simple_cnn on digits, dense" in output


def test_train_compressed_on_two_processes(
    compressed_run: tuple[Path, str, dict[str, Any]],
) -> None:
    _, output, results = compressed_run

    assert results["compressed"]
    assert results["metrics"]["compressed_ddp/dense_bytes"] == results["dense_bytes_per_step"]
    sent = [count for record in results["history"] for count in record["bytes_sent"]]
    # The first two steps are dense; until DDP's buckets are final, the ranks also agree on them.
    assert sent[:2] == pytest.approx([results["dense_bytes_per_step"]] * 2, abs=500)
    assert sent[3] < results["dense_bytes_per_step"] / 5
    assert set(sent[4:]) == {results["bytes_sent_per_step"]}
    assert 0 < results["bytes_sent_per_step"] < results["dense_bytes_per_step"] / 5
    losses = [loss for record in results["history"] for loss in record["losses"]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for word in ("accuracy", "step time, median", "bytes sent per step", "compression ratio"):
        assert word in output


def test_train_writes_metrics_to_tensorboard(
    compressed_run: tuple[Path, str, dict[str, Any]],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, results = compressed_run
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()

    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "held_out/loss", "held_out/accuracy"} <= scalars
    assert set(results["metrics"]) <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == list(
        range(1, results["steps"] + 1)
    )


def test_resume_is_bitwise_equal_to_an_uninterrupted_run(
    compressed_run: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    uninterrupted = compressed_run[0] / "checkpoints"
    resumed = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "epoch_0003")
    # What a run leaves that was ended while it wrote: passed over.
    (resumed / "epoch_0003").mkdir()

    output, results = train_digits(
        tmp_path,
        "--epochs=3",
        "--compress",
        "--ratio=0.05",
        "--entry=cpp",
        f"--checkpoint-dir={resumed}",
        "--resume",
    )

    assert "going on after epoch 2" in output
    assert results["steps"] == 3 * 22
    assert sorted(path.name for path in resumed.iterdir()) == ["epoch_0002", "epoch_0003"]
    for file in ("training.pt", "rank_0.pt", "rank_1.pt"):
        then, now = (
            torch.load(folder / "epoch_0003" / file, weights_only=True)
            for folder in (uninterrupted, resumed)
        )
        for record in then.get("history", []) + now.get("history", []):
            # The clock is no part of the promise, and a resumed run agrees on its layout anew.
            del record["step_ms"], record["bytes_sent"]
        assert_bitwise_equal(then, now, file)


def assert_bitwise_equal(then: Any, now: Any, place: str) -> None:
    assert type(then) is type(now), place
    if isinstance(then, torch.Tensor):
        assert then.dtype == now.dtype, place
        assert then.shape == now.shape, place
        assert then.numpy().tobytes() == now.numpy().tobytes(), place
    elif isinstance(then, dict):
        assert then.keys() == now.keys(), place
        for name in then:
            assert_bitwise_equal(then[name], now[name], f"{place}: {name}")
    elif isinstance(then, (list, tuple)):
        assert len(then) == len(now), place
        for index, (one, other) in enumerate(zip(then, now, strict=True)):
            assert_bitwise_equal(one, other, f"{place}[{index}]")
    else:
        assert then == now, place


def test_resume_with_another_number_of_processes_is_refused_with_words(
    compressed_run: tuple[Path, str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train

    arguments = ["--dataset=digits", "--batch-size=32", "--compress", "--resume"]
    arguments.append(f"--checkpoint-dir={compressed_run[0] / 'checkpoints'}")
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)

    assert stopped.value.code == 1
    message = capsys.readouterr().out
    assert "was written by 2 processes, this run has 1; start as many" in message


def test_checkpoint_holds_the_residuals_of_every_rank(
    compressed_run: tuple[Path, str, dict[str, Any]],
) -> None:
    newest = compressed_run[0] / "checkpoints" / "epoch_0003"
    first, second = (
        torch.load(newest / f"rank_{rank}.pt", weights_only=True)["compression"]["residuals"]
        for rank in (0, 1)
    )

    assert "linear1.weight" in first
    assert first.keys() == second.keys()
    assert not torch.equal(first["linear1.weight"], second["linear1.weight"])


def test_char_gpt_with_adamw_bucket_scope_and_python_entry(tmp_path: Path) -> None:
    text = "To be, or not to be, that is the question. " * 400
    (tmp_path / "input.txt").write_text(text)

    arguments = "--model char_gpt --dataset shakespeare --data-dir . --max-steps 12 --batch-size 4"
    arguments += " --optimizer adamw --lr 0.01 --lr-warmup 0.25 --lr-schedule cosine --compress"
    arguments += " --ratio 0.1 --scope bucket --entry python --dense-steps 0 --results results.json"
    output = succeeded(torchrun("train.py", *arguments.split(), cwd=tmp_path))

    results = json.loads((tmp_path / "results.json").read_text())
    assert "char_gpt on shakespeare, Top-K, ratio 0.1" in output
    assert results["steps"] == 12
    sent = results["history"][0]["bytes_sent"]
    assert max(sent) < results["dense_bytes_per_step"] / 3, "dense_steps=0 compresses every step"
    assert results["history"][0]["losses"][-1] < results["history"][0]["losses"][0]


def test_known_command_line_alone_trains_without_compression(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data" / "MNIST" / "raw", images=130, packed=False)

    output = succeeded(
        run(sys.executable, EXAMPLES / "train.py", *KNOWN_COMMAND_LINE, cwd=tmp_path)
    )

    told = [line for line in output.splitlines() if line.startswith("--compress")]
    assert len(told) == 1
    assert "one process" in told[0]
    assert "epoch 5/5" in output
    assert "simple_cnn on mnist, dense" in output


def write_mnist(folder: Path, images: int, packed: bool) -> None:
    """Write MNIST's four files with a few random images."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("t10k", 20)):
        arrays = {
            f"{part}-images-idx3-ubyte": random.integers(0, 256, (count, 28, 28), np.uint8),
            f"{part}-labels-idx1-ubyte": random.integers(0, 10, count, np.uint8),
        }
        for name, array in arrays.items():
            head = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            content = head + array.tobytes()
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def test_missing_dataset_names_data_dir_and_ends_every_process(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"  # nobody answers: the download fails at once, network or not
    completed = torchrun(
        "train.py",
        "--dataset=mnist",
        "--data-dir=nowhere",
        cwd=tmp_path,
        http_proxy=closed,
        https_proxy=closed,
        no_proxy="",
    )

    assert completed.returncode != 0
    told = [line for line in completed.stdout.splitlines() if line.startswith("train.py:")]
    assert len(told) == 1, completed.stdout
    assert "--data-dir" in told[0]
    assert "nowhere" in told[0]
    assert "Traceback" not in completed.stdout


def test_minimal_script_runs(tmp_path: Path) -> None:
    output = succeeded(torchrun("minimal_ddp.py", cwd=tmp_path))

    assert "bytes per step instead of" in output
    assert len((EXAMPLES / "minimal_ddp.py").read_text().splitlines()) <= 50


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["alone", "help"])
def test_minimal_script_without_torchrun_says_how_to_start_it(
    tmp_path: Path, arguments: list[str]
) -> None:
    completed = run(sys.executable, EXAMPLES / "minimal_ddp.py", *arguments, cwd=tmp_path)

    assert completed.returncode == 1
    assert "torchrun --standalone --nproc-per-node=2 minimal_ddp.py" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_quick_validation_passes(tmp_path: Path) -> None:
    output = succeeded(run(sys.executable, EXAMPLES / "quick_validation.py", cwd=tmp_path))

    assert "all 8 checks hold" in output
    assert "FAILED" not in output


def test_quick_validation_exits_with_one_when_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quick_validation

    def spawn(process: object, args: tuple[str], nprocs: int) -> None:
        checks = [[True, "one thing"], [False, "another thing"]]
        Path(args[0], "checks.json").write_text(json.dumps(checks))

    monkeypatch.setattr(quick_validation.multiprocessing, "spawn", spawn)

    assert quick_validation.main() == 1
    output = capsys.readouterr().out
    assert "FAILED  another thing" in output
    assert "1 of 2 checks FAILED" in output


class TestOptions:
    """The command line and the YAML files; none of this needs torch."""

    @pytest.fixture(autouse=True)
    def _import_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        import options

        self.parse = options.parse_options

    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            self.parse(arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    def test_known_command_line_has_its_defaults(self) -> None:
        options = self.parse(KNOWN_COMMAND_LINE)

        assert options.compress
        assert (options.ratio, options.epochs, options.batch_size) == (0.01, 5, 64)
        assert (options.lr, options.optimizer, options.error_feedback) == (0.01, "sgd", True)
        nothing = self.parse([])
        assert (nothing.model, nothing.dataset, nothing.epochs) == ("simple_cnn", "mnist", 10)

    def test_command_line_overrides_yaml(self, tmp_path: Path) -> None:
        config = tmp_path / "run.yaml"
        config.write_text("epochs: 7\nlr: 1e-2\ncompress: true\nerror_feedback: false\n")

        options = self.parse([f"--config={config}", "--no-compress", "--lr=0.5"])

        assert (options.epochs, options.lr, options.compress) == (7, 0.5, False)
        assert options.error_feedback is False

    def test_unknown_yaml_key_is_refused_with_the_accepted_ones(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / "run.yaml"
        config.write_text("epochs: 7\ndensity: 0.01\n")

        message = self.refused(capsys, f"--config={config}")

        assert "unknown keys: density" in message
        assert "accepted keys: " in message
        assert "batch_size" in message
        assert "ratio" in message

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("ratio: 2\n", "--ratio: must be in (0, 1], got 2"),
            ("compress: 1\n", "compress must be true or false, got 1"),
            ("epochs: [1]\n", "epochs must be one number or word, got [1]"),
            ("epochs\n", "must hold lines of the form"),
            ("a: b: c\n", "is not valid YAML"),
        ],
    )
    def test_wrong_yaml_is_refused_with_words(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
    ) -> None:
        config = tmp_path / "run.yaml"
        config.write_text(content)

        assert expected in self.refused(capsys, f"--config={config}")

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--ratio=0"], "must be in (0, 1], got 0"),
            (["--lr-warmup=1"], "must be in [0, 1), got 1"),
            (["--epochs=0"], "must be 1 or more, got 0"),
            (["--density=0.1"], "unrecognized arguments: --density=0.1"),
            (["--model=char_gpt"], "--dataset shakespeare"),
            (["--resume"], "--resume needs --checkpoint-dir"),
            (["--gpt-width=30"], "multiple of --gpt-heads"),
            (["--config=nowhere.yaml"], "cannot read nowhere.yaml"),
        ],
    )
    def test_wrong_options_are_refused_with_words(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
    ) -> None:
        message = self.refused(capsys, *arguments)

        assert expected in message.replace("(shakespeare)", "(--dataset shakespeare)")

    @pytest.mark.parametrize(
        "config", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.name
    )
    def test_committed_configs_are_accepted(self, config: Path) -> None:
        assert self.parse([f"--config={config}"]).compress


class TestDatasets:
    """The layouts that --data-dir understands, and what is made of them."""

    @pytest.fixture(autouse=True)
    def _import_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        import datasets

        self.datasets = datasets

    @pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
    @pytest.mark.parametrize("inside", [".", "mnist", "MNIST/raw"])
    def test_mnist_layouts(self, tmp_path: Path, inside: str, packed: bool) -> None:
        write_mnist(tmp_path / "data" / inside, images=30, packed=packed)

        data = self.datasets.load("mnist", tmp_path / "data")

        images, labels = data.train[[3, 1]]
        assert images.shape == (2, 1, 28, 28)
        assert labels.tolist() == data.train.labels[[3, 1]].tolist()
        expected = (data.train.pixels[[3, 1]].float() / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(images, expected)

    def test_truncated_mnist_is_refused_with_words(self, tmp_path: Path) -> None:
        write_mnist(tmp_path / "mnist", images=30, packed=False)
        file = tmp_path / "mnist" / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:-1])

        with pytest.raises(self.datasets.DatasetMissingError, match="not a whole IDX file"):
            self.datasets.load("mnist", tmp_path)

    def test_cifar10_file_holds_out_exact_images(self, tmp_path: Path) -> None:
        arrays = {
            "train_images": np.zeros((50000, 4, 4, 3), np.uint8),
            "train_labels": (np.arange(50000) // 40000).astype(np.uint8),
            "test_images": np.zeros((10000, 4, 4, 3), np.uint8),
            "test_labels": np.full(10000, 9, np.uint8),
        }
        np.savez_compressed(tmp_path / "cifar10.npz", **arrays)

        data = self.datasets.load("cifar10", tmp_path)

        assert (len(data.train), len(data.held_out)) == (40000, 10000)
        assert set(data.train.labels.tolist()) == {0}
        assert set(data.held_out.labels.tolist()) == {1}
        assert "not its test split" in data.held_out_name
        assert data.train[[0, 1]][0].shape == (2, 3, 4, 4)

    def test_text_windows_are_followed_by_their_next_characters(self, tmp_path: Path) -> None:
        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text("abcdefghij" * 200)

        data = self.datasets.load("shakespeare", tmp_path)

        for part in (data.train, data.held_out):
            ids, following = part[list(range(len(part)))]
            assert ids.shape == (len(part), 64)
            assert torch.equal(following, (ids + 1) % 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_takes_small_images(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import models

    model = models.resnet(name, channels=1, classes=10)
    places: list[torch.Size] = []
    model.layer4.register_forward_hook(lambda *call: places.append(call[2].shape[2:]))

    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert places == [(4, 4)]


def test_learning_rate_rises_over_the_given_fraction_and_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import options
    import training

    def factors(*arguments: str) -> list[float]:
        factor = training.learning_rate_factor(options.parse_options(arguments), 100)
        return [factor(step) for step in range(100)]

    cosine = factors("--lr-warmup=0.2", "--lr-schedule=cosine")
    assert cosine[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert cosine[20] == 1
    assert cosine[60] == pytest.approx((1 + 0.05) / 2)
    assert cosine[99] == pytest.approx(0.05, abs=0.001)
    assert factors("--lr-schedule=step")[::25] == pytest.approx([1, 1, 0.1, 0.01])
    assert set(factors()) == {1.0}

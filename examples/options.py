"""Command line and YAML options of train.py.

Nothing here imports torch, so that a mistyped option answers at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODELS = ("simple_cnn", "resnet18", "resnet50", "char_gpt")
DATASETS = ("digits", "mnist", "cifar10", "shakespeare")
# Options that a resumed run must share with the run that wrote the checkpoint. --epochs is not
# among them: a longer run is a fair wish (its learning-rate schedule then spans the new length).
OPTIONS_FIXED_BY_A_CHECKPOINT = (
    "model",
    "dataset",
    "batch_size",
    "max_steps",
    "optimizer",
    "seed",
    "compress",
    "ordinary_adam_groups",
    "gpt_layers",
    "gpt_width",
    "gpt_heads",
)


def _checked(
    kind: type[int] | type[float], accepts: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """Return a converter for argparse that also checks the range."""

    def convert(text: str) -> float:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse writes "invalid float value"
    return convert


_density = _checked(float, lambda value: 0 < value <= 1, "in (0, 1]")
_fraction_below_one = _checked(float, lambda value: 0 <= value < 1, "in [0, 1)")
_positive_float = _checked(float, lambda value: 0 < value < math.inf, "a number above 0")
_non_negative_float = _checked(float, lambda value: 0 <= value < math.inf, "0 or more")
_positive_int = _checked(int, lambda value: value >= 1, "1 or more")
_non_negative_int = _checked(int, lambda value: value >= 0, "0 or more")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of train.py; its options, with underscores, are the keys of a YAML file."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train on real data with DistributedDataParallel, dense or with Top-K "
        "compressed gradients. Start it with torchrun for several processes, or alone for one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # a shortened or mistyped option must not silently mean another one
    )
    flag = argparse.BooleanOptionalAction
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", choices=MODELS, default="simple_cnn", help="network")
    what.add_argument(
        "--dataset", choices=DATASETS, default="mnist", help="data; digits needs no download"
    )
    what.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder that holds the data, in torchvision's layout or as plain files; what is "
        "absent is downloaded to it",
    )
    what.add_argument(
        "--gpt-layers", type=_positive_int, default=2, help="char_gpt: transformer blocks"
    )
    what.add_argument(
        "--gpt-width",
        type=_positive_int,
        default=64,
        help="char_gpt: width, a multiple of --gpt-heads",
    )
    what.add_argument(
        "--gpt-heads", type=_positive_int, default=4, help="char_gpt: attention heads"
    )

    how = parser.add_argument_group("how to train")
    how.add_argument(
        "--epochs", type=_positive_int, default=10, help="passes over the training data"
    )
    how.add_argument(
        "--max-steps",
        type=_positive_int,
        help="train exactly this many optimizer steps instead of --epochs passes",
    )
    how.add_argument(
        "--batch-size", type=_positive_int, default=64, help="samples per process and step"
    )
    how.add_argument(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="optimizer; adamw uses betas (0.9, 0.95)",
    )
    how.add_argument("--lr", type=_positive_float, default=0.01, help="peak learning rate")
    how.add_argument("--momentum", type=_fraction_below_one, default=0.9, help="momentum of sgd")
    how.add_argument(
        "--weight-decay",
        type=_non_negative_float,
        default=0.0,
        help="weight decay, applied by the optimizer",
    )
    how.add_argument(
        "--lr-warmup",
        type=_fraction_below_one,
        default=0.0,
        metavar="FRACTION",
        help="fraction of all steps over which the learning rate rises linearly to --lr (0.12 = "
        "the first 12 %% of the steps)",
    )
    how.add_argument(
        "--lr-schedule",
        choices=("constant", "cosine", "step"),
        default="constant",
        help="after the warm-up: cosine falls to 5 %% of --lr; step divides by 10 at one half and "
        "again at three quarters of what is left",
    )
    how.add_argument(
        "--seed",
        type=int,
        default=0,
        help="fixes the weights, the order of the data and every random draw",
    )

    compression = parser.add_argument_group("gradient compression (needs torchrun)")
    compression.add_argument(
        "--compress",
        action=flag,
        default=False,
        help="exchange Top-K gradients with error feedback",
    )
    compression.add_argument(
        "--ratio",
        type=_density,
        default=0.01,
        help="fraction of each gradient tensor that is sent, in (0, 1]",
    )
    compression.add_argument(
        "--error-feedback",
        action=flag,
        default=True,
        help="keep what was not sent and add it to the next gradient",
    )
    compression.add_argument(
        "--scope",
        choices=("tensor", "bucket", "chunk"),
        default="tensor",
        help="one selection per tensor, per DDP bucket or per 4,096 entries of a tensor",
    )
    compression.add_argument(
        "--dense-steps",
        type=_non_negative_int,
        default=2,
        help="first steps that are sent uncompressed",
    )
    compression.add_argument(
        "--entry",
        choices=("python", "cpp"),
        default="python",
        help="register the hook through Python or as a C++ hook",
    )
    compression.add_argument(
        "--ordinary-adam-groups",
        action=flag,
        default=False,
        help="adamw with --compress: one ordinary parameter group instead of adam_param_groups; "
        "for comparison, it trains worse",
    )

    run = parser.add_argument_group("where to run and what to keep")
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes cuda where there is one",
    )
    run.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="process-group backend (default: gloo on cpu, nccl on cuda)",
    )
    run.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="options from a YAML file; the command line overrides them",
    )
    run.add_argument(
        "--checkpoint-dir",
        type=Path,
        help="write a checkpoint here after every epoch (the newest two stay)",
    )
    run.add_argument(
        "--resume",
        action=flag,
        default=False,
        help="go on from the newest checkpoint in --checkpoint-dir",
    )
    run.add_argument("--tensorboard-dir", type=Path, help="write TensorBoard scalars here")
    run.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="write the final figures and the history here",
    )
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: this process's) over the YAML file that --config names.

    Raises SystemExit with a message that names the option and what it accepts.
    """
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    config = _config_path(command_line)
    from_file = _read_config(parser, config) if config is not None else []
    # argparse lets a later value win: the file first, then the command line.
    options = parser.parse_args([*from_file, *command_line])
    _check_together(parser, options)
    return options


def _config_path(command_line: list[str]) -> Path | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    return finder.parse_known_args(command_line)[0].config


def _read_config(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Return the YAML file as command-line words, so that both go through the same checks."""
    import yaml

    actions = {
        action.dest: action
        for action in parser._actions  # argparse offers no public list of its options
        if action.dest not in ("help", "config")
    }
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config: cannot read {path}: {error.strerror}")
    except yaml.YAMLError as error:
        parser.error(f"--config: {path} is not valid YAML: {error}")
    if not isinstance(settings, dict):
        parser.error(
            f"--config: {path} must hold lines of the form 'option: value', "
            f"got {type(settings).__name__}"
        )
    unknown = [str(key) for key in settings if key not in actions]
    if unknown:
        parser.error(
            f"--config: {path} has unknown keys: {', '.join(unknown)}; "
            f"accepted keys: {', '.join(sorted(actions))}"
        )
    return [_as_word(parser, path, actions[key], value) for key, value in settings.items()]


def _as_word(
    parser: argparse.ArgumentParser, path: Path, action: argparse.Action, value: Any
) -> str:
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            parser.error(f"--config: {path}: {action.dest} must be true or false, got {value!r}")
        return option if value else option.replace("--", "--no-", 1)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        parser.error(f"--config: {path}: {action.dest} must be one number or word, got {value!r}")
    return f"{option}={value}"


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that are fine alone but not together."""
    if (options.model == "char_gpt") != (options.dataset == "shakespeare"):
        parser.error(
            f"--model {options.model} does not fit --dataset {options.dataset}: "
            "char_gpt reads text (shakespeare), the other models images (digits, mnist, cifar10)"
        )
    if options.gpt_width % options.gpt_heads:
        parser.error(
            f"--gpt-width must be a multiple of --gpt-heads ({options.gpt_heads}), "
            f"got {options.gpt_width}"
        )
    if options.resume and options.checkpoint_dir is None:
        parser.error(
            "--resume needs --checkpoint-dir, the folder with the checkpoints to go on from"
        )

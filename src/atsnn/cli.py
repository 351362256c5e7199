"""The ``atsnn`` command."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import __version__
from .checks import AtsnnError, InvalidValue, check_choice, require
from .data import DATASETS
from .options import check_effects, check_files
from .sweep.command import add_options as add_sweep_options
from .train.options import USUAL_DATA, add_data_options, option_of
from .train.options import add_options as add_train_options

GOOD, FAILED, WRONG_USE = 0, 1, 2


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atsnn",
        description="Spiking vision transformers whose tokens halt early: train, measure, show.",
    )
    parser.add_argument("--version", action="version", version=f"atsnn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            formatter_class=_HelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    info = command("info", _info, "print what is built, what is in use and what is missing")
    _json_option(info)

    check = command(
        "check", _check,
        "compare a backend's operations, or a function of yours, with the reference, case by case",
    )  # fmt: skip
    check.add_argument("--device", default="cpu", help="PyTorch device to run on, such as cuda")
    check.add_argument(
        "--backend", default="auto", choices=("auto", "native", "triton", "reference"),
        help="who computes; auto: what serves the device",
    )  # fmt: skip
    check.add_argument(
        "--kernel", metavar="MODULE:FUNCTION",
        help="judge this function, as atsnn.testing.check does, and no backend of atsnn's",
    )  # fmt: skip
    check.add_argument("--op", help="the operation that KERNEL is to be (default: neuron)")
    check.add_argument(
        "--only", nargs="+", metavar="NAME",
        help="check these operations alone; of a kernel these cases, names or patterns",
    )  # fmt: skip
    _json_option(check)

    bench = command(
        "bench", _bench,
        "measure what halting saves, what it costs (--overheads) and how cost grows (--growth)",
    )  # fmt: skip
    _bench_options(bench)
    _json_option(bench)

    evaluate = command("eval", _eval, "print accuracy and executed cells on the test images")
    _model_options(evaluate)
    evaluate.add_argument("--limit", type=int, help="use the first LIMIT test images only")
    evaluate.add_argument("--halting-off", action="store_true", help="run it as a plain Spikformer")
    evaluate.add_argument(
        "--detail", action="store_true",
        help="where halting happens: by class, by how sure the model is, by what tokens show",
    )  # fmt: skip
    evaluate.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="draw it: for each class the mean image and the blocks its tokens ran (.png)",
    )  # fmt: skip
    _json_option(evaluate)

    show = command("show", _show, "draw images with the depth and timesteps of each token (PNG)")
    _model_options(show)
    show.add_argument("--out", type=Path, default=Path("atsnn.png"), help="PNG to write")
    show.add_argument("--count", type=int, default=6, help="number of test images")
    show.add_argument("--start", type=int, default=0, help="first test image")

    train = command("train", _train, "train an AT-Spikformer on images")
    _train_options(train)
    _json_option(train)

    sweep = command(
        "sweep", _sweep,
        "train or run a model in many ways: one table, one plot of accuracy against cost",
    )  # fmt: skip
    add_sweep_options(sweep)
    _json_option(sweep)
    return parser


def _train_options(sub: argparse.ArgumentParser) -> None:
    add_train_options(sub)
    sub.add_argument("--out", type=Path, help="folder for the checkpoint (default: runs/DATA)")
    sub.add_argument(
        "--resume", action="store_true",
        help="continue a run that was cut off, with all its settings given again",
    )  # fmt: skip
    sub.add_argument(
        "--save-every", type=_seconds, default=300.0, metavar="SECONDS",
        help="write what resuming needs this often, and after every epoch",
    )  # fmt: skip
    sub.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")


def _bench_options(bench: argparse.ArgumentParser) -> None:
    _model_options(bench)
    bench.add_argument(
        "--config", metavar="NAME|FILE",
        help="measure an untrained network that is made to fire: a named model, such as "
        "spikformer_4_384, or a JSON file",
    )  # fmt: skip
    bench.add_argument(
        "--set", nargs="+", metavar="NAME=VALUE",
        help="change values of --config, such as T=8 image_size=64 merge_r=8",
    )  # fmt: skip
    bench.add_argument(
        "--rates", type=float, nargs=2, metavar=("SPIKES", "INPUTS"),
        help="firing rates of --config: of spikes, and of what goes into blocks "
        "(default: 0.05 0.15)",
    )  # fmt: skip
    bench.add_argument(
        "--halted", type=float, nargs="+", metavar="SHARE",
        help="shares of cells that halt by synthetic patterns (default: what a checkpoint halts "
        "itself; of --config 0.2 0.4 0.6)",
    )  # fmt: skip
    bench.add_argument(
        "--batch", type=int, nargs="+", metavar="SIZE",
        help="batch sizes to time (default: 1 32; --overheads 1 4 16; --growth 1)",
    )  # fmt: skip
    bench.add_argument(
        "--backends", nargs="+", metavar="NAME",
        help="who computes, side by side: engine, native, reference (default: engine native)",
    )  # fmt: skip
    bench.add_argument("--rounds", type=int, default=15, help="interleaved rounds of the timing")
    bench.add_argument("--threads", type=int, help="threads to use (default: PyTorch's)")
    bench.add_argument("--limit", type=int, help="use the first LIMIT test images only")
    bench.add_argument(
        "--execution", choices=("packed", "masked"), default="packed",
        help="of the modules: run active cells only, or all and zero the halted ones",
    )  # fmt: skip
    kind = bench.add_mutually_exclusive_group()
    kind.add_argument(
        "--growth", nargs="*", metavar="AXIS",
        help="how cost grows with: tokens, timesteps, batch, channels, depth, active (default: "
        "all of them); with --config",
    )  # fmt: skip
    kind.add_argument(
        "--overheads", action="store_true",
        help="what scores, accumulators, moves, matching and merging cost, and from where on "
        "halting pays",
    )  # fmt: skip
    bench.add_argument(
        "--tokens", type=int, nargs="+", metavar="N",
        help="numbers of tokens, squares, of --growth and --overheads",
    )  # fmt: skip
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw it, .png or .svg")
    bench.add_argument(
        "--html", type=Path, metavar="FILE", help="write tables and plots as one page"
    )


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", default="digits",
        help="packaged name (atsnn info lists them), folder or hub id",
    )  # fmt: skip
    add_data_options(sub, of_checkpoint=True)


def _json_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE too")


# -- helpers --------------------------------------------------------------------------------------


def _console() -> Any:
    require("rich", "cli", "the atsnn command")
    from rich.console import Console

    return Console(highlight=False)


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise InvalidValue(f"--json: expected a file that can be written, got {error}") from error


def _settle_data(args: argparse.Namespace) -> None:
    """Without ``--data`` a checkpoint runs on what it was trained on; on other images it warns."""
    from .checkpoint import read_extra

    trained_on = None if args.checkpoint is None else read_extra(args.checkpoint).get("data")
    if args.data is None:
        args.data = trained_on if trained_on in tuple(DATASETS) else USUAL_DATA
    check_choice(args.command, "--data", args.data, DATASETS)
    if trained_on not in (None, args.data):
        print(
            f"atsnn: warning: {args.checkpoint} was trained on {trained_on} and runs on "
            f"{args.data} here",
            file=sys.stderr,
        )


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The checkpoint and the test images it is asked to run on."""
    from . import data
    from .checkpoint import load_trained
    from .checks import check_integer

    _settle_data(args)
    model = load_trained(args.checkpoint)
    split = data.load(args.data, model.config.image_size, args.data_dir)["test"]
    limit = getattr(args, "limit", None)
    if limit is not None:
        check_integer(args.command, "--limit", limit, at_least=1)
        split = split[:limit]
    channels = split.pixels.shape[1]
    if channels != model.config.in_channels:
        raise InvalidValue(
            f"{args.command}: {args.checkpoint} expects images with {model.config.in_channels} "
            f"channels, got {args.data} with {channels}"
        )
    return model, split


# -- commands -------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    from .checkpoint import PACKAGED
    from .measure import machine
    from .ops import available_backends, native_level
    from .ops.triton import interpreted
    from .sheets import number_of

    console = _console()
    found: dict[str, Any] = {
        "machine": machine(),
        "backends": available_backends(),
        "instruction_set": native_level(),
        "checkpoints": [name for name, folder in PACKAGED.items() if folder.is_dir()],
    }
    m = found["machine"]
    console.print(f"atsnn {m['atsnn']}   torch {m['torch']}   python {m['python']}")
    console.print(
        f"{m['processor']}, {number_of(m['cores'], 'core')}, {number_of(m['threads'], 'thread')}"
    )
    console.print(f"PyTorch computes with {m['pytorch_instruction_set']}")
    for name, state in found["backends"].items():
        level = f", {native_level()}" if name == "native" and native_level() else ""
        level = ", interpreted" if name == "triton" and interpreted else level
        console.print(f"backend {name:<10} {'available' + level if state is True else state}")
    console.print(f"checkpoints        {', '.join(found['checkpoints'])}")
    _write_json(args.json, found)
    return GOOD


def _check(args: argparse.Namespace) -> int:
    if args.kernel is not None:
        return _check_kernel(args)
    if args.op is not None:
        raise InvalidValue("check: --op belongs to --kernel, got it without one")
    import torch

    from . import report
    from .conformance import check_backend
    from .ops import serving_backend

    console = _console()
    found = []
    with console.status("starting") as status:
        for finding in check_backend(args.backend, args.device, args.only):
            status.update(f"{finding.operation}, {finding.case}")
            found.append(finding)
    ran = serving_backend("check", args.backend, torch.device(args.device))
    console.print(
        f"[bold]atsnn check[/bold]  backend {ran}, device {args.device}, against the reference"
    )
    report.print_all(console, report.check_tables(found))
    _write_json(
        args.json,
        {"backend": args.backend, "device": args.device, "findings": [vars(f) for f in found]},
    )
    return FAILED if any(finding.result == "fail" for finding in found) else GOOD


def _check_kernel(args: argparse.Namespace) -> int:
    from . import kit, report

    if args.backend != "auto":
        raise InvalidValue(
            f"check: expected --kernel or --backend, got both, {args.kernel} and {args.backend}"
        )
    op = args.op or "neuron"
    fn = _function(args.kernel)
    console = _console()
    found = []
    with console.status("starting") as status:
        for finding in kit.findings(fn, kit.cases(op, args.only), args.device):
            status.update(f"{finding.operation}, {finding.case}")
            found.append(finding)
    result = kit.Report(args.kernel, op, args.device, found)
    console.print(f"[bold]atsnn check[/bold]  {result.title}")
    report.print_all(console, report.kernel_tables(result))
    _write_json(
        args.json,
        {
            "kernel": args.kernel, "op": op, "device": args.device,
            "findings": [vars(f) for f in found],
        },
    )  # fmt: skip
    return GOOD if result.ok else FAILED


def _function(path: str) -> Any:
    """The function that ``package.module:function`` names, looked for here too."""
    import importlib

    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise InvalidValue(f"check: --kernel must be package.module:function, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a module of somebody's raises on import
        raise InvalidValue(
            f"check: --kernel must name a module that can be imported, got {name!r}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    try:
        return attrgetter(attribute)(module)
    except AttributeError as error:
        raise InvalidValue(f"check: --kernel: {error}") from error


def _bench(args: argparse.Namespace) -> int:
    from . import bench, measure
    from .bench.command import run

    console = _console()
    if args.config is None:
        _settle_data(args)
    with measure.threads(args.threads):
        try:
            result = run(args, console)
        except bench.GateFailed as error:
            print(f"atsnn: {error}", file=sys.stderr)
            return FAILED
    _write_json(args.json, result)
    return GOOD


def _eval(args: argparse.Namespace) -> int:
    from .bench.tables import accuracy_sheet
    from .schedule import score_of
    from .train import evaluate

    console = _console()
    model, split = _load(args)
    if args.halting_off:
        model = model.without_halting()
    found = evaluate(model, split).to_dict()
    found["score"] = score_of(model)
    found["halting"] = model.config.halting
    console.print(accuracy_sheet({args.checkpoint: found}, args.data).rich())
    if args.detail or args.plot is not None:
        found["detail"] = _detail(console, model, split, args.plot)
    _write_json(args.json, found | {"checkpoint": args.checkpoint, "data": args.data})
    return GOOD


def _detail(console: Any, model: Any, split: Any, plot: Path | None) -> dict[str, Any]:
    from .insight import draw_classes, insight, insight_sheets, to_dict

    seen = insight(model, split)
    for sheet in insight_sheets(seen):
        console.print(sheet.rich())
        console.print(sheet.note)
        console.print()
    if plot is not None:
        console.print(f"wrote {draw_classes(seen, split, plot)}")
    return to_dict(seen)


def _show(args: argparse.Namespace) -> int:
    from . import report
    from .checks import check_integer

    model, split = _load(args)
    check_integer("show", "--count", args.count, at_least=1, at_most=64)
    check_integer("show", "--start", args.start, at_least=0, at_most=len(split) - 1)
    path = report.depth_map(model, split, args.out, args.count, args.start)
    _console().print(f"wrote {path}")
    return GOOD


def _train(args: argparse.Namespace) -> int:
    from . import measure
    from .train import train
    from .train.options import config_of

    console = _console()
    config = config_of(args)
    folder = args.out or Path("runs") / args.data
    with measure.threads(args.threads):
        _, found = train(
            config, folder, resume=args.resume, save_every=args.save_every,
            tensorboard=args.tensorboard, progress=sys.stderr.isatty(), log=console.print,
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return GOOD  # of several processes the first one tells
    name = "validation" if config.validation else "test"
    _write_json(args.json, found.to_dict() | {"checkpoint": str(folder), "data": args.data})
    console.print(
        f"{name} accuracy {found.accuracy:.2%}, {found.cells:.1%} of cells executed; "
        f"checkpoint in {folder}"
    )
    return GOOD


def _sweep(args: argparse.Namespace) -> int:
    from . import measure
    from .sweep.command import run

    console = _console()
    _settle_data(args)
    with measure.threads(args.threads):
        result = run(args, console)
    _write_json(args.json, result)
    return GOOD


def _given(argv: Sequence[str]) -> list[str]:
    """The options that a command line names, whatever their values."""
    parser = _parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for sub in commands.choices.values():
        for action in sub._actions:
            action.default = argparse.SUPPRESS
    return list(vars(parser.parse_args(argv)))


def _training_options() -> list[str]:
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    return list(vars(parser.parse_args([])))


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {text}")
    return value


# What checks call values that options give, where no setting is called so.
_CALLED = {"held_out: count": "validation", "load: the data folder": "data_dir"}


def _with_option(message: str, args: argparse.Namespace) -> str:
    """Name the option too where a check names the setting: ``T must be ... (--timesteps)``."""
    found = re.match(r"(\w+: (\w+|the data folder)) must ", message)
    option = _CALLED.get(found[1]) or option_of(found[2]) if found else ""
    return f"{message} (--{option.replace('_', '-')})" if option in vars(args) else message


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 (good), 1 (a check failed) or 2 (wrong use)."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        check_effects(args, _given(args.argv), _training_options())
        if not int(os.environ.get("RANK", "0")):  # of several processes the first one writes
            check_files(args)
        return args.run(args)
    except AtsnnError as error:
        print(f"atsnn: {_with_option(str(error), args)}", file=sys.stderr)
        return WRONG_USE
    except BrokenPipeError:
        return GOOD
    except OSError as error:  # a file or folder that cannot be read or written
        print(
            f"atsnn: {args.command}: expected files that can be used, got {error}", file=sys.stderr
        )
        return WRONG_USE
    except KeyboardInterrupt:
        print("atsnn: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `megatron-aspo train RECIPE [key.path=value …]`, `plan`, `data`, `doctor`, `check-loss`, `grade`, …"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aspo import __version__
from megatron_aspo.common.errors import ProcessError, UserError

if TYPE_CHECKING:
    from megatron_aspo.config import Config


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a check failed, 2 an error that the user can correct, 130 interrupted, 143 terminated; else 1."""
    parser = command_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # Overrides may also follow an option.
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    known = {
        "train": _train,
        "plan": _plan,
        "data": _data,
        "doctor": _doctor,
        "check-loss": _check_loss,
        "grade": _grade,
        "eval": _eval,
        "grade-server": _grade_server,
        "convert": _convert,
        "config": _config,
        "plan-sync": _plan_sync,
        "verify-sync": _verify_sync,
    }
    command = known[parsed.command]
    if rest:
        if not hasattr(parsed, "overrides"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parsed.overrides += rest
    sys.exit(_guarded(command, parsed))


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="megatron-aspo", description="Reinforcement learning of language models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model by a recipe", description="Train a model by a recipe.")
    train.add_argument("recipe", type=Path, help="YAML recipe, see examples/recipes")
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")
    train.add_argument("--resume", default="", metavar="auto|PATH", help="go on from the newest checkpoint, or from the one named")
    train.add_argument("--ray-address", default="", help="Ray cluster to join; without it one is started on this machine")
    train.add_argument("--dry-run", action="store_true", help="print the plan of the run (megatron-aspo plan) and start nothing")
    plan = commands.add_parser(
        "plan",
        help="show what a recipe would do",
        description="Check a recipe against its model, and print ranks, memory and traffic of the run; nothing is started.",
    )
    plan.add_argument("recipe", type=Path, help="YAML recipe, see examples/recipes")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="", help="device of the run; default: this machine's")
    plan.add_argument("--nodes", type=_count, default=1, metavar="N", help="show which ranks and engines each of N equal nodes carries")
    plan.add_argument("--json", action="store_true", help="print only the numbers, as one JSON object, in bytes")
    check = commands.add_parser("check-loss", help="check a policy loss", description="Check a policy loss before it is used in a run.")
    check.add_argument("loss", help="package.module:function, or the name of a built-in loss")
    check.add_argument("options", nargs="*", metavar="option=value", help="its options (algorithm.policy_loss_options in a recipe)")
    _add_data(commands)
    _add_doctor(commands)
    _add_grade(commands)
    _add_eval(commands)
    _add_grade_server(commands)
    _add_convert(commands)
    config = commands.add_parser("config", help="print the JSON Schema of a recipe", description="Describe recipes to other programs.")
    schema = "print the JSON Schema of a recipe, by which editors complete and check one"
    config.add_argument("--schema", action="store_true", required=True, help=schema)
    _add_plan_sync(commands)
    _add_verify_sync(commands)
    return parser


def _add_data(commands) -> None:
    data = commands.add_parser(
        "data",
        help="show how data files are understood",
        description="Read and check data as a run would, and print how it is understood: prompts by data_source with the reward that each "
        "gets, lengths in tokens, repetitions, and prompts as the model gets them, special tokens included.",
    )
    data.add_argument("locations", nargs="*", metavar="FILE", help="file, directory or hub:NAME, as in data.path; default: the recipe's")
    data.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help="the same for held-out prompts (data.eval_path)")
    _add_recipe(data, "YAML recipe whose model, data and data options are used")
    data.add_argument("--model", default="", help="model directory or hub name, whose tokenizer and chat template are used")
    data.add_argument("--reward", default="", metavar="NAME", help="code, math, by_source, or package.module:function (data.reward)")
    data.add_argument("--prompts", type=int, default=3, metavar="N", help="how many prompts are shown (default 3)")
    data.add_argument("--json", action="store_true", help="print only the numbers, as one JSON object")


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine or a cluster",
        description="Check this machine, or every node of a Ray cluster and the connections between them, and print for each failure what "
        "to do. Exit status: 0 nothing failed, 1 a check failed, 2 misuse.",
    )
    doctor.add_argument("--ray-address", default="", metavar="HOST:PORT", help="Ray cluster to check; default: this machine alone")
    _add_recipe(doctor, "YAML recipe whose model, data and placement are checked too")
    doctor.add_argument(
        "--bandwidth", type=float, metavar="SECONDS", help="time to measure each pair of nodes (default 1); 0: connect only"
    )
    doctor.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="time limit of each check (default 30)")
    doctor.add_argument("--json", action="store_true", help="print one JSON object without secrets and user names, for issue reports")


def _add_recipe(command: argparse.ArgumentParser, purpose: str) -> None:
    command.add_argument("--recipe", type=Path, help=purpose)
    replaced = "values that replace the recipe's"
    command.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key.path=value", help=replaced)


def _add_grade(commands) -> None:
    grade = commands.add_parser(
        "grade",
        help="try a reward on responses from a file",
        description="Score responses as a run would. Each row of the file (JSONL, a JSON array or Parquet) has response, ground_truth, "
        "data_source and optionally prompt and extra; each line printed is a JSON object with score, verdict, reason and seconds, the last "
        "a summary.",
    )
    grade.add_argument("file", type=Path, metavar="FILE", help="the responses")
    grade.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")
    grade.add_argument("--recipe", type=Path, help="YAML recipe whose reward is tried")
    grade.add_argument("--reward", default="", metavar="NAME", help="code, math, a task, or package.module:function")


def _add_grade_server(commands) -> None:
    server = commands.add_parser(
        "grade-server",
        help="grade over HTTP",
        description="Answer POST /grade, with a row as `megatron-aspo grade` reads it, and SandboxFusion's POST /run_code.",
    )
    server.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")
    server.add_argument("--recipe", type=Path, help="YAML recipe whose reward grades")
    server.add_argument("--reward", default="", metavar="NAME", help="as data.reward; default: by_source")
    server.add_argument("--protocol", default="", metavar="NAME", help="grade as this protocol of megatron-aspo eval requires")
    server.add_argument("--host", default="127.0.0.1", help="address of the private interface, or `all` (default 127.0.0.1)")
    server.add_argument("--port", type=int, default=8300, help="0 takes any (default 8300)")
    server.add_argument("--workers", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    server.add_argument("--token-file", default="", metavar="FILE", help="default: ~/.megatron_aspo/grade/token, made if missing")
    server.add_argument("--max-body-mib", type=_count, default=256, metavar="N", help="largest request (default 256)")


def _add_eval(commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model by a protocol",
        description="Sample responses to the problems of a protocol, grade them, and print the metrics with 95 %% intervals over problems; "
        "the last line is a JSON object. The same command continues an interrupted evaluation. Exit status: 0 done, 1 parts "
        "that are to be graded are not generated yet, 2 misuse.",
    )
    evaluate.add_argument(
        "target",
        help="Hugging Face directory or hub name, checkpoint (also torch_dist), run directory, or URL of an OpenAI-compatible server "
        "(http…/v1)",
    )
    names = "archer_lcb_v5, archer_lcb_v6, lcb_official, aime24, aime25 or humaneval"
    evaluate.add_argument("--protocol", default="", metavar="NAME", help=names)
    evaluate.add_argument("--recipe", type=Path, help="YAML recipe whose held-out prompts are used; default: that of the run")
    evaluate.add_argument("--data", nargs="+", default=[], metavar="FILE", help="files with the problems, as in data.path")
    replaced = "values that replace the protocol's, such as samples=4"
    evaluate.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value", help=replaced)
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="directory to write, or to continue")
    evaluate.add_argument("--stage", choices=("all", "generate", "grade"), default="all", help="the part of the work to do (default all)")
    evaluate.add_argument("--against", type=Path, metavar="DIR", help="evaluation of the same problems to compare with, problem by problem")
    evaluate.add_argument("--model", default="", metavar="NAME", help="the server's name of the model, where it has several")
    evaluate.add_argument("--accept-count", action="store_true", help="accept another number of problems than the protocol's")
    evaluate.add_argument("--ray-address", default="", metavar="HOST:PORT", help="Ray cluster to join; default: one is started here")
    evaluate.add_argument("--watch", action="store_true", help="evaluate each checkpoint below the directory TARGET once, as they appear")
    evaluate.add_argument("--once", action="store_true", help="with --watch: evaluate the existing checkpoints, and end")


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert between Hugging Face and Megatron",
        description="Convert a Hugging Face model to a Megatron checkpoint at any layout, or a checkpoint back, completely or not at all.",
    )
    convert.add_argument(
        "source", help="Hugging Face directory or hub name, a checkpoint such as runs/NAME/checkpoints/step_10, or a torch_dist checkpoint"
    )
    convert.add_argument("target", type=Path, help="directory to create; must not exist")
    convert.add_argument("--to", choices=("megatron", "torch_dist", "huggingface"), help="default: huggingface, or from there megatron")
    convert.add_argument(
        "--config-from", metavar="MODEL", help="directory or hub name with config and tokenizer, for a torch_dist source that has none"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="element type of all tensors; default: the source's")
    convert.add_argument("--verify", action="store_true", help="compare the logits of both models on random tokens")
    convert.add_argument("--max-shard-gb", type=float, metavar="GB", help="largest file of a Hugging Face target (default 5)")
    layout = convert.add_argument_group("layout of a Megatron target")
    for axis, what in (
        ("tensor", "ranks that share each matrix"),
        ("pipeline", "stages that share the layers"),
        ("virtual-pipeline", "chunks of layers on each stage"),
        ("expert", "ranks that share the experts"),
        ("expert-tensor", "ranks that share each expert's matrices; default: as --tensor-parallel"),
    ):
        option = f"--{axis}-parallel" if axis != "virtual-pipeline" else "--virtual-pipeline"
        layout.add_argument(option, type=_count, metavar="N", help=what)
    layout.add_argument("--naming", choices=("local", "transformer_engine"), help="whose parameter names (default local)")


def _add_plan_sync(commands) -> None:
    plan = commands.add_parser(
        "plan-sync",
        help="what a weight sync would send, from a config alone",
        description="Plan a whole weight transfer from a Hugging Face config and add it up, exactly; the last line is a JSON object. "
        "Training ranks fill nodes in order, engines fill further nodes.",
    )
    plan.add_argument("model", type=Path, metavar="CONFIG", help="directory with a config.json")
    axes = "tensor, pipeline, data, virtual, expert, expert_tensor, context"
    plan.add_argument("--train", nargs="*", default=[], metavar="AXIS=N", help=f"parallel sizes of the trainer; axes: {axes}")
    plan.add_argument("--engines", type=_count, default=1, metavar="N", help="number of engines (default 1)")
    plan.add_argument("--engine-tensor", type=_count, default=1, metavar="N", help="workers of each engine (default 1)")
    plan.add_argument("--engine-expert-parallel", action="store_true", help="each worker holds whole experts")
    plan.add_argument("--node-devices", type=_count, default=8, metavar="N", help="devices of a node (default 8)")
    plan.add_argument("--colocated", action="store_true", help="engines share the devices of the training ranks, in order")
    plan.add_argument("--dtype", default="bfloat16", help="element type of the engines (default bfloat16)")
    plan.add_argument("--bucket-mb", type=_count, default=512, metavar="MB", help="size of a bucket (default 512)")
    between = "GB/s of one device to other nodes (default 50: one link of 400 Gbit/s each)"
    plan.add_argument("--between-gb-s", type=_speed, default=50.0, metavar="SPEED", help=between)
    plan.add_argument("--within-gb-s", type=_speed, default=300.0, metavar="SPEED", help="GB/s of one device inside its node (default 300)")


def _add_verify_sync(commands) -> None:
    verify = commands.add_parser(
        "verify-sync",
        help="prove the weight sync of a recipe",
        description="Start a recipe's training ranks and engines, publish the weights, and compare every number that engines received and "
        "hold with the model's files. Prints each difference; the last line is a JSON object. Exit status: 0 nothing differs, 1 something "
        "differs, 2 misuse.",
    )
    verify.add_argument("recipe", type=Path, help="YAML recipe, see examples/recipes")
    verify.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the recipe's")


def _speed(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _data(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.data import run_data

    run_data(parsed)


def _doctor(parsed: argparse.Namespace) -> int:
    from megatron_aspo.doctor.command import run_doctor

    return run_doctor(parsed)


def _grade(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.grade import run_grade

    run_grade(parsed)


def _eval(parsed: argparse.Namespace) -> int:
    from megatron_aspo.commands.eval import run_eval

    return run_eval(parsed)


def _grade_server(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.grade_server import run_grade_server

    run_grade_server(parsed)


def _convert(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.convert import run_convert

    run_convert(parsed)


def _config(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.config import print_schema

    print_schema()


def _plan_sync(parsed: argparse.Namespace) -> None:
    from megatron_aspo.commands.plan_sync import run_plan_sync

    run_plan_sync(parsed)


def _verify_sync(parsed: argparse.Namespace) -> int:
    from megatron_aspo.commands.verify_sync import run_verify_sync

    return run_verify_sync(parsed)


def _train(parsed: argparse.Namespace) -> None:
    from megatron_aspo.config import load_config

    options = {"ray_address": parsed.ray_address, "resume": parsed.resume}
    overrides = [*parsed.overrides, *(f"{key}={json.dumps(value)}" for key, value in options.items() if value)]
    config = load_config(parsed.recipe, overrides)
    if parsed.dry_run:
        _print_plan(config, "", 1, False)
        return
    from megatron_aspo.train import train

    train(config)


def _plan(parsed: argparse.Namespace) -> None:
    from megatron_aspo.config import load_config

    _print_plan(load_config(parsed.recipe, parsed.overrides), parsed.device, parsed.nodes, parsed.json)


def _print_plan(config: "Config", device: str, nodes: int, as_json: bool) -> None:
    from megatron_aspo.runtime.plan import format_plan, make_plan, plan_as_json

    plan = make_plan(config, device, nodes)
    print(json.dumps(plan_as_json(plan)) if as_json else "\n".join(format_plan(plan)))


def _check_loss(parsed: argparse.Namespace) -> int:
    from megatron_aspo.losses.tester import check_loss

    return 0 if check_loss(parsed.loss, parsed.options) else 1


def _guarded(command, parsed: argparse.Namespace) -> int:
    received: list[int] = []

    def stop(number: int, frame) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return command(parsed) or 0
    except BaseException as error:
        # Ray turns an interrupt during a call into other exceptions: after a signal, any exception counts as the signal.
        if received or isinstance(error, KeyboardInterrupt):  # a user's code may raise it without a signal
            number = received[0] if received else signal.SIGINT
            print(f"megatron-aspo: {'interrupted' if number == signal.SIGINT else 'terminated'}", file=sys.stderr)
            return 128 + number
        if isinstance(error, UserError):
            print(f"megatron-aspo: error: {error}", file=sys.stderr)
            return 2
        if isinstance(error, ProcessError):
            print(f"megatron-aspo: error: {error}", file=sys.stderr)
            return 1
        if isinstance(error, BrokenPipeError):
            # The reader of our output is gone; the exit handler must not try to flush it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise

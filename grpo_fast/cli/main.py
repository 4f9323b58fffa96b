"""The command line: `grpo-fast` and its verbs. Errors are one sentence and exit code 2."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from grpo_fast import __version__

from .names import check_names

DEBUG = "GRPO_FAST_DEBUG"
_DESCRIPTION = """\
GRPO for language models through fused losses.

commands:
  train         train a model with GRPO; without options, the embedded demo
  ppo           train a model with PPO and a critic; --demo shows it
  reward-model  train a reward model on ranked answers; --demo shows it
  iterate       let policy and reward model teach each other; --demo shows it
  plan          what fits on which GPUs; which route the loss takes for a shape
  doctor        which backend runs and why, versions, a numerical self-test
"""
_EPILOG = f"""\
Each command has --help, e.g. grpo-fast plan --help. Errors are one sentence; --debug, or
{DEBUG}=1 in the environment, shows the traceback.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 (a failed self-test), 2 (an error), 130 or 143 (a signal).

    Args:
        argv: the arguments after the program's name; None reads them from the process.
    """
    argv, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("grpo-fast: interrupted", file=sys.stderr)
        return 130
    # the boundary to the user: every error becomes one sentence
    except Exception as error:
        if debug:
            raise
        print(f"grpo-fast: error: {_sentence(error)} (--debug shows where)", file=sys.stderr)
        return 2


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Take a bare --debug out; `--debug VALUE` is a field of TrainingArguments and stays."""
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    rest = []
    for index, token in enumerate(argv):
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if token == "--debug" and (index == 0 or following.startswith("-")):
            debug = True
        else:
            rest.append(token)
    return rest, debug


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    known = isinstance(error, (ValueError, OSError))
    return text if known else f"{type(error).__name__}: {text}"


def _dispatch(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="grpo-fast",
        usage="grpo-fast [--version] [--debug] COMMAND [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"grpo_fast {__version__}")
    commands = {"train": _train, "ppo": _ppo, "reward-model": _reward_model}
    commands |= {"iterate": _iterate, "plan": _plan, "doctor": _doctor}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if not argv:
        parser.print_help()
        return 0
    parser.parse_known_args([token for token in argv if token in ("-h", "--help", "--version")])
    raise ValueError(f"unknown command {argv[0]!r}: expected {', '.join(commands)}.")


def _plan(argv: list[str]) -> int:
    from .plan import run

    return run(argv)


def _doctor(argv: list[str]) -> int:
    from .doctor import run

    return run(argv)


def _ppo(argv: list[str]) -> int:
    return _train(argv, "ppo")


def _reward_model(argv: list[str]) -> int:
    return _loop_verb("reward_model", argv)


def _iterate(argv: list[str]) -> int:
    return _loop_verb("iterate", argv)


def _loop_verb(name: str, argv: list[str]) -> int:
    try:
        from . import loop_verbs
    except ImportError as error:
        raise ValueError(
            f"this command needs a package that is not installed ({error.name}): "
            "pip install 'grpo_fast[trainer]'."
        ) from error
    return getattr(loop_verbs, name)(argv)


def _train(argv: list[str], verb: str = "train") -> int:
    check_names(argv, "PPOConfig" if verb == "ppo" else "GRPOConfig")
    try:
        from .options import parse
    except ImportError as error:
        raise ValueError(
            f"{verb} needs a package that is not installed ({error.name}): "
            "pip install 'grpo_fast[trainer]'."
        ) from error
    # `python -m` and scripts see the working directory, a console script does not
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parsed = parse(argv, verb)
    if parsed is None:
        return 0
    script, config = parsed
    if script.demo:
        from .demo import run

        stopped = run(config, verb)
    else:
        from .train import train

        stopped = train(script, config, verb)
    if stopped is None:
        return 0
    print(f"go on with: {_again(verb, argv)}", file=sys.stderr)
    return 128 + stopped


def _again(verb: str, argv: list[str]) -> str:
    """The command that resumes a run."""
    kept, skip = [], False
    for token in argv:
        name = token.split("=")[0].replace("_", "-")
        if name == "--resume-from-checkpoint":
            skip = "=" not in token
        elif not skip or token.startswith("--"):
            kept.append(token)
            skip = False
        else:
            skip = False
    return shlex.join(["grpo-fast", verb, *kept, "--resume-from-checkpoint", "true"])

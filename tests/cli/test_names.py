"""What the command line answers before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grpo_fast import __version__
from grpo_fast.cli.names import check_names, option_names
from grpo_fast.cli.options import TrainParser
from grpo_fast.cli.verbs import VERBS


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--help"], "commands:"),
        (["--version"], __version__),
        (["trian"], "unknown command 'trian': expected train, ppo, reward-model, iterate, plan"),
        (["train", "--lerning-rate", "1"], "unknown option --lerning-rate; did you mean --learn"),
        (["train", "--max_step=3"], "unknown option --max_step; did you mean --max-steps?"),
        (["ppo", "--cliprange-vale=3"], "did you mean --cliprange-value?"),
        (["train", "--cliprange-value=3"], "unknown option --cliprange-value; "),
        (["train", "--qqqqqqqq"], "unknown option --qqqqqqqq; --help-all lists the options."),
    ],
)
def test_help_and_typos_import_nothing_heavy(argv, sentence):
    """Under 0.5 s of CPU for help, under 1 s for a typo; 7 and 23 when torch came first."""
    code = (
        "import resource, sys\nfrom grpo_fast.cli import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(sorted(heavy), usage.ru_utime + usage.ru_stime)"
    )
    out = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    heavy, seconds = out.stdout.splitlines()[-1].rsplit(" ", 1)
    assert sentence in out.stdout + out.stderr and heavy == "[]"
    assert float(seconds) < (0.5 if argv[0].startswith("--") else 1.0)


@pytest.mark.parametrize("verb", VERBS)
def test_names_read_from_source_are_those_of_the_parser(verb):
    parser = TrainParser(verb)
    config = VERBS[verb].config.__name__
    assert option_names(config) == parser.names | {"config", "help", "help_all"}
    # every form that the parser takes passes
    forms = [name for name in parser._option_string_actions if name.startswith("--")]
    check_names(forms, config)

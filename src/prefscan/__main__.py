"""One command line: `prefscan COMMAND`, or `python -m prefscan COMMAND` in the environment that `make` has set up."""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from prefscan.common.errors import run


@dataclass(frozen=True)
class Command:
    """A module with `main`; one that takes options has `add_arguments` too. Imported when it is the one to run."""

    module: str
    summary: str
    argument: tuple[str, str] | None = None  # the name of the only one that it takes, and what it is


CELL = "key", "LOSS-BETA-STEPS, a cell of the grid, such as ipo-0.5-16"
MODEL = "key", "base, or LOSS-BETA-STEPS, a cell of the grid"

STAGES = {
    "check": Command("stages.check", "refuse wrong parameters before anything is computed"),
    "fetch": Command(
        "stages.fetch", "download a model or data, pinned by hash", ("what", "model, pairs, reward or questions")
    ),
    "reward": Command("stages.reward", "fit or load the known reward, and check it"),
    "sample": Command("stages.sample", "sample the base's replies, each with its reward", ("split", "train or eval")),
    "prepare": Command("stages.prepare", "render and tokenise the preference pairs, and split off the held-out ones"),
    "reference": Command("stages.reference", "the base's log-probabilities", ("split", "train or heldout")),
    "train": Command("stages.train", "tune a LoRA adapter: one loss, one β, so many steps", CELL),
    "merge": Command("stages.merge", "merge a cell's adapter into the base, and measure what the merge kept", CELL),
    "evaluate": Command("stages.evaluate", "measure the reward and the exact KL of what a cell writes", CELL),
    "answer": Command("stages.answer", "answer the MT-Bench questions", MODEL),
    "judge-check": Command("stages.judge_check", "measure whether the judge tells good answers from bad ones"),
    "mtbench": Command("stages.mtbench", "judge a model's MT-Bench answers", MODEL),
    "report": Command("stages.report", "write charts, tables, pages and metrics/summary.json"),
}
TOOLS = {
    "launch": Command("launch.schedule", "run what is stale of the sweep, several cells at a time, here or afar"),
    "plan": Command("launch.forecast", "print what a sweep would take, before it runs"),
    "partial-report": Command("launch.partial_report", "report the cells that have finished"),
    "serve": Command("endpoints.server", "serve the base and all cells by one vLLM"),
    "review": Command("review.pull_request", "print what a pull request shows its reviewer"),
    "compare": Command("review.compare", "compare sweeps that git holds, in one report"),
    "check-cache": Command("repo.cache", "remove damaged files from DVC's cache"),
    "docs": Command("docs.reference", "write the pages and files that are made from the code"),
}
COMMANDS = STAGES | TOOLS


def overview() -> str:
    def listed(commands: dict[str, Command]) -> str:
        return "\n".join(f"  {name:<16}{command.summary}" for name, command in commands.items())

    return (
        "usage: prefscan COMMAND [ARGUMENT…]\n\n"
        "Which preference-tuning loss, at which β and how many steps, makes the better chat model?\n\n"
        f"for you:\n{listed(TOOLS)}\n\nstages, which `dvc repro` and `prefscan launch` run:\n{listed(STAGES)}\n\n"
        "`prefscan COMMAND --help` says what a command does and takes."
    )


def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        sys.exit(f"prefscan: no command {name!r}; `prefscan --help` lists them")
    command = COMMANDS[name]
    module = import_module(f"prefscan.{command.module}")
    parser = argparse.ArgumentParser(
        prog=f"prefscan {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command.argument:
        argument, meaning = command.argument
        parser.add_argument(argument, help=meaning)
    elif hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    run(name, partial(module.main, **vars(parser.parse_args(words))))


if __name__ == "__main__":
    main()

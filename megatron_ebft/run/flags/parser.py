"""The command-line parser of training and of every tool, made from flag tables."""

import argparse
import difflib
import textwrap
from dataclasses import replace

from megatron_ebft.run.flags.flag import Flag, Group, dest, spelled
from megatron_ebft.run.flags.help_text import format_groups, spelling, text_width
from megatron_ebft.run.flags.refused import REFUSED
from megatron_ebft.run.flags.table import FLAGS, GROUPS

CONFIG = Flag("--config", str, "YAML file of training flags, such as `seq-length: 2048`; flags on the command line win",
              metavar="FILE")


class Parser(argparse.ArgumentParser):
    """Parses a program's own flags and the training flags it reads.

    A training flag that the program does not read is an error on the command line. In a --config file, which describes
    a run for several programs, it is ignored. Values come from, in rising precedence: the flag tables, `defaults`, the
    --config file, the command line. All training flags are in the result, so that everything that takes a run's
    arguments works.

    Args:
        own: groups of flags of this program alone.
        reads: attribute names of the training flags it reads. Empty: it takes no training flags and no --config.
        defaults: values of training flags by attribute name, instead of the tables'.
        first: a group that help shows before all others.
        shows_training: whether help lists the training flags.

    Every error is a ValueError of one line.
    """

    def __init__(self, prog: str, description: str, own: tuple[Group, ...] = (), reads: frozenset[str] = frozenset(),
                 defaults: dict | None = None, first: Group | None = None, shows_training: bool = True,
                 add_help: bool = True):
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=add_help,
                         argument_default=argparse.SUPPRESS)  # only what was given: it wins over --config
        self.own, self.reads, self.defaults = own, reads, defaults or {}
        self.first, self.shows_training = first, shows_training
        for flag in self._flags().values():
            self._add_flag(flag)
        if reads:
            self._add_flag(CONFIG)
            for name in REFUSED:
                self.add_argument(name, nargs="?", const="on")

    def _flags(self) -> dict[str, Flag]:
        """Every flag this program parses, by attribute name, with its own defaults."""
        flags = {flag.dest: flag for group in self.own for flag in group.flags}
        for name, flag in FLAGS.items() if self.reads else ():
            is_required = flag.required and name in self.reads and name not in self.defaults
            flags.setdefault(name, replace(flag, default=self.defaults.get(name, flag.default), required=is_required))
        return flags

    def _add_flag(self, flag: Flag) -> None:
        if flag.type is bool:
            self.add_argument(flag.name, action=argparse.BooleanOptionalAction)
        else:
            self.add_argument(flag.name, type=flag.type, choices=flag.choices or None, nargs="+" if flag.many else None)

    def error(self, message: str):
        command = "" if self.shows_training else "python -m megatron_ebft.train "
        raise ValueError(f"{message}; {command}--help lists all flags")

    def parse_args(self, argv: list[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """All values. The ranges of the program's own flags are checked; `check_args` checks the training flags.

        Raises:
            ValueError: naming the flag that is unknown, not read, missing or has a wrong value.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}")
        values, own = vars(given), {flag.dest for group in self.own for flag in group.flags}
        unread = [flag.name for name, flag in FLAGS.items() if name in values and name not in self.reads | own]
        if unread:
            what = "these training flags" if len(unread) > 1 else "this training flag"
            self.error(f"{', '.join(unread)}: {self.prog.split()[-1]} does not read {what}. On the command line, leave "
                       "out what it does not read; a --config file may have it")
        return self._complete(self._from_file(values) | values)

    def parse_own(self, argv: list[str]) -> argparse.Namespace:
        """The program's own flags, whatever else is on the command line."""
        alone = Parser(self.prog, self.description, self.own, add_help=False)
        return alone._complete(vars(alone.parse_known_args(argv)[0]))

    def _from_file(self, given: dict) -> dict:
        """What a --config file says, if one was given, of the flags that this program reads."""
        path = given.pop("config", None)
        if path is None:
            return {}
        from megatron_ebft.run.flags.config_file import read_config  # imports PyYAML, which only this needs

        return {name: value for name, value in read_config(path).items() if name in self.reads or name not in FLAGS}

    def _complete(self, values: dict) -> argparse.Namespace:
        flags = self._flags()
        defaults = {name: list(flag.default) if flag.many and flag.default else flag.default
                    for name, flag in flags.items()}
        values = defaults | {dest(name): None for name in REFUSED if self.reads} | values
        missing = [flag.name for name, flag in flags.items() if flag.required and values[name] is None]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        for group in self.own:
            for flag in group.flags:
                flag.check(values[flag.dest])
        return argparse.Namespace(**values)

    def _nearest(self, unknown: list[str]) -> str:
        """A hint at the flag that an unknown one may stand for."""
        names = [flag.name for flag in self._flags().values()]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        return f" (did you mean {near[0]}?)" if near else ""

    def format_usage(self) -> str:
        required = [spelling(flag) for flag in self._flags().values() if flag.required]
        return f"usage: {' '.join([self.prog, *required])} [flags]\n"

    def format_help(self) -> str:
        """Usage, description, then flags by group: the program's own, and the training flags it reads."""
        flags, own = self._flags(), {flag.dest for group in self.own for flag in group.flags}
        shown = self.reads - own if self.shows_training else set()
        groups = [Group(group.title, tuple(flags[name] for name in group.dests if name in shown)) for group in GROUPS]
        groups = [*self.own, *(group for group in groups if group.flags)]
        parts = [self.format_usage(), self.description]
        if self.first:
            titles = "; ".join(group.title for group in groups)
            parts += [format_groups([Group(self.first.title, (CONFIG, *self.first.flags))]), textwrap.fill(
                f"All flags follow by group: {titles}. Read on with `--help | less`. In brackets: the default and the "
                "range. --no-x turns a switch --x off.", text_width())]
        elif self.reads:
            groups.append(Group("flags from a file", (CONFIG,)))
        return "\n\n".join(part.strip() for part in [*parts, format_groups(groups)]) + "\n"


def as_argv(values: dict) -> list[str]:
    """A command line that sets attributes to these values."""
    words = []
    for name, value in values.items():
        flag = spelled(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words

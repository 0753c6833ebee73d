"""The text of --help: flags by group, each with its default and range."""

import shutil
import textwrap

from megatron_ebft.run.flags.flag import Flag, Group

COLUMN = 30
"""Where descriptions begin."""
METAVARS = {int: "N", float: "X", str: "TEXT"}


def format_flag(flag: Flag, width: int) -> list[str]:
    """Lines for one flag: its spelling, then its description, default and range."""
    notes = [note for note in (_default(flag), flag.valid.text if flag.valid else "") if note]
    text = flag.help + (f" [{'; '.join(notes)}]" if notes else "")
    lines = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False)
    head = f"  {spelling(flag)}"
    first = [head] if len(head) > COLUMN - 2 else [f"{head:{COLUMN}}{lines.pop(0)}"]
    return first + [" " * COLUMN + line for line in lines]


def spelling(flag: Flag) -> str:
    """The flag and its value, as help shows them: --seq-length N."""
    if flag.type is bool:
        return f"--[no-]{flag.name[2:]}"
    value = f"{{{','.join(flag.choices)}}}" if flag.choices else flag.metavar or METAVARS[flag.type]
    return f"{flag.name} {value}" + (f" [{value} ...]" if flag.many else "")


def _default(flag: Flag) -> str:
    if flag.required:
        return "required"
    if flag.default is None:
        return flag.default_text and f"default: {flag.default_text}"
    if flag.type is bool:
        return f"default: {'on' if flag.default else 'off'}"
    return f"default: {' '.join(map(str, flag.default)) if flag.many else flag.default}"


def text_width() -> int:
    """Columns of the terminal, within reason."""
    return min(120, max(80, shutil.get_terminal_size().columns))


def format_groups(groups: list[Group]) -> str:
    """All groups with their titles."""
    width = text_width()
    blocks = ["\n".join([group.title.upper() if group.title.islower() else group.title,
                         *(line for flag in group.flags for line in format_flag(flag, width))]) for group in groups]
    return "\n\n".join(blocks)

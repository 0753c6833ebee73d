"""Training flags from a YAML file (--config).

A key is a flag's name without the dashes at its beginning (seq-length or seq_length). A switch takes true or false, a
flag of several values a list. Words are read as YAML 1.2 reads them: `off` is text, 1e-6 is a number.
"""

import difflib
import math
import re

import yaml

from megatron_ebft.run.flags.flag import Flag, dest
from megatron_ebft.run.flags.refused import REFUSED
from megatron_ebft.run.flags.table import FLAGS

WANTED = {int: "an integer", float: "a number", str: "text"}


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2 instead of 1.1, whose `off` is false and whose 1e-6 is text."""

    yaml_implicit_resolvers = {}


for _kind, _pattern in (("null", r"~|null|Null|NULL|"), ("bool", r"true|True|TRUE|false|False|FALSE"),
                        ("int", r"[-+]?[0-9]+"),
                        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    try:
        return int(loader.construct_scalar(node))  # 010 is ten
    except ValueError as error:  # thousands of digits
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def read_config(path: str) -> dict:
    """Values by attribute name, each of its flag's type, choices and range.

    Raises:
        ValueError: naming the file, the line, the key and, for an unknown key, the nearest flag.
    """
    values, lines = {}, {}
    for key, value, line in _entries(path):
        where, name = f"--config {path}, line {line}", str(key).replace("-", "_")
        if name in lines:
            raise ValueError(f"{where}: {key} is on line {lines[name]} already")
        lines[name] = line
        try:
            values[name] = flag_value(name, value)
        except LookupError:
            names = [*FLAGS, *map(dest, REFUSED)]
            near = difflib.get_close_matches(name, names, 1, cutoff=0)[0].replace("_", "-")
            raise ValueError(f"{where}: there is no flag {key}; the nearest is {near}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {error}") from None
    return values


def _entries(path: str) -> list[tuple]:
    """(key, value, line number) of the mapping in a YAML file."""
    try:
        with open(path, "rb") as file:
            loader = _Loader(file.read())
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"--config {path}: must be a mapping, a line `flag: value` for each flag")
        return [(loader.construct_object(key, deep=True), loader.construct_object(value, deep=True),
                 key.start_mark.line + 1) for key, value in node.value]
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error


def flag_value(name: str, value):
    """The value of a flag, from one that YAML or JSON has read.

    Raises:
        LookupError: there is no such flag.
        ValueError: the value has another type, or is not in the flag's range.
    """
    if name in map(dest, REFUSED):
        return None if value in (None, False) else "on" if value is True else str(value)
    flag = FLAGS[name]
    if value is None and flag.default is None:
        return None
    if flag.many:
        if value == []:
            raise ValueError("must have at least one value")
        value = [_scalar(flag, x) for x in (value if isinstance(value, list) else [value])]
    else:
        value = _scalar(flag, value)
    wrong = flag.out_of_range(value)
    if wrong is not None:
        raise ValueError(f"must be {wrong[1]}, not {wrong[0]}")
    return value


def _scalar(flag: Flag, value):
    if flag.type is bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    kinds = {int: (int,), float: (int, float), str: (int, float, str)}[flag.type]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"must be {WANTED[flag.type]}, not {value!r}")
    if flag.choices and value not in flag.choices:
        raise ValueError(f"must be one of {', '.join(flag.choices)}, not {value!r}")
    try:
        return flag.type(value)
    except OverflowError:  # an integer beyond every float
        return math.inf

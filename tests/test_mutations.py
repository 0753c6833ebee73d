"""The table of mutations fits the code."""

import runpy
from pathlib import Path


def test_every_mutation_has_its_place():
    table = runpy.run_path(str(Path(__file__).with_name("mutation_table.py")))["TABLE"]
    package = Path(__file__).parents[1] / "megatron_ebft"
    wrong = [mutation.name for mutation in table if (package / mutation.file).read_text().count(mutation.text) != 1]
    assert not wrong and len({mutation.name for mutation in table}) == len(table)

"""The table of data forms is complete: against the setting, the documentation and the built-in data."""

import re
import typing
from pathlib import Path

import pytest

from dsv2_jax.config import Data
from dsv2_jax.data import instructions
from dsv2_jax.data.forms import FORMS

DATA = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_setting_table_and_documentation_have_the_same_forms():
    assert typing.get_args(typing.get_type_hints(Data)["form"]) == tuple(FORMS)
    rows = re.search(r"\| `--data.form` \|.*?\n\n", DATA, re.DOTALL)
    assert rows and re.findall(r"^\| `(\w+)` \|", rows[0], re.MULTILINE) == list(FORMS)


def test_a_form_without_built_in_data_needs_a_source():
    with pytest.raises(ValueError, match="no built-in pages"):
        instructions.chosen((), "pages")

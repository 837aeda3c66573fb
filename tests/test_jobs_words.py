"""Texts on one line and Markdown tables; durations are in test_jobs_status."""

from __future__ import annotations

import pytest

from overtone.jobs.words import markdown_table, one_line


def test_a_text_on_one_line_loses_only_white_space_and_what_is_over_the_limit():
    assert one_line(" a\n\tb  c ") == "a b c"
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line("word " * 1000, limit=500) == ("word " * 100)
    assert one_line("") == ""


def test_a_markdown_table():
    table = markdown_table(["setting", "saving"], [("fullres", "1.00x"), ["one level", "`2|3`"]])
    assert table == "| setting | saving |\n|---|---|\n| fullres | 1.00x |\n| one level | `2|3` |"


def test_a_table_of_nothing_has_its_header_and_empty_cells_take_one_space():
    assert markdown_table(["", ""], []) == "| | |\n|---|---|"
    assert markdown_table(["a", "b"], [("", "x")]) == "| a | b |\n|---|---|\n| | x |"


def test_a_row_must_fit_the_header():
    with pytest.raises(ValueError, match="1 cells below 2"):
        markdown_table(["a", "b"], [("x",)])

"""Tests the generated tables in pages against their files, and that filling a page changes nothing else."""

import os

import pytest

from configurator import ConfigError
from conftest import ROOT
from lab import pages


def test_tables_in_pages_equal_their_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    every = {path: pages.fill_tables(path) for path in pages.pages()}
    differ = [path for path, (old, new) in every.items() if old != new]
    assert not differ, f"run python -m lab.pages: {differ}"
    assert sum(old.count(pages.BEGIN) for old, _ in every.values()) >= 8


def test_a_table_is_filled_and_nothing_else_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "fit").mkdir(parents=True)
    (tmp_path / "results" / "fit" / "a.md").write_text("| a |\n|---|\n| 1 |\n")
    page = "# Title\n\n<!-- table: fit/a.md -->\n{}<!-- end -->\n\ntext\n\n<!-- table: fit/a.md -->\n<!-- end -->"
    (tmp_path / "results" / "page.md").write_text(page.format("old\n"))
    pages.main(["results/page.md"])
    table = "\n| a |\n|---|\n| 1 |\n\n"
    want = page.format(table).replace("fit/a.md -->\n<!-- end", f"fit/a.md -->\n{table}<!-- end")
    assert (tmp_path / "results" / "page.md").read_text() == want
    assert capsys.readouterr().out == "filled: results/page.md\n"
    pages.main(["results/page.md"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- table: none.md -->\n<!-- end -->", "none.md cannot be read"),
        ("<!-- table: page.md -->\n", 'has no "<!-- end -->"'),
        (None, "does not exist: give pages"),
    ],
)
def test_mistakes_are_one_line(tmp_path, page, message):
    path = os.path.join(tmp_path, "page.md")
    if page:
        with open(path, "w") as file:
            file.write(page)
    with pytest.raises(ConfigError, match=message):
        pages.main([path])

"""Put generated tables into hand-written pages, so that a page cannot differ from the table made from its logs.

    python -m lab.pages                        # README.md, and all pages in results/ and docs/
    python -m lab.pages results/scaling.md

A table stands between two comments, the first of which names its file, relative to the page:

    <!-- table: scaling/gpt_theta_fit/multipliers.md -->
    <!-- end -->
"""

import glob
import os
import re

from configurator import ConfigError, as_script

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
BEGIN = "<!-- table:"


def pages():
    """Paths of the pages that may hold tables."""
    return [
        "README.md",
        *sorted(glob.glob("docs/**/*.md", recursive=True) + glob.glob("results/**/*.md", recursive=True)),
    ]


def fill_tables(path):
    """-> text of the page as it is, and with its tables read anew from their files; ConfigError where one is missing."""
    with open(path) as file:
        text = file.read()
    if text.count(BEGIN) != len(BLOCK.findall(text)):
        raise ConfigError(f'{path}: a "{BEGIN} FILE -->" has no "<!-- end -->" on a line after it: add one')

    def fill(match):
        begin, name, _, end = match.groups()
        table = os.path.join(os.path.dirname(path), name)
        try:
            with open(table) as file:
                return f"{begin}\n{file.read().strip()}\n\n{end}"
        except OSError as error:
            raise ConfigError(
                f"{path}: {table} cannot be read ({error.strerror}): make it, or correct its name"
            ) from None

    return text, BLOCK.sub(fill, text)


def main(argv):
    if "--help" in argv:
        print(__doc__)
        return
    for path in argv or pages():
        if not os.path.isfile(path):
            raise ConfigError(f"{path} does not exist: give pages, such as results/scaling.md, or none for all")
        old, new = fill_tables(path)
        if old != new:
            with open(path, "w") as file:
                file.write(new)
            print(f"filled: {path}")


if __name__ == "__main__":
    as_script(main)

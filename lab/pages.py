"""Tables that are generated, in pages that are written: a page cannot say other figures than the table beside its logs.

    python -m lab.pages                        # README.md, and all pages in results/ and docs/
    python -m lab.pages results/scaling.md

A page has a table between two comments of which the first names its file, relative to the page:

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
    """Paths of the pages that may have tables."""
    return [
        "README.md",
        *sorted(glob.glob("docs/**/*.md", recursive=True) + glob.glob("results/**/*.md", recursive=True)),
    ]


def filled(path):
    """-> the page as it is, and with its tables as they are in their files."""
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
            raise ConfigError(f"{path}: {table} cannot be read ({error.strerror}): make it, or mend its name") from None

    return text, BLOCK.sub(fill, text)


def main(argv):
    for path in argv or pages():
        if not os.path.isfile(path):
            raise ConfigError(f"{path} is no page: give files, such as results/scaling.md, or none for all")
        old, new = filled(path)
        if old != new:
            with open(path, "w") as file:
                file.write(new)
            print(f"filled: {path}")


if __name__ == "__main__":
    as_script(main)

"""Draws results files: python bench/plot.py bench/results/<gpu>-gna.json writes the PNG beside it."""

from pathlib import Path

from nearfield._files import write_atomically
from nearfield.bench import groups, report
from timing import run


def main(results: list[Path]) -> None:
    titles = {name: group.title for name, group in groups().items()}
    for path in results:
        data = report.load(path)
        write_atomically(path.with_suffix(".png"), report.plot(data, titles.get(data["group"], "")))


if __name__ == "__main__":
    run(main)

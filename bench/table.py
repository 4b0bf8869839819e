"""Prints results files as Markdown, or puts them where a document has room for them.

python bench/table.py bench/results/<gpu>-gna.json [--into README.md]

Room is a pair of comments, <!-- bench: gna --> and <!-- /bench -->; what stands between them is replaced.
"""

from pathlib import Path

from nearfield._files import write_atomically
from nearfield.bench import report
from timing import run


def main(results: list[Path], into: Path | None = None) -> None:
    for path in results:
        data = report.load(path)
        if into is None:
            print(report.markdown(data))
        else:
            write_atomically(into, report.insert(into.read_text(), data["group"], report.markdown(data)))


if __name__ == "__main__":
    run(main)

"""Neighborhood attention beside dense cuDNN attention of the same shape: cases and checks are nearfield.bench.gna.

python bench/bench_gna.py [--backward] [--only TEXT] [--store]
"""

import typer
from timing import run_script


def main(
    backward: bool = False, only: str = "", dense: bool = True, store: bool = False, commit: str = ""
) -> None:
    run_script("gna", backward=backward, only=only, peers=dense, store=store, commit=commit)


if __name__ == "__main__":
    typer.run(main)

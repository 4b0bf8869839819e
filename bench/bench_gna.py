"""Neighborhood attention beside dense attention of the same shape, and NATTEN: the cases of nearfield.bench.gna.

python bench/bench_gna.py [--backward] [--only TEXT] [--store] [--commit NAME] [--no-peers]
"""

from timing import script

if __name__ == "__main__":
    script("gna")

"""The delta rule beside flash-linear-attention: the cases of nearfield.bench.delta.

python bench/bench_delta.py [--backward] [--only TEXT] [--store] [--commit NAME] [--no-peers]
"""

from timing import script

if __name__ == "__main__":
    script("delta")

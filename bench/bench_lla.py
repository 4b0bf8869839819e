"""Local linear attention and its readout beside softmax attention of the same shape: the cases of nearfield.bench.lla.

python bench/bench_lla.py [--backward] [--only TEXT] [--store] [--commit NAME] [--no-peers]
"""

from timing import script

if __name__ == "__main__":
    script("lla")

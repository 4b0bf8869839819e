"""Decoding beside a copy of as many bytes, softmax attention and flash-linear-attention: the cases of nearfield.bench.decode.

python bench/bench_decode.py [--backward] [--only TEXT] [--store] [--commit NAME] [--no-peers]
"""

from timing import script

if __name__ == "__main__":
    script("decode")

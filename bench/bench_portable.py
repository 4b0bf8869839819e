"""The portable kernels beside flash-linear-attention, FlashAttention-2 and torch.compile: the cases of nearfield.bench.portable.

python bench/bench_portable.py [--backward] [--only TEXT] [--store] [--commit NAME] [--no-peers]
"""

from timing import script

if __name__ == "__main__":
    script("portable")

"""Planning on the host: which tiles attention over neighborhoods visits and what that costs, and how the delta rule
divides its work."""

from collections.abc import Sequence
from typing import Literal

Placement = Literal["grid", "span"]
Direction = Literal["forward", "backward"]
Shapes = Literal["powers_of_two", "exact", "fitting"]

class TilePlan:
    """What a choice of tiles costs for a whole problem.

    ``visited``, ``full`` and ``partial`` count pairs of a query and a key tile.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def pairs(self) -> int:
        """(query, key) pairs that attention needs."""
    @property
    def q_tiles(self) -> int: ...
    @property
    def kv_tiles(self) -> int: ...
    @property
    def visited(self) -> int: ...
    @property
    def full(self) -> int:
        """Visited pairs that need no mask."""
    @property
    def partial(self) -> int: ...
    @property
    def dense_tiles(self) -> int: ...
    @property
    def mask_free(self) -> bool:
        """No visited pair needs a mask."""
    @property
    def flop_bound(self) -> float:
        """Largest speedup over dense attention that the arithmetic allows."""
    @property
    def tile_bound(self) -> float:
        """Largest speedup over dense attention with whole tiles."""
    @property
    def full_share(self) -> float: ...
    @property
    def utilization(self) -> float:
        """Needed over computed (query, key) pairs."""
    @property
    def q_padding(self) -> float:
        """Rows of the query tiles that hold no token, as a share of the tokens."""
    @property
    def kv_padding(self) -> float: ...
    def cost(self, partial_cost: float = 1.1) -> float:
        """Predicted time in units of one full tile: full + partial_cost * partial."""

def kernel_blocks(head_dim: int, *, direction: Direction = "forward") -> list[tuple[int, int, float]]:
    """(queries, keys, cost of a visit) of the tiles among which the Hopper kernels of neighborhood attention choose; the
    first one alone with dilation."""

def key_range(
    index: int, length: int, window: int, *, stride: int = 1, is_causal: bool = False
) -> tuple[int, int]: ...
def query_range(
    index: int, length: int, window: int, *, stride: int = 1, is_causal: bool = False
) -> tuple[int, int]: ...
def key_tiles(
    first: int,
    last: int,
    tile: int,
    length: int,
    window: int,
    *,
    stride: int = 1,
    is_causal: bool = False,
    placement: Placement = "span",
) -> tuple[int, int, int, int]: ...
def query_tiles(
    first: int,
    last: int,
    tile: int,
    length: int,
    window: int,
    *,
    stride: int = 1,
    is_causal: bool = False,
    placement: Placement = "span",
) -> tuple[int, int, int, int]: ...
def delta_plan(
    *,
    sequences: int,
    tokens: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    sms: int,
    clusters: int,
    heads: int = 0,
    packed: bool = False,
    channel_gate: bool = False,
    keep: bool = False,
    states_on_the_way: bool = False,
) -> tuple[int, bool, int, list[list[tuple[int, int, int, int, int]]], int]:
    """(span_chunks, prepare_P, preparing_sms, clusters, rest) of the delta rule's forward on Hopper.

    Chunks of a span or 0; whether P is prepared; the SMs that prepare beside the walk or the clusters, or 0; for
    each cluster the parts of heads as (row, begin, end, from, to), else none; how many heads, the last ones, are
    not for clusters but walked beside them. ``key_dim`` is the padded one; ``heads`` are those of queries and
    keys, by default as many as of values.
    """

def plan_tiles(
    grid: Sequence[int],
    window: int | Sequence[int],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    placement: Placement = "span",
    direction: Direction = "forward",
) -> TilePlan: ...
def best_tiles(
    grid: Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    block_m: int = 128,
    block_n: int = 128,
    placement: Placement = "span",
    direction: Direction = "forward",
    partial_cost: float = 1.1,
    shapes: Shapes = "powers_of_two",
) -> tuple[tuple[int, ...], tuple[int, ...], TilePlan]: ...

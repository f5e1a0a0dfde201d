"""The `allgather` scheme: every visible K/V row at once, some heads at a time, so that memory stays bounded.

As Llama-3's context parallelism (2407.21783, section 3.3.2), but only visible rows move.
"""

from __future__ import annotations

from zoo import HeadShape
from zoo.plugins.context.fetch import FetchScheme


class Allgather(FetchScheme):
    """As many groups of heads as ranks, if there are that many heads.

    A rank then holds about two shares of K/V beside its own at any degree up to the number of key/value heads.
    """

    name = "allgather"

    def num_groups(self, heads: HeadShape, degree: int) -> int:
        return min(degree, heads.num_kv_heads)

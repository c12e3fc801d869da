"""Bytes that the ranks send and receive in each bucket, and how long the communication takes beside the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_namo.sharding.assignment import Assignment, Matrix


@dataclass(frozen=True)
class BucketTraffic:
    """Bytes of the two all-to-alls of one bucket, and FLOPs in between, by rank."""

    shards_sent: list[int]
    shards_received: list[int]
    results_sent: list[int]
    results_received: list[int]
    flops: list[int]

    @classmethod
    def of(cls, assignment: Assignment, bucket: Sequence[int], whole: Sequence[Matrix], ranks: int) -> BucketTraffic:
        """From who owns, sends and receives what."""
        traffic = cls(*([0] * ranks for _ in range(5)))
        for index in bucket:
            owner, itemsize = assignment.owners[index], whole[index].count * whole[index].dtype.itemsize
            traffic.flops[owner] += whole[index].cost
            for region, sender in assignment.senders[index].items():
                if sender != owner:
                    size = region.numel * itemsize
                    traffic.shards_sent[sender] += size
                    traffic.shards_received[owner] += size
            for rank, of_rank in enumerate(assignment.regions):
                if rank != owner:
                    size = of_rank[index].numel * itemsize
                    traffic.results_sent[owner] += size
                    traffic.results_received[rank] += size
        return traffic

    def shard_seconds(self, link_gbytes: float) -> float:
        """Of the all-to-all that assembles matrices, at so many GB/s in each direction of a rank."""
        return max(*self.shards_sent, *self.shards_received) / link_gbytes / 1e9

    def result_seconds(self, link_gbytes: float) -> float:
        """Of the all-to-all that returns results."""
        return max(*self.results_sent, *self.results_received) / link_gbytes / 1e9


def sent_and_received(traffic: Sequence[BucketTraffic]) -> tuple[list[list[int]], list[list[int]]]:
    """For each all-to-all of a step the bytes that each rank sends, and those that it receives."""
    sent = [one for bucket in traffic for one in (bucket.shards_sent, bucket.results_sent)]
    return sent, [one for bucket in traffic for one in (bucket.shards_received, bucket.results_received)]


def overlapped(sending_shards: Sequence[float], working: Sequence[float], returning_results: Sequence[float]) -> float:
    """Seconds of the buckets' work and communication in the order of `Exchange.map`.

    Communications run one after another, beside the work; each starts when the work issued before it is done.
    """
    clock, link = 0.0, sending_shards[0]  # where the work is, when the link is free
    arrived, returned = [link], []
    for k, seconds in enumerate(working):
        if k + 1 < len(sending_shards):
            link = max(link, clock) + sending_shards[k + 1]
            arrived.append(link)
        clock = max(clock, arrived[k]) + seconds
        link = max(link, clock) + returning_results[k]
        returned.append(link)
        if k:
            clock = max(clock, returned[k - 1])
    return max(clock, returned[-1])

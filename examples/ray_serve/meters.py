"""What a replica counts, as metrics of Ray: Prometheus scrapes them from each machine, labelled with the replica."""

from ray.serve import metrics

from splice import StoreStats

# Buckets, in seconds.
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]

# Of the store: numbers that only grow.
_COUNTED = {
    "hits": "How often an adapter was on the model when it was asked for.",
    "host_hits": "How often it was in host memory.",
    "misses": "How often it had to be read from its file.",
    "evictions": "How many adapters were taken off the model for others.",
    "host_evictions": "How many were dropped from host memory for others.",
    "loads": "How many were put on the model.",
}
# Numbers as they are now.
_NOW = {
    "registered": "How many adapters are registered.",
    "on_device": "How many of them are on the model.",
    "device_bytes": "Bytes that these take, those in slots left out.",
    "in_host": "How many are kept in host memory.",
    "load_p50": "Seconds that half of the last loads took at most.",
    "load_p99": "Seconds that 99 % of the last loads took at most.",
}

_UNITS = {"load_p50": "_seconds", "load_p99": "_seconds"}


class Meters:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self._counters = {name: metrics.Counter(f"splice_store_{name}", about) for name, about in _COUNTED.items()}
        self._gauges = {
            name: metrics.Gauge(f"splice_store_{name}{_UNITS.get(name, '')}", about) for name, about in _NOW.items()
        }
        self._requests = metrics.Counter(
            "splice_requests", "Requests, by how they ended: stop, length, left, refused, failed.", tag_keys=("end",)
        )
        self._generating = metrics.Gauge("splice_generating", "Answers that are being made.")
        self._prompt_tokens = metrics.Counter("splice_prompt_tokens", "Tokens of prompts.")
        self._answer_tokens = metrics.Counter("splice_answer_tokens", "Tokens that were made.")
        self._first = metrics.Histogram(
            "splice_first_text_seconds",
            "From a request's coming to the replica to its first text.",
            boundaries=_SECONDS,
        )
        # What has been counted of the store.
        self._told = dict.fromkeys(_COUNTED, 0)

    def tell_now(self, stats: StoreStats, generating: int) -> None:
        """Note what the store has done, and how many answers are being made. Ray forgets gauges that are not told again."""
        self._generating.set(generating)
        found = stats._asdict()
        for name, counter in self._counters.items():
            if found[name] > self._told[name]:
                counter.inc(found[name] - self._told[name])
                self._told[name] = found[name]
        for name, gauge in self._gauges.items():
            if found[name] == found[name]:  # there are no times before the first load
                gauge.set(found[name])

    def tell_first(self, seconds: float) -> None:
        """Note how long a request waited for its first text."""
        self._first.observe(seconds)

    def tell_end(self, end: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Note how a request ended, and how many tokens it had."""
        self._requests.inc(tags={"end": end})
        for counter, tokens in ((self._prompt_tokens, prompt_tokens), (self._answer_tokens, answer_tokens)):
            if tokens:
                counter.inc(tokens)

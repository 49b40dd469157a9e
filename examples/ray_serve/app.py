"""The application that Ray Serve runs: `serve run examples.ray_serve.app:build base=... adapters=...`."""

from ray import serve
from ray.serve import Application

from splice.cli.running.text_base import open_tokenizer
from splice.cli.settings import Wanted
from splice.fleet.registering import places_of

from .endpoint import Endpoint
from .options import Options
from .replica import Replica


def build(options: Options) -> Application:
    """An endpoint before so many replicas.

    Raises:
        ValueError: there is no such base, no tokenizer, or no adapter; or an adapter has the base's own name.
    """
    _check(options)

    class Multiplexed(Replica):
        # Ray knows a replica for as many adapters as its store may have on the model. Said here, and not where `bring` is,
        # since it is an option of what is served.
        bring = serve.multiplexed(Replica.bring, max_num_models_per_replica=options.adapters_per_replica)

    replicas = serve.deployment(
        name="Replica",
        num_replicas=options.replicas,
        max_ongoing_requests=options.requests_per_replica,
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
    )(Multiplexed)
    return Endpoint.bind(replicas.bind(options), options.base_name)


def _check(options: Options) -> None:
    """Look at what costs little to look at. A replica would find it too, but Ray starts one that fails again and again."""
    open_tokenizer(Wanted(options.base))
    if options.base_name in places_of(options.adapters):
        raise ValueError(f"an adapter has the base's own name, {options.base_name!r}: choose another `base_name`")

"""Serves a base and its adapters on this machine alone: `python -m examples.ray_serve --base ... --adapters ...`."""

import argparse
import os
import signal
import sys
import threading

# Before Ray is imported: nobody is told that it is used.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve

from .app import build
from .options import Options

# Bytes of the memory in which Ray's processes share objects. Requests and answers are far smaller.
_SHARED = 100 * 2**20


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m examples.ray_serve", description=__doc__)
    parser.add_argument("--base", required=True, help="folder of the base model, or its id on the Hub")
    parser.add_argument("--adapters", required=True, help="folder below which the adapters are")
    parser.add_argument("--base-name", default="", help="what the base is called in requests; else by its folder or id")
    parser.add_argument("--replicas", type=int, default=2, help="processes that hold the base (2)")
    parser.add_argument("--adapters-per-replica", type=int, default=32, help="on the model of each at once (32)")
    parser.add_argument("--requests-per-replica", type=int, default=8, help="answered by each at once (8)")
    parser.add_argument("--slot-rank", type=int, help="reserve slots of this rank")
    parser.add_argument("--device", help="cpu or cuda; a GPU if the replica has one, if not given")
    parser.add_argument("--dtype", help="of the base; that of its files, if not given")
    parser.add_argument("--gpus-per-replica", type=float, default=0.0, help="GPUs that Ray sets aside for each (0)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="of OpenAI's protocol (8000)")
    parser.add_argument("--metrics-port", type=int, default=8080, help="of the metrics for Prometheus (8080)")
    given = vars(parser.parse_args())
    host, port, metrics_port = given.pop("host"), given.pop("port"), given.pop("metrics_port")
    try:
        options = Options(**given)
        application = build(options)
    except ValueError as error:
        sys.exit(f"error: {error}")

    ended = threading.Event()
    ray.init(
        address="local",
        # What Ray is told that there is: one for each replica, and one for the endpoint.
        num_cpus=options.replicas + 1,
        object_store_memory=_SHARED,
        include_dashboard=False,
        _metrics_export_port=metrics_port,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application)
        print(f"serving {options.base_name} and its adapters at http://{host}:{port}/v1", flush=True)
        print(f"metrics for Prometheus at http://{host}:{metrics_port}/metrics", flush=True)
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()

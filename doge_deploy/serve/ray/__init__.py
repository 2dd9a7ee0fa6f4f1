"""The server on several machines, by Ray Serve: `serve run doge_deploy.serve.ray:app bundles=DIRECTORY`.

A request comes to Ray's proxy, from there to a front, and from the front to a replica. Each replica holds the engines,
schedulers and the HTTP application of one server; the front passes requests on to whichever replica has room, and knows
what to do when one is lost. Ray starts, watches, scales and ends both.
"""

from doge_deploy.serve.ray.application import app

__all__ = ["app"]

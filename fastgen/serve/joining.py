"""Joining a Ray cluster, for the server and for evaluations."""

from __future__ import annotations

from fastgen.errors import FastgenError

__all__ = ["join_cluster"]


def join_cluster(address: str | None) -> None:
    """Join the cluster at `address`; None starts one on this machine.

    Raises:
        FastgenError: there is no such cluster.
    """
    import ray

    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    except ConnectionError as error:
        raise FastgenError(f"--ray-address: no cluster at {address}") from error

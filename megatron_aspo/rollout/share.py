"""A deterministic assignment of requests to engines."""


def share(n_requests: int, n_engines: int, group_size: int) -> list[int]:
    """Return the engine of each request: groups of `group_size` consecutive requests, one prompt each, are assigned round-robin.

    A group stays on one engine, whose prefix cache then computes its prompt once. A pure function.
    Raises ValueError for sizes below one or requests that do not fill their last group.
    """
    if n_engines < 1 or group_size < 1 or n_requests < 0:
        raise ValueError(f"cannot share {n_requests} requests in groups of {group_size} among {n_engines} engines")
    if n_requests % group_size:
        raise ValueError(f"{n_requests} requests do not divide into groups of {group_size}")
    return [position // group_size % n_engines for position in range(n_requests)]

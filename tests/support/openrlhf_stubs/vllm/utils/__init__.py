"""See vllm."""


def random_uuid():
    """Never called."""
    raise NotImplementedError

"""What a sampler raises when it cannot sample."""


class SamplerFailed(RuntimeError):
    """No completions came: a server that is gone or stalled, or an engine that gave up. A trainer
    saves what it has before it lets this end the run."""

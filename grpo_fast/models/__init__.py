"""A Hugging Face model as policy: its head, its packed forward, the reference beside it."""

from .head import Head, check_head, evaluating, find_head, innermost
from .loading import load_policy, load_processing
from .policy import attach, detach, is_attached
from .reference import ReferencePolicy

__all__ = [
    "Head",
    "ReferencePolicy",
    "attach",
    "check_head",
    "detach",
    "evaluating",
    "find_head",
    "innermost",
    "is_attached",
    "load_policy",
    "load_processing",
]

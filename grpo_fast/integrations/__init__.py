"""Adapters: the losses under the names of other libraries."""

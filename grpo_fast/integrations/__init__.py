"""The losses inside other people's trainers: names are translated here, nothing is computed.

Each module needs the package it is for and is imported by name, e.g. `grpo_fast.integrations.trl`.
"""

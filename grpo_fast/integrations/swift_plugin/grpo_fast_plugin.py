"""Imported by path from ms-swift's `--external_plugins`: it installs the adapter."""

from grpo_fast.integrations.swift import patch_swift

patch_swift()

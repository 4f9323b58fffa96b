"""The file for ms-swift's `--external_plugins`; `python -m grpo_fast.integrations.swift_plugin`
prints its path.

It has a folder of its own because swift puts the folder of a plug-in at the front of `sys.path`,
where our `trl.py` and `swift.py` would hide the packages of these names.
"""

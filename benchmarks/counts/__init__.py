"""Machine code of the row kernels, counted: what speed can be known of without a GPU.

`python -m benchmarks.counts` from the root of the repository; `make floors` writes the page.
"""

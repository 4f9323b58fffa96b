"""From result files to pages, charts and the tables of README.md and docs/benchmarks.md."""

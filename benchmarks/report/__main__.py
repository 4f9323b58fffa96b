"""`python -m benchmarks.report`: see page.py."""

from benchmarks.report.page import main

main()

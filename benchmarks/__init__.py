"""The benchmarks: cases at the top, contestants in peers/, clocks in measure/, pages in report/."""

"""(N,): what a token costs and how much it counts. It knows no vocabulary."""

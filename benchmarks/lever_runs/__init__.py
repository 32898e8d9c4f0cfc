"""What benchmarks/levers.py runs: settings, methods, single runs, and tables of them."""

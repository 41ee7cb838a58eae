"""Parts of `bench/compare_optimizers.py`, one subject a file; they import `bert` and torch, never the script."""

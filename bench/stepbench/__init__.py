"""What `bench/step.py` is made of, and what the other benchmarks share with it: shapes, contenders, turns."""

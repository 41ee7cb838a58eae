"""What `bench/gpu_check.sh` runs: the driver (programme.py), and a module for each stage, run as a process of its own.

A stage is given the GPU by machine.py. In a rehearsal stand_ins.py takes the GPU's place, as thinly as it can: the
host's code and the programme run as they are, kernels run on the simulator or not at all, CUDA graphs, events and
profiles are imitated. Figures of a rehearsal mean nothing, and every file and line that holds one says so.
"""

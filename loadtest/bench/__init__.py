"""Our engine beside others on one machine: the only part of the load tester that opens an engine.

Every measurement is a process of its own (`worker`), started one at a time by `run`.
"""

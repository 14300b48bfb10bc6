"""Serving without a device: the same engine, scheduler and metrics over an executor that only says how long it takes.

reuse -> cost -> executor -> served -> calibrate

`cost` has the seconds of an iteration, linear in a few counts of its plan and fitted to iterations that were measured;
`reuse` how many of the blocks that a step selects are in slots still; `executor` runs plans in virtual time. `served`
serves a workload by it, and on this machine, where `measure` times iterations; `calibrate` fits a cost to these.
"""

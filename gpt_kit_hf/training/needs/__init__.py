"""What a run takes: time, memory and disk, measured before its first step.

`cost` measures what a step takes, `due` counts what a run does between its steps, `run_needs` adds them up, and
refuses what does not fit.
"""

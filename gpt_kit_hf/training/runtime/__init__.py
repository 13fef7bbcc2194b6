"""The processes of a run and the machine that they run on.

`launch` checks that a launcher started all processes, and ends them; `signals` turns SIGTERM, SIGINT and SIGHUP into a
stop between two steps; `preparation` divides the work before training among processes; `compilation` compiles the
model's blocks; `attention` sets its attention function; `lost_processes` tells the errors of a process that ended from
others; `memory` tunes the C library's allocator; `available_memory` says how much memory is left, and which errors
mean that there was not enough.
"""

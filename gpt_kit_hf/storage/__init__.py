"""Files that survive a kill: atomic writes, checkpoints, the lock and the layout of a run folder."""
